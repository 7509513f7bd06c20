"""From prompt/response pairs to batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from demo.skills import Example

IGNORED = -100  # the label that cross-entropy leaves out


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
