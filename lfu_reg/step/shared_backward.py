"""What no perturbation reaches is run and differentiated once, for both passes; `reused_blocks.py` has the forward.

Backward, both terms of the loss reach what is below the cut through the cut alone, and a gradient is linear in what
comes from above, so one backward below it, from the sum, does for both. Nothing of this is an estimate:

      d(l_SFT + lam * l_cons) / d theta_below = (d l_SFT / d cut + lam * d l_cons / d cut) . d cut / d theta_below

Steering vectors act behind the first chosen layer: with all L layers, one is saved; with the last third, two thirds.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lfu_reg.model.graph import gradients_of, leaves_above_and_below


class SharedBackward:
    """The part of pass 1's graph below the cut, kept until the gradients of both passes have arrived at it."""

    def __init__(self, cut: Tensor, above: list[Tensor], below: list[Tensor]) -> None:
        self.above, self.below = above, below  # leaves: of the loss, but not through the cut; of the cut
        self.edge: GradientEdge | None = get_gradient_edge(cut) if cut.requires_grad else None
        # What pass 2 starts from: a leaf of the same values, which wants a gradient if there is something below.
        self.start = cut.detach().requires_grad_(bool(below))
        self._cut = cut
        self._gradient: Tensor | None = None

    @property
    def arrived(self) -> tuple[Tensor, Tensor | None]:
        """The start, and what has been brought down to the cut."""
        return self.start, self._gradient

    @property
    def is_small(self) -> bool:
        """Whether going through it twice costs little."""
        return 2 * len(self.below) <= len(self.above)

    def collect(self, gradient: Tensor | None) -> None:
        """Add what one of the passes brings down to the cut."""
        if gradient is not None and self.below:
            self._gradient = gradient if self._gradient is None else self._gradient + gradient

    def backward(self) -> list[tuple[Tensor, Tensor | None]]:
        """Every leaf below with its gradient, from all that was collected; frees the graph."""
        return self._down(self._gradient)

    def backward_of_first(self) -> list[tuple[Tensor, Tensor | None]]:
        """The same for what pass 1 alone has brought; keeps the graph for pass 2's."""
        pairs, self._gradient = self._down(self._gradient, keep_graph=True), None
        return pairs

    def _down(self, gradient: Tensor | None, *, keep_graph: bool = False) -> list[tuple[Tensor, Tensor | None]]:
        if gradient is None:
            return [(leaf, None) for leaf in self.below]
        found = gradients_of(self._cut, self.below, gradient, keep_graph=keep_graph)
        return list(zip(self.below, found, strict=True))


def shared_backward(sft_loss: Tensor, cut: Tensor, anchor: Tensor) -> SharedBackward | None:
    """What both passes share of pass 1's graph; None where something flows around the cut (a skip, tied weights)."""
    divided = leaves_above_and_below(sft_loss, cut)
    if divided is None:
        return None
    above, below = divided
    return SharedBackward(cut, above, [leaf for leaf in below if leaf is not anchor])
