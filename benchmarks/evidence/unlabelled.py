"""Text without answers, for consistency on something else than the batch that is fine-tuned on."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator

import torch
from demo.data import collate, encode
from demo.skills import Example, draw_item
from methods.base import Batch
from transformers import PreTrainedTokenizerBase

from evidence.tasks import old


def _prompt(base: str, rng: random.Random) -> str:
    """A training prompt of an old skill, in a format of the pretraining: rehearsal of inputs, though not of answers."""
    skill = rng.choice(list(old(base).values()))
    return rng.choice(skill.formats).format(**draw_item(skill, "train", rng))


def _string(base: str, rng: random.Random) -> str:
    """Sixteen random characters, which know nothing of the pretraining."""
    return "".join(rng.choices(string.ascii_lowercase + string.digits + " ", k=16))


KINDS: dict[str, Callable[[str, random.Random], str]] = {"old prompts": _prompt, "random strings": _string}


def batches(kind: str, base: str, tokenizer: PreTrainedTokenizerBase, size: int, seed: int) -> Iterator[Batch]:
    """Batches of fresh text, without end and without labels; the same ones for the same seed.

    Args:
        kind: one of KINDS.
        base: the base model, "skills" or "text".
        tokenizer: its tokenizer.
        size: samples a batch.
        seed: of the draws.
    """
    draw, rng = KINDS[kind], random.Random(f"{kind} {seed}")
    while True:
        rows = [encode(tokenizer, Example(draw(base, rng), ""), 160, ends=False) for _ in range(size)]
        batch = collate(rows, tokenizer.pad_token_id, torch.device("cpu"))
        del batch["labels"]
        yield batch
