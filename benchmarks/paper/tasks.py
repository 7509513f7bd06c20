"""The eleven evaluation tasks for lm-evaluation-harness: its own where the hub is there, else on local files."""

from __future__ import annotations

from typing import Any

from evidence.corpus import DATA

# Our name -> the harness's.
HARNESS = {
    "gsm8k": "gsm8k",
    "svamp": "svamp",
    "asdiv": "asdiv",
    "mathqa": "mathqa",
    "mmlu": "mmlu",
    "truthfulqa": "truthfulqa_mc1",
    "hellaswag": "hellaswag",
    "piqa": "piqa",
    "winogrande": "winogrande",
    "boolq": "boolq",
    "commonsense_qa": "commonsense_qa",
}
CATEGORIES = {
    "mathematics": ("gsm8k", "svamp", "asdiv", "mathqa"),
    "knowledge": ("mmlu", "truthfulqa"),
    "reasoning": ("hellaswag", "piqa", "winogrande"),
    "understanding": ("boolq", "commonsense_qa"),
}
_NUMBER = r"(-?[0-9][0-9.,]*)"


def _local(name: str, file: str, **config: Any) -> dict[str, Any]:
    return {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(DATA / file)}},
        "test_split": "test",
        **config,
    }


def _choices(name: str, file: str, text: str, choice: Any, target: Any) -> dict[str, Any]:
    return _local(
        name,
        file,
        output_type="multiple_choice",
        doc_to_text=text,
        doc_to_choice=choice,
        doc_to_target=target,
        metric_list=[{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    )


def _number(name: str, file: str, text: str, target: str) -> dict[str, Any]:
    return _local(
        name,
        file,
        output_type="generate_until",
        doc_to_text=text,
        doc_to_target=target,
        generation_kwargs={"until": ["\n\n", "Question:"], "max_gen_toks": 256, "do_sample": False},
        filter_list=[
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "regex_pattern": _NUMBER, "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        metric_list=[
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "regexes_to_ignore": [",", r"\$", r"\.0*$", r"(?s).*#### "],
            }
        ],
    )


def local_tasks() -> dict[str, dict[str, Any]]:
    """Configurations that read the files of the folder that LFU_DATA names, zero-shot."""
    question = "Question: {{question}}\nAnswer:"
    return {
        "gsm8k": _number("gsm8k", "gsm8k/test.jsonl", question, "{{answer.split('#### ')[-1]}}"),
        "svamp": _number("svamp", "svamp/svamp.jsonl", "Question: {{Body}}. {{Question}}\nAnswer:", "{{Answer}}"),
        "asdiv": _number(
            "asdiv", "asdiv/asdiv.jsonl", "Question: {{Body}} {{Question}}\nAnswer:", "{{Answer.split(' ')[0]}}"
        ),
        "mathqa": _choices("mathqa", "mathqa/test.jsonl", "{{query}}", "choices", "gold"),
        "mmlu": _choices(
            "mmlu",
            "mmlu/test.jsonl.gz",
            "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
            ["A", "B", "C", "D"],
            "answer",
        ),
        "truthfulqa": _choices(
            "truthfulqa",
            "truthfulqa/validation.jsonl.gz",
            "Q: {{question}}\nA:",
            "{{mc1_targets.choices}}",
            "{{mc1_targets.labels.index(1)}}",
        ),
        "hellaswag": _choices("hellaswag", "hellaswag/validation_1000.jsonl", "{{query}}", "choices", "gold"),
        "piqa": _choices("piqa", "piqa/validation.jsonl", "Question: {{goal}}\nAnswer:", "{{[sol1, sol2]}}", "label"),
        "winogrande": _choices(
            "winogrande",
            "winogrande/validation.jsonl",
            "{{sentence}}\nThe blank is",
            "{{[option1, option2]}}",
            "{{answer | int - 1}}",
        ),
        "boolq": _choices("boolq", "boolq/validation.jsonl.gz", "{{query}}", "choices", "gold"),
        "commonsense_qa": _choices("commonsense_qa", "commonsense_qa/validation.jsonl", "{{query}}", "choices", "gold"),
    }


def harness_tasks(names: list[str], local: bool) -> list[Any]:
    """What to hand to `simple_evaluate`.

    Raises:
        ValueError: for names that are not among the eleven.
    """
    unknown = [name for name in names if name not in HARNESS]
    if unknown:
        raise ValueError(f"unknown tasks {', '.join(unknown)}; there are {', '.join(HARNESS)}.")
    if not local:
        return [HARNESS[name] for name in names]
    configurations = local_tasks()
    return [configurations[name] for name in names]


def main_figure(result: dict[str, Any]) -> float:
    """The figure of a task that counts: length-normalised accuracy, accuracy, or exact match."""
    for metric in ("acc_norm,none", "acc,none", "exact_match,flexible-extract", "exact_match,strict-match"):
        if metric in result:
            return float(result[metric])
    raise KeyError(f"none of the known metrics in {sorted(result)}")
