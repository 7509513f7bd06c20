"""How strong the regularizer is: lam from the gradients of both terms, alpha from how far the hidden states move.

The gradient of l_cons grows with alpha, and differs by orders of magnitude between models at the same alpha and lam.
Two figures that carry over are set instead:

    strength       |lam * grad l_cons| / |grad l_SFT| over the trained parameters
    displacement   ||h' - h|| / ||h|| over the hidden states: small enough to be linear, large enough not to be rounding
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lfu_reg.diagnostics import Look
from lfu_reg.distributed.engine import Engine
from lfu_reg.distributed.shared_ascent import summed
from lfu_reg.step.comparison import Comparison
from lfu_reg.step.settings import Settings, check_number, value_at
from lfu_reg.step.sft_loss import PlainSFT

# Where the search for alpha starts, and the smallest displacement that is aimed at, in units of the states' rounding.
FIRST_ALPHA, ABOVE_ROUNDING = 0.1, 8
# What is near enough to the displacement that is aimed at.
CLOSE = 3.0
# Regularized steps at which everything is measured: the first ones, and one in so many.
FIRST_STEPS, MEASURE_EVERY = 10, 10

UNKNOWN = (
    "strength={strength} sets lam from the gradients of both terms, which cannot be taken one by one here (sharding: "
    "{engine}): parameters that FSDP1 and ZeRO-3 shard are on no graph, and reentrant checkpoints, activation "
    "offloading and graphs of torch.compile (but with torch._functorch.config.donated_buffer = False) allow one "
    "backward only. Give lam (and alpha), as LfURegularizer.paper(model, ...) does; or shard the "
    "model with FSDP2 (torch.distributed.fsdp.fully_shard), checkpoint with use_reentrant=False, and leave "
    "strategy='auto', stop_gradient='clean'."
)


class Strength:
    """Sets alpha and lam, and remembers what was measured."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.figures: dict[str, Tensor] = {}  # as they were measured last
        self.alpha: float | None = None  # what the displacement asks for, once it is known
        self.ratio: Tensor | None = None  # |grad l_cons| / |grad l_SFT| when it was last known
        self.correction: Tensor | None = None  # from that ratio at and above the shared part to that of everything
        self.seen = 0  # how many of the first regularized steps there have been

    def at(self, step: int) -> StepStrength:
        """What holds at a step."""
        return StepStrength(self, step)

    def state_dict(self) -> dict[str, float]:
        """What the next step starts from."""
        held = {"alpha": self.alpha, "ratio": self.ratio, "correction": self.correction, "seen": self.seen}
        return {name: float(value) for name, value in held.items() if value is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from it, before anything is measured; what is missing will be."""
        self.seen = int(state.get("seen", 0))
        self.alpha = check_number("alpha", state["alpha"]) if "alpha" in state else None
        for name in {"ratio", "correction"} & set(state):
            setattr(self, name, torch.tensor(state[name], dtype=torch.float64, device="cpu"))

    def learn(self, figures: Tensor) -> Tensor:
        """Take note of what ranks have measured together, and return the ratio of this step; all ranks do the same."""
        ratios = (figures[1:6:3] / figures[0:6:3]).sqrt()  # over everything, above the shared part
        measured = figures[0:6:3] + figures[1:6:3] > 0
        one = torch.ones_like(ratios[0])
        before = self.correction
        correction = one if before is None else before.to(one)
        found = ratios[0] / ratios[1]  # differs from batch to batch
        found = found if before is None else (found * correction).sqrt()
        correction = torch.where(measured.all(), found, correction)
        self.correction = torch.where(torch.isfinite(correction), correction, one)
        ratio = torch.where(measured[0], ratios[0], ratios[1] * self.correction)  # NaN where nothing was measured
        known = ratio if self.ratio is None else self.ratio.to(one)
        self.ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, known)
        return torch.where(measured.any(), ratio, self.ratio)


class StepStrength:
    """Alpha and lam of one step."""

    engine = Engine()  # over whose ranks figures are added up
    eps = 0.0  # relative rounding of the hidden states
    moved: tuple[Tensor, Tensor] | None = None  # ||h' - h|| and ||h|| at a step that is due

    def __init__(self, strength: Strength, step: int) -> None:
        self._strength, settings = strength, strength.settings
        turn, seen = step // settings.every, strength.seen
        fixed, found = settings.alpha, strength.alpha
        self.alpha = value_at("alpha", fixed, step) if fixed is not None else found or FIRST_ALPHA
        self.searches = fixed is None and found is None  # alpha has to be found first
        self.is_due = seen < FIRST_STEPS or turn % MEASURE_EVERY == 0 or self.searches
        rarely = seen <= FIRST_STEPS // 3 or turn % (5 * MEASURE_EVERY) == 0
        # Whether a strategy that has no gradients of both terms runs two more backward passes to compare them.
        self.pays = strength.ratio is None or (rarely if settings.is_one_backward else self.is_due)
        self._rho = None if settings.strength is None else value_at("strength", settings.strength, step)
        # A number, or a scalar tensor once the gradients are known.
        self.lam: float | Tensor = 0.0 if settings.lam is None else value_at("lam", settings.lam, step)
        weight = self.lam if self._rho is None else self._rho
        self.is_off = weight == 0 or step % settings.every > 0
        self.compares = self._rho is not None or self.is_due
        self._exchanged = False

    @property
    def figures(self) -> Mapping[str, Tensor]:
        """What was measured last."""
        return self._strength.figures

    def look(self, *, tokens_count: bool, sensible_alpha: Callable[[], float]) -> Look:
        """What the diagnostics look at."""
        figures = self.figures if self.is_due else {}
        return Look(figures, self.alpha, self.lam, self._rho, self.eps, tokens_count, sensible_alpha)

    def factor(self, relative_distance: float, eps: float | None = None) -> float:
        """What alpha has to be multiplied by for the displacement that is aimed at, a hundredfold at most."""
        aim = max(self._strength.settings.displacement, ABOVE_ROUNDING * (self.eps if eps is None else eps))
        if not math.isfinite(relative_distance):
            return 0.01
        return min(max(aim / max(relative_distance, 1e-30), 0.01), 100.0)

    def weigh(self, whole: Comparison | None, above: Comparison | None, device: torch.device) -> float | Tensor:
        """Set lam, and return it."""
        # `above`: over the parameters above the shared part of the graph, and what arrives at its border.
        if not self.compares:
            return self.lam
        strength, figures = self._strength, self._exchange(whole, above, device)
        ratio = strength.learn(figures)
        self._set_alpha(figures)
        if whole is not None and self.is_due:
            strength.figures["gradient_cosine"] = _or_zero(figures[2] / (figures[0] * figures[1]).sqrt()).float()
        if self.moved is not None:
            strength.figures["relative_distance"] = (figures[6] / figures[7]).sqrt().float()
        measured = whole is not None or above is not None
        if self._rho is not None:
            if not measured and not bool(torch.isfinite(ratio)):
                raise ValueError(UNKNOWN.format(strength=self._rho, engine=self.engine.name))
            self.lam = _or_zero(self._rho / ratio)
        if measured:
            strength.figures["gradient_ratio"] = _or_zero(ratio * self.lam).float()
        return self.lam

    def _set_alpha(self, figures: Tensor) -> None:
        """The next steps have the alpha that would have been right for this step: the same on all ranks."""
        if self.is_due and self._strength.settings.alpha is None:
            _, _, moved, length, logarithm, eps, ranks = figures[4:].tolist()
            if ranks and length:
                factor = self.factor(math.sqrt(moved / length), eps / ranks)
                # Half of the way where only batches differ, all of it where the last alpha was no more than a guess.
                factor **= 1.0 if self.searches or not 1 / CLOSE < factor < CLOSE else 0.5
                self._strength.alpha = math.exp(logarithm / ranks) * factor

    @contextmanager
    def together(self, devices: Sequence[torch.device]) -> Iterator[None]:
        """All ranks add their figures up once in the block, also those whose step turns out to be plain SFT."""
        try:
            yield
        except PlainSFT:
            if self.compares and not self._exchanged and self.engine.groups:
                self.moved, device = None, next(iter(devices), torch.device("cpu"))
                figures = self._exchange(None, None, device)
                self._strength.learn(figures)
                self._set_alpha(figures)
            self._count()
            raise
        self._count()

    def _count(self) -> None:
        self._strength.seen += self._strength.seen < FIRST_STEPS and not self.is_off

    def _exchange(self, whole: Comparison | None, above: Comparison | None, device: torch.device) -> Tensor:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        zero = torch.zeros((), dtype=dtype, device=device)
        numbers: list[Tensor] = []
        for found in (whole, above):  # lengths are added up by their squares
            three = (zero,) * 3 if found is None else (found.sft, found.consistency, found.product)
            numbers += [number.to(zero) ** power for number, power in zip(three, (2, 2, 1), strict=True)]
        numbers += [length.to(zero) ** 2 for length in self.moved or (zero, zero)]
        # Ranks look for their first alpha one by one; from then on they have its mean.
        own = (math.log(max(self.alpha, 1e-30)), self.eps, 1.0)
        # States that stay say nothing about alpha: a loss of weight zero, a head that starts at zero.
        knows = zero > 0 if self.moved is None else self.moved[0].to(zero) > 0
        numbers += [torch.where(knows, number, zero) for number in own]
        figures = torch.stack(numbers)
        self._exchanged = True
        return figures if self.engine.may_run_out else summed(figures, self.engine.groups)


def _or_zero(figure: Tensor) -> Tensor:
    """The figure, and zero where a gradient of length zero, infinity or NaN leaves none."""
    return torch.where(torch.isfinite(figure), figure, torch.zeros_like(figure))
