"""How lambda may change during training: annealed with the step, or held to a share of the SFT loss."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# The first step measures l_cons and hardly trains on it: what Adam takes for the size of gradients stays that of SFT's.
MEASURING = 1e-9


def annealed(lam: float, steps: int) -> Callable[[int], float]:
    """Lambda that falls linearly to zero over so many steps."""
    return lambda step: lam * max(0.0, 1 - step / steps)


class RatioToSFT:
    """lambda_t = min(bound, ratio * l_SFT / l_cons), by the losses of the step before.

    So lambda * l_cons is about `ratio` of l_SFT, and vanishes together with it.

    Args:
        ratio: of lambda * l_cons to l_SFT.
        bound: largest lambda.
    """

    def __init__(self, ratio: float, bound: float) -> None:
        if ratio <= 0:
            raise ValueError(f"ratio={ratio!r}; allowed are numbers above 0.")
        self.ratio, self.bound = ratio, bound
        self._lam, self._l_cons = MEASURING, 0.0

    def __call__(self, step: int) -> float:
        """Lambda of this step."""
        return self._lam

    def observe(self, l_sft: Tensor, l_cons: Tensor | None) -> None:
        """Takes note of a step; l_cons is None where the step had no consistency term, and the last one is kept."""
        if l_cons is not None:
            self._l_cons = float(l_cons)
        # Above zero: at zero the regularizer would be off, and l_cons never be seen again.
        wanted = self.ratio * float(l_sft) / self._l_cons if self._l_cons > 0 else self.bound
        self._lam = min(self.bound, max(wanted, MEASURING))
