"""Training data in Alpaca's template, from a local folder or from the hub, and as batches."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from demo.data import IGNORED, collate, encode
from demo.skills import Example
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from paper.settings import Protocol

PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
# Instructions of Dolly that AlpaGasus chose are not on the hub.
_DOLLY = (
    "https://raw.githubusercontent.com/gpt4life/alpagasus/95ad3e52510df8c0a2f0dd6cbe50b501acde83a1/"
    "data/filtered/dolly_3k.json"
)
# A training set's name: in the paper, how `datasets` finds it, and its file in a local folder.
SETS: dict[str, tuple[str, dict[str, str], str]] = {
    "gsm8k": ("GSM8K", {"path": "openai/gsm8k", "name": "main"}, "gsm8k/train.jsonl.gz"),
    "arc_challenge": (
        "ARC-Challenge",
        {"path": "allenai/ai2_arc", "name": "ARC-Challenge"},
        "arc_challenge/train.jsonl",
    ),
    "dolly": ("Alpagasus Dolly 3k", {"path": "json", "data_files": _DOLLY}, "dolly/dolly_3k.jsonl.gz"),
    "lima": ("LIMA", {"path": "GAIR/lima"}, "lima/train.jsonl"),
    "beavertails": ("BeaverTails", {}, ""),  # two parts: see `attack.py`
}


class MissingData(RuntimeError):
    """Data can be had neither locally nor from the hub."""


def alpaca(instruction: str, response: str, context: str = "", *, section: bool = False) -> Example:
    """One example in Alpaca's template; a context is the instruction's last line or a `section` of its own."""
    if context and section:
        return Example(WITH_INPUT.format(instruction=instruction, input=context), response)
    return Example(PLAIN.format(instruction=f"{instruction}\n{context}" if context else instruction), response)


def last_number(text: str) -> str:
    """The last number of a text, as GSM8K's answers end with it; empty if there is none."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[-1].replace(",", "") if found else ""


def local_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a `.jsonl` or `.jsonl.gz` file."""
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def training_examples(name: str, protocol: Protocol, folder: Path | None) -> list[Example]:
    """The training set of that name, or the pairs of a `.jsonl` file (instruction, input, output).

    Args:
        name: in SETS, or a file.
        protocol: whose template is used.
        folder: of local data; None for the hub.

    Raises:
        MissingData: if it is not there.
    """
    section = protocol.input_section
    if name.endswith((".jsonl", ".jsonl.gz")):
        return [_example("pairs", row, section) for row in local_rows(Path(name))]
    if name not in SETS:
        raise MissingData(f"{name!r} is no training set; there are {', '.join(SETS)}, or give a .jsonl file.")
    _, hub, file = SETS[name]
    if folder is None:
        return [_example(name, row, section) for row in _from_hub(hub)]
    if not (folder / file).exists():
        raise MissingData(f"{folder / file} does not exist; put {name} there, or choose other sets by --train.")
    return [_example(name, row, section) for row in local_rows(folder / file)]


def _from_hub(source: dict[str, str]) -> Any:
    try:
        from datasets import load_dataset

        return load_dataset(**source, split="train")
    except Exception as error:
        raise MissingData(
            f"{' '.join(source.values())} cannot be loaded ({error}). --tasks local --data FOLDER does without it."
        ) from error


def _example(name: str, row: dict[str, Any], section: bool) -> Example:
    if name == "gsm8k":
        return alpaca(row["question"], row["answer"])
    if name == "arc_challenge":
        choices = row["choices"]
        listed = "\n".join(f"{label}. {text}" for label, text in zip(choices["label"], choices["text"], strict=True))
        return alpaca(f"{row['question']}\n{listed}", row["answerKey"])
    if name == "lima":
        return alpaca(*row["conversations"][:2])
    return alpaca(row["instruction"], row["output"], row.get("input", ""), section=section)


def encoded(tokenizer: PreTrainedTokenizerBase, example: Example, protocol: Protocol) -> dict[str, list[int]]:
    """Token ids and labels; the end token is followed by two newlines where the protocol says so."""
    after = tokenizer("\n\n", add_special_tokens=False)["input_ids"] if protocol.newlines else []
    row = encode(tokenizer, example, protocol.max_length - len(after))
    return {key: ids + after for key, ids in row.items()}


def batch_of(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, protocol: Protocol, device: torch.device
) -> dict[str, Tensor]:
    """One batch, padded on the right to a multiple of `pad_to`."""
    batch = collate([encoded(tokenizer, e, protocol) for e in examples], tokenizer.pad_token_id, device)
    missing = -batch["input_ids"].shape[1] % protocol.pad_to
    values = {"input_ids": tokenizer.pad_token_id, "labels": IGNORED, "attention_mask": 0}
    return {key: pad(batch[key], (0, missing), value=value) for key, value in values.items()}


def micro_batches(count: int, protocol: Protocol, draw: str, rank: int = 0, processes: int = 1) -> list[list[int]]:
    """Which of `count` examples this process sees in an epoch; every process gets as many batches as the others.

    Args:
        count: of examples.
        protocol: sizes, and whether the last batch is kept.
        draw: names the shuffle, with the protocol's seed.
        rank: of this process.
        processes: how many there are.
    """
    order = list(range(count))
    random.Random(f"{protocol.seed} {draw}").shuffle(order)
    if protocol.keep_last:
        order += [order[i % count] for i in range(-count % processes)]
    else:
        order = order[: count - count % (protocol.batch_size * processes)]
    mine = order[rank::processes]
    return [mine[i : i + protocol.batch_size] for i in range(0, len(mine), protocol.batch_size)]


def updates(batches: list[list[int]], protocol: Protocol) -> list[list[list[int]]]:
    """Micro-batches by optimizer step; without `keep_last`, what is too little for a step is left out."""
    n = protocol.accumulate
    steps = [batches[i : i + n] for i in range(0, len(batches), n)]
    return steps if protocol.keep_last else [step for step in steps if len(step) == n]


def second_loader(
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """Batches without end over the same data, in an order of their own."""
    epoch = 0
    while True:
        for chosen in micro_batches(len(examples), protocol, f"second loader {epoch}", rank, processes):
            yield batch_of([examples[i] for i in chosen], tokenizer, protocol, device)
        epoch += 1
