"""From prompt/response pairs to batches, and from JSONL files to prompt/response pairs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from demo.skills import Example

IGNORED = -100  # the label that cross-entropy leaves out

# Accepted field names, first match wins; the third name is an optional context that is put under the prompt.
FIELD_NAMES: tuple[tuple[str, str, str | None], ...] = (
    ("prompt", "response", None),
    ("question", "answer", None),
    ("instruction", "output", "input"),
)
ALLOWED_FIELDS = "prompt/response, question/answer, instruction[/input]/output"


class DataError(ValueError):
    """The user's data file cannot be used; the message says where and what to do."""


def read_pairs(path: Path) -> list[Example]:
    """Reads prompt/response pairs from a `.jsonl` or `.jsonl.gz` file.

    Args:
        path: One JSON object a line, with the fields prompt/response, question/answer or
            instruction[/input]/output.

    Raises:
        DataError: The file is missing or empty, or a line is not JSON or lacks the fields.
    """
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.name.endswith((".jsonl", ".jsonl.gz")))
        raise DataError(
            f"--data {path}: a folder without train.jsonl or train.jsonl.gz; "
            f"give one of its files: {', '.join(names) or 'none of them is .jsonl'}"
        )
    if not path.is_file():
        raise DataError(f"--data {path}: no such file; check the path (from {Path.cwd()})")
    pairs = [_pair(path, number, line) for number, line in _lines(path)]
    if not pairs:
        raise DataError(f"--data {path}: no rows; expected one JSON object a line ({ALLOWED_FIELDS})")
    return pairs


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"--data {path}: cannot be read as UTF-8 text ({error})") from error


def _pair(path: Path, number: int, line: str) -> Example:
    where = f"--data {path}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"{error.msg}, column {error.colno}"
        raise DataError(f"{where}: not valid JSON ({problem}); write one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with {ALLOWED_FIELDS}, found a {type(row).__name__}")
    for prompt_field, response_field, context_field in FIELD_NAMES:
        if prompt_field in row and response_field in row:
            prompt = _text(where, row, prompt_field)
            context = _text(where, row, context_field) if context_field and row.get(context_field) else ""
            return Example(f"{prompt}\n{context}" if context else prompt, _text(where, row, response_field))
    found = ", ".join(map(str, row)) or "none"
    raise DataError(f"{where}: fields found: {found}; allowed: {ALLOWED_FIELDS}; rename the file's fields")


def _text(where: str, row: dict[str, Any], field: str) -> str:
    if not isinstance(row[field], str | int | float) or isinstance(row[field], bool) or row[field] == "":
        raise DataError(f"{where}: field {field!r} must be text that is not empty, found {row[field]!r}")
    return str(row[field])


def encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int, ends: bool = True
) -> dict[str, list[int]]:
    """Token ids of prompt, response and (if it `ends`) end token; labels cover what follows the prompt.

    Too long an example loses the beginning of its prompt, down to half of `max_length`, then the end of its
    response.
    """
    prompt = tokenizer(example.prompt)["input_ids"]
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    response = tokenizer(example.response, add_special_tokens=False)["input_ids"]
    response += [tokenizer.eos_token_id] * ends
    kept = max(max_length - len(response), max_length // 2)
    prompt = prompt[-kept:]
    response = response[: max_length - len(prompt)]
    return {"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response}


def collate(rows: list[dict[str, list[int]]], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Pads rows on the right into one batch."""
    length = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": pad_id, "labels": IGNORED}
    batch = {
        key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows], device=device)
        for key, value in padding.items()
    }
    lengths = torch.tensor([[len(row["input_ids"])] for row in rows], device=device)
    batch["attention_mask"] = (torch.arange(length, device=device)[None] < lengths).long()
    return batch


def batches_by_length(
    rows: list[dict[str, list[int]]], batch_size: int, pad_id: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Batches of rows of similar length."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(ordered), batch_size):
        yield collate(ordered[start : start + batch_size], pad_id, device)
