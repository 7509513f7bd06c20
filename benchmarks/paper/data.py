"""Training data in Alpaca's template, from a local folder or from the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from demo.skills import Example
from evidence.corpus import DATA, records

PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
# Where each set is on the hub (path, configuration) and in the local folder.
HUB = {
    "gsm8k": ("openai/gsm8k", "main"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "lima": ("GAIR/lima", None),
    "dolly": ("gpt4life/alpagasus", None),
}
LOCAL = {"gsm8k": "gsm8k/train.jsonl.gz", "dolly": "dolly/dolly_3k.jsonl.gz"}


class MissingData(RuntimeError):
    """A training set can be had neither locally nor from the hub."""


def alpaca(instruction: str, response: str, context: str = "") -> Example:
    """One example in Alpaca's template."""
    template = WITH_INPUT if context else PLAIN
    return Example(template.format(instruction=instruction, input=context), response)


def training_examples(name: str) -> list[Example]:
    """The training set of that name, or the pairs of a `.jsonl` file (instruction, input, output).

    Raises:
        MissingData: if it is neither in the folder that LFU_DATA names nor on the hub.
    """
    if name.endswith(".jsonl"):
        rows = [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
        return [_example("dolly", row) for row in rows]
    if name not in HUB:
        raise MissingData(f"{name!r} is no training set; there are {', '.join(HUB)}, or give a .jsonl file.")
    if name in LOCAL and (DATA / LOCAL[name]).exists():
        return [_example(name, row) for row in records(LOCAL[name])]
    return [_example(name, row) for row in _from_hub(name)]


def _from_hub(name: str) -> Any:
    path, configuration = HUB[name]
    try:
        from datasets import load_dataset

        return load_dataset(path, configuration, split="train")
    except Exception as error:
        local = f" nor in {DATA / LOCAL[name]}" if name in LOCAL else ""
        raise MissingData(
            f"{name} cannot be loaded from the hub ({path}: {error}){local}. Give a .jsonl file with instruction, "
            "input and output by --data."
        ) from error


def _example(name: str, row: dict[str, Any]) -> Example:
    if name == "gsm8k":
        return alpaca(row["question"], row["answer"])
    if name == "arc_challenge":
        choices = row["choices"]
        listed = "\n".join(f"{label}. {text}" for label, text in zip(choices["label"], choices["text"], strict=True))
        return alpaca(f"{row['question']}\n{listed}", row["answerKey"])
    if name == "lima":
        return alpaca(*row["conversations"][:2])
    return alpaca(row["instruction"], row["output"], row.get("input", ""))
