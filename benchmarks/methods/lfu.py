"""Learning from the Undesirable in all flavours, as a method among the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import Tensor, nn

from lfu_reg import Auxiliary, LfURegularizer, LoRADeltas, RandomDirections, SteeringVectors, WeightDeltas
from methods.base import Batch, LossFunction, Method
from methods.lam_control import RatioToSFT, annealed
from methods.masks import MASKS
from methods.opposite_direction import OppositeDirection
from methods.wrong_answers import WrongAnswers, wrong_answers

FLAVOURS: dict[str, Callable[[], Auxiliary]] = {
    "lora": LoRADeltas,
    "steering": SteeringVectors,
    "relative-steering": lambda: SteeringVectors(relative=True),
    "per-layer-steering": lambda: SteeringVectors(norm="per-layer"),
    "weights": WeightDeltas,
    "random": lambda: RandomDirections(LoRADeltas()),
    "random-steering": lambda: RandomDirections(SteeringVectors()),
    "negative": lambda: OppositeDirection(LoRADeltas()),
    "negative-steering": lambda: OppositeDirection(SteeringVectors()),
}
ASCENTS = ("same", "other", "undesirable")


class LfU(Method):
    """LfURegularizer.

    Args:
        model: what is fine-tuned.
        flavour: one of FLAVOURS.
        anneal_steps: lets lam fall linearly to zero over so many steps.
        ratio: holds lam * l_cons to this share of l_SFT; lam is then the upper bound (see `RatioToSFT`).
        ascent_from: where the direction comes from: "same", ascent of l_SFT on the batch; "other", ascent of l_SFT on
            the batch of the step before (the first step takes its own); "undesirable", *descent* of l_SFT on the batch
            with its answers exchanged (see `wrong_answers`), that is, ascent of minus this loss.
        mask: which positions count, one of MASKS.
        elsewhere: batches of text without labels, one a step, on which l_cons is taken in the place of the batch; the
            direction stays the batch's. None: l_cons on the batch itself.
        options: of `LfURegularizer`.
    """

    def __init__(
        self,
        model: nn.Module,
        flavour: str = "lora",
        *,
        anneal_steps: int | None = None,
        ratio: float | None = None,
        ascent_from: Literal["same", "other", "undesirable"] = "same",
        mask: Literal["response", "shifted", "all"] = "response",
        elsewhere: Iterator[Batch] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model)
        if anneal_steps and ratio is not None:
            raise ValueError("anneal_steps and ratio both set lam over time; give one of them.")
        if ascent_from not in ASCENTS:
            raise ValueError(f"ascent_from={ascent_from!r}; allowed are {', '.join(map(repr, ASCENTS))}.")
        self._ratio = None if ratio is None else RatioToSFT(ratio, float(options["lam"]))
        if anneal_steps:
            options["lam"] = annealed(float(options["lam"]), anneal_steps)
        elif self._ratio:
            options["lam"] = self._ratio
        self._ascent_from, self._elsewhere = ascent_from, elsewhere
        self._previous: Batch | None = None
        self.reg = LfURegularizer(model, FLAVOURS[flavour](), token_mask=MASKS[mask], **options)

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """l_SFT + lam * l_cons."""
        ascent = self._ascent_batch(batch)
        if self._elsewhere is None:
            loss = self.reg(model, batch, _of_any_batch(sft_loss_fn), undesirable=ascent)
            l_sft = self.reg.metrics["sft_loss"]
        else:
            sft_loss = sft_loss_fn(model, batch)
            direction = batch if ascent is None else ascent
            loss = sft_loss + self.reg(model, next(self._elsewhere), _of_any_batch(sft_loss_fn), undesirable=direction)
            l_sft = sft_loss.detach()
        if self._ratio:
            figures = self.reg.metrics
            self._ratio.observe(l_sft, figures["consistency_loss"] if "ascent_grad_norm" in figures else None)
        return loss

    def finish(self) -> None:
        """Hooks off."""
        self.reg.remove()

    def _ascent_batch(self, batch: Batch) -> Batch | None:
        if self._ascent_from == "undesirable":
            return wrong_answers(batch)
        previous, self._previous = self._previous, batch
        return previous if self._ascent_from == "other" else None


def _of_any_batch(sft_loss_fn: LossFunction) -> LossFunction:
    """The SFT loss; minus it on wrong answers; zero, but with all hidden states, on text without labels."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if "labels" not in batch:
            return model(**batch).logits.sum() * 0.0
        return -sft_loss_fn(model, batch) if isinstance(batch, WrongAnswers) else sft_loss_fn(model, batch)

    return loss
