"""The model before fine-tuning, for methods that stay near it or weigh the data by it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class StartingPoint:
    """A PEFT model with its adapter off, which has to start at "no change"; of any other, a frozen copy.

    Args:
        model: at its starting point.
    """

    def __init__(self, model: nn.Module) -> None:
        self._copy = None if hasattr(model, "disable_adapter") else copy.deepcopy(model).requires_grad_(False).eval()

    @contextmanager
    def of(self, model: Any) -> Iterator[nn.Module]:
        """The starting point, in eval mode and without gradients; `model` is as before afterwards."""
        with torch.no_grad():
            if self._copy is not None:
                yield self._copy
                return
            modes = [(module, module.training) for module in model.modules()]
            try:
                with model.disable_adapter():
                    yield model.eval()
            finally:
                for module, training in modes:
                    module.training = training
