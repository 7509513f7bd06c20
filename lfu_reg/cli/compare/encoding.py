"""From rows to token ids, and from token ids to batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lfu_reg.cli.compare.rows import Message, Row
from lfu_reg.cli.errors import Unusable

IGNORED = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True)
class Tokens:
    """Token ids, of which those from `start` on are the answer."""

    ids: tuple[int, ...]
    start: int


def encode(row: Row, tokenizer: Any, *, ends: bool = True) -> Tokens:
    """Token ids of a row: a chat in the model's template, or the prompt with the answer behind it.

    Args:
        row: to be encoded.
        tokenizer: of the model.
        ends: whether the end token follows the answer of a row that is no chat.

    Raises:
        Unusable: for a chat that the tokenizer's template does not take, or has none for.
    """
    if isinstance(row.prompt, str):
        return _joined(row.prompt, row.answer, tokenizer, ends)
    if getattr(tokenizer, "chat_template", None):
        before, after = _in_template(row.prompt, row.answer, tokenizer)
        prompt = tokenizer(before, add_special_tokens=False)["input_ids"]
        answer = tokenizer(after, add_special_tokens=False)["input_ids"]
        return Tokens((*prompt, *answer), len(prompt))
    if len(row.prompt) > 1:
        raise Unusable(
            "messages: the model's tokenizer has no chat template. Give rows with prompt/completion, whose text is "
            "taken as it is, or a model that was tuned for chats."
        )
    return _joined(f"{row.asked}\n", row.answer, tokenizer, ends)


def _joined(before: str, after: str, tokenizer: Any, ends: bool) -> Tokens:
    end = tokenizer.eos_token_id
    prompt = tokenizer(before)["input_ids"]
    prompt = prompt[:-1] if prompt and prompt[-1] == end else prompt
    answer = tokenizer(after, add_special_tokens=False)["input_ids"]
    return Tokens((*prompt, *answer, *[end] * ends), len(prompt))


def _in_template(turns: tuple[Message, ...], answer: str, tokenizer: Any) -> tuple[str, str]:
    """What the template makes of the chat up to the answer, and of the answer."""
    chat = [{"role": role, "content": content} for role, content in turns]
    answered = [*chat, {"role": "assistant", "content": answer}]
    try:
        before: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        whole: str = tokenizer.apply_chat_template(answered, tokenize=False)
    except Exception as error:  # templates are programs of other people
        roles = ", ".join(role for role, _ in turns)
        raise Unusable(f"messages with the roles {roles}: the model's chat template refuses them ({error}).") from error
    if whole.startswith(before):
        return before, whole[len(before) :].rstrip()  # some templates end with a line break after the end token
    return before, answer + tokenizer.eos_token


def collate(sequences: Sequence[Tokens], pad: int, device: str) -> dict[str, Tensor]:
    """One batch, padded on the right; labels [batch, tokens] are the answers."""
    longest = max(len(sequence.ids) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for place, sequence in enumerate(sequences):
        length = len(sequence.ids)
        ids[place, :length] = torch.tensor(sequence.ids)
        labels[place, sequence.start : length] = ids[place, sequence.start : length]
        mask[place, :length] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def by_length(sequences: Sequence[Tokens], size: int) -> Iterator[list[int]]:
    """Places of sequences of similar length, `size` at a time."""
    order = sorted(range(len(sequences)), key=lambda place: len(sequences[place].ids))
    for first in range(0, len(order), size):
        yield order[first : first + size]
