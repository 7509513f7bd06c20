"""Scores of a fine-tuned model on the eleven tasks, by lm-evaluation-harness, and over prompt variations."""

from __future__ import annotations

import statistics
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from paper.tasks import CATEGORIES, HARNESS, harness_tasks, local_tasks, main_figure

# Ways to ask for the same answer (Figure 5).
VARIATIONS = (
    "Question: {{question}}\nAnswer:",
    "Q: {{question}}\nA:",
    "{{question}}\n",
    "Solve this problem.\n{{question}}\nSolution:",
    "### Instruction:\n{{question}}\n\n### Response:\n",
    "Problem: {{question}}\nAnswer:",
)


def _lm(model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError("The evaluation needs lm-evaluation-harness: pip install 'lfu_reg[paper]'") from error
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _evaluated(lm: Any, tasks: list[Any], limit: int | None) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    return dict(simple_evaluate(lm, tasks=tasks, limit=limit, bootstrap_iters=0, log_samples=False)["results"])


def eleven_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    *,
    local: bool,
    limit: int | None,
    batch_size: int = 8,
) -> dict[str, float]:
    """Accuracy by task and the mean by category.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        names: of the tasks, ("all",) for the eleven.
        local: whether to read the local files instead of the hub.
        limit: most questions a task.
        batch_size: of the evaluation.
    """
    names = list(HARNESS) if list(names) == ["all"] else list(names)
    results = _evaluated(_lm(model, tokenizer, batch_size), harness_tasks(names, local), limit)
    keys = {name: f"local_{name}" if local else HARNESS[name] for name in names}
    figures = {name: main_figure(results[key]) for name, key in keys.items()}
    for category, members in CATEGORIES.items():
        present = [figures[name] for name in members if name in figures]
        if present:
            figures[f"mean/{category}"] = statistics.fmean(present)
    return figures


def prompt_variations(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, limit: int | None, batch_size: int = 8
) -> dict[str, float]:
    """Mean and standard deviation of GSM8K accuracy over ways to ask."""
    base = local_tasks()["gsm8k"]
    tasks = [{**base, "task": f"variation_{i}", "doc_to_text": text} for i, text in enumerate(VARIATIONS)]
    results = _evaluated(_lm(model, tokenizer, batch_size), tasks, limit)
    values = [main_figure(results[task["task"]]) for task in tasks]
    return {
        **{f"variation/{i}": v for i, v in enumerate(values)},
        "mean": statistics.fmean(values),
        "standard deviation": statistics.pstdev(values),
    }
