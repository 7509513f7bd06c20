"""Collectives of one step as docs/distributed.md lists them."""

from __future__ import annotations

FSDP2: dict[str, tuple[int, int, int]] = {
    # all-gathers, reduce-scatters, all-reduces
    "plain": (7, 4, 0),
    "steering": (14, 8, 0),
    "lora": (14, 8, 0),
    "weights": (14, 8, 1),
    "steering, ascent_steps=2": (21, 8, 0),
    "steering, sync_perturbation": (14, 8, 1),
    "steering, retained": (17, 4, 0),
}
