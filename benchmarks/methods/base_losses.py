"""Token losses of a data set under the model before fine-tuning: one forward, before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from methods.base import Batch, LossFunction
from methods.predictions import predictions
from methods.starting_point import StartingPoint
from methods.token_weights import token_losses


class BaseLosses:
    """What the starting point makes of each sample, found again by the sample's tokens and labels.

    Args:
        model: at its starting point.
    """

    def __init__(self, model: nn.Module) -> None:
        self._start: StartingPoint | None = StartingPoint(model)
        self._losses: dict[bytes, Tensor] = {}

    def measure(self, model: nn.Module, batches: Iterable[Batch], sft_loss_fn: LossFunction) -> None:
        """Computes the losses of all batches, then lets go of the starting point.

        Raises:
            RuntimeError: at the second call.
        """
        if self._start is None:
            raise RuntimeError("prepare was called before; make a new method for another data set.")
        with self._start.of(model) as base:
            for batch in batches:
                found = predictions(base, batch, sft_loss_fn)
                counts = found.samples.bincount(minlength=len(batch["labels"])).tolist()
                self._losses.update(zip(_keys(batch), torch.split(token_losses(found), counts), strict=True))
        self._start = None

    def all(self) -> list[Tensor]:
        """Of every sample that was measured, its response tokens' losses in order."""
        return list(self._losses.values())

    def of(self, batch: Batch) -> list[Tensor]:
        """Of every sample of the batch.

        Raises:
            RuntimeError: for a sample that was not measured.
        """
        try:
            return [self._losses[key] for key in _keys(batch)]
        except KeyError:
            raise RuntimeError(
                f"A sample that the base model's losses are not known of; {len(self._losses)} are. Call "
                "method.prepare(batches, sft_loss_fn) once before training, with the whole data set in `batches`."
            ) from None


def _keys(batch: Batch) -> Iterator[bytes]:
    """What identifies each sample, however far it is padded."""
    rows = torch.stack([batch["input_ids"], batch["labels"]], dim=1).cpu()  # [samples, 2, length]
    attention = batch.get("attention_mask")
    kept = torch.ones_like(rows[:, 0], dtype=torch.bool) if attention is None else attention.cpu() != 0
    for row, where in zip(rows, kept, strict=True):
        yield row[:, where].numpy().tobytes()
