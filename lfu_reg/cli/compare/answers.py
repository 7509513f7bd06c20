"""Answers that a model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lfu_reg.cli.compare.encoding import Tokens


@torch.no_grad()
def write_answers(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[int, ...]], longest: int, device: str, *, drawn: bool
) -> list[Tokens]:
    """Prompts with the model's answers behind them.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        prompts: token ids.
        longest: tokens of an answer.
        device: of the model.
        drawn: from the model's distribution as it is (with torch's generator), else the likeliest token each time.
    """
    width = max(map(len, prompts))
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    choice = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if drawn else {}
    settings = {"max_new_tokens": longest, "pad_token_id": pad, "eos_token_id": end, "use_cache": True}
    written = model.generate(input_ids=ids, attention_mask=mask, do_sample=drawn, **choice, **settings)
    return [
        Tokens((*prompt, *_until(end, answer)), len(prompt))
        for prompt, answer in zip(prompts, written[:, width:].tolist(), strict=True)
    ]


def text_of(answer: Tokens, tokenizer: Any) -> str:
    """What the model wrote, in one line."""
    return " ".join(tokenizer.decode(answer.ids[answer.start :], skip_special_tokens=True).split())


def _until(end: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids
