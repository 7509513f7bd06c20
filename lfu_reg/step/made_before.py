"""Whether what a layer is given was there before the first layer ran, and so comes from none of them.

The arguments of the first layer were. Models with several kinds of layers (sliding windows, whole attention) make a
mask and position embeddings for each kind before they start, of which the first layer is given its own only. That the
others were there, too, is seen once, among all tensors that are alive as the first layer begins; from then on the place
in the calls stands for it. What is written to since then, as notes that layers leave for each other, does not count.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lfu_reg.hooks.inplace import version_of

# Looking at all objects of the process takes a tenth of a second.
LOOKS = 3


class MadeBefore:
    """What was made before the layers of one model run."""

    def __init__(self) -> None:
        self._places: set[tuple[int, int]] = set()  # number of the layer, and of the value among its arguments
        self._looks_left, self._wanted = LOOKS, False
        self.forget()

    def forget(self) -> None:
        """Let go of the values of one forward; what was learnt about their places stays."""
        self._first: dict[int, int] = {}  # version by identity
        self._alive: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._given: list[tuple[Tensor, int]] = []

    def begin(self, first: Iterable[Tensor]) -> None:
        """The first layer is about to run.

        Args:
            first: tensors among its arguments, without those that must not be used again.
        """
        self._first = {id(tensor): version_of(tensor) for tensor in first}
        if self._wanted and self._looks_left:
            self._looks_left -= 1
            # Weakly, as another tensor may get the place in memory, and so the identity, of one that is gone.
            tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
            self._alive = {id(tensor): (weakref.ref(tensor), version_of(tensor)) for tensor in tensors}
        self._wanted = False

    def holds(self, number: int, values: Iterable[Any]) -> bool:
        """Whether all values are plain or were made before.

        Args:
            number: of the layer.
            values: its arguments, without the hidden state.
        """
        return all(_is_plain(value) or self._was(value, (number, i)) for i, value in enumerate(values))

    def are_unwritten(self) -> bool:
        """Whether no value that was there before has been written to since a layer was given it."""
        return all(version_of(tensor) == version for tensor, version in self._given)

    def _was(self, value: Any, place: tuple[int, int]) -> bool:
        if not isinstance(value, Tensor):
            return False
        version = version_of(value)
        self._given.append((value, version))
        if id(value) in self._first:
            return self._first[id(value)] == version
        if value.requires_grad:
            return False
        if (seen := self._alive.get(id(value))) is not None and seen[0]() is value and seen[1] == version:
            self._places.add(place)
        elif place not in self._places:
            self._wanted = True
        return place in self._places


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))
