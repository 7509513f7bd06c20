"""A batch of undesired behaviour: the prompts of a batch, each with the answer of another of its samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from methods.base import IGNORED, Batch


class WrongAnswers(dict[str, Tensor]):
    """A batch whose loss is to be descended in the place of an ascent: its direction is that of minus its loss."""


def wrong_answers(batch: Batch) -> WrongAnswers:
    """Every prompt with the next different response of the batch, in its order and around its end.

    Args:
        batch: padded on the right, labels behind the prompt.

    Raises:
        ValueError: if all responses are the same.
    """
    prompts, responses = [], []
    for ids, labels, attention in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        counted = labels != IGNORED
        prompts.append(ids[(attention != 0) & ~counted])
        responses.append(ids[counted])
    count, ids, labels = len(prompts), [], []
    for i, prompt in enumerate(prompts):
        others = (responses[(i + k) % count] for k in range(1, count))
        wrong = next((other for other in others if not torch.equal(other, responses[i])), None)
        if wrong is None:
            raise ValueError(f"All {count} responses of the batch are the same: no answer is wrong for another prompt.")
        ids.append(torch.cat([prompt, wrong]))
        labels.append(torch.cat([torch.full_like(prompt, IGNORED), wrong]))
    attention = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    padded = (pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORED))
    return WrongAnswers(input_ids=padded[0], labels=padded[1], attention_mask=attention)
