"""Whether tensors are written to: outputs of layers past our hooks, by way of other tensors on the same memory.

A tap, or a component that is added, puts another tensor in the place of an output. Where the model goes on to write in
place into that output's base, another view of it, or the output itself under another name, values and history part.
"""

from __future__ import annotations

from torch import Tensor


class WriteWatch:
    """Watches one output from now on, without keeping its memory alive: checkpointed blocks free theirs at once."""

    def __init__(self, name: str, output: Tensor) -> None:
        self.name = name
        self._version = output._version
        # A version counter belongs to all tensors on the same memory, and stays when that is taken from one of them.
        self._probe = output.detach()
        self._probe.data = output.new_empty(0)

    @staticmethod
    def can_watch(output: Tensor) -> bool:
        """Not a subclass, which need not let go of its memory, nor what inference_mode made, which has no counter."""
        return type(output) is Tensor and not output.is_inference()

    @property
    def was_written(self) -> bool:
        """Whether the output, its base or another of its views has been written to since."""
        return self._probe._version != self._version
