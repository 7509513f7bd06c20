"""What a regularizer did step by step, to keep and to draw; the picture alone needs matplotlib.

history = History()
for batch in loader:
    loss = reg(model, batch, sft_loss_fn)
    ...
    history.record(reg)
history.plot("lfu.png")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lfu_reg.integrations.picture import draw
from lfu_reg.regularizer import LfURegularizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FETCH_EVERY = 50  # steps whose figures stay on their device, so that recording waits for it this rarely


class History:
    """The figures of each step, and which warnings it gave.

    Where a loop is somebody else's, `record` is called by a callback of that loop: in the Trainer with `trainer.lfu`,
    in Lightning with `LfUCallback.regularizer`.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._fetched = 0
        self._told: set[str] = set()

    def record(self, reg: LfURegularizer, step: int | None = None) -> None:
        """Take note of the last step: once after each, or after every k-th.

        Args:
            reg: the regularizer that ran it.
            step: its number; None counts the calls.

        Raises:
            ValueError: before the regularizer's first step.
        """
        if not reg.metrics:
            raise ValueError("There is no step to record yet: call history.record(reg) after loss = reg(...).")
        told = reg._diagnostics.told
        number = len(self._rows) if step is None else step
        self._rows.append({"step": number, **reg.metrics, "warnings": sorted(told - self._told)})
        self._told |= told
        if len(self._rows) - self._fetched >= FETCH_EVERY:
            self._fetch()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row per recorded step: "step", the names of `reg.metrics` with plain numbers, and kinds of "warnings"."""
        self._fetch()
        return self._rows

    def save(self, file: str | Path) -> None:
        """Write the rows as JSON lines."""
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> History:
        """The history that `save` wrote, to draw it or to go on with it."""
        history = cls()
        history._rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        return history

    def plot(self, file: str | Path | None = None) -> Figure:
        """Draw the distance of each layer, both terms of the loss, and the gradients' ratio and cosine over the steps.

        Warnings are vertical marks.

        Args:
            file: where the picture goes, as PNG, SVG or PDF by its name; None writes none.

        Returns:
            the figure of matplotlib, for whoever logs it elsewhere.

        Raises:
            ImportError: without matplotlib.
            ValueError: if nothing was recorded.
        """
        figure = draw(self.rows)
        if file is not None:
            figure.savefig(file, dpi=120)
        return figure

    def _fetch(self) -> None:
        for row in self._rows[self._fetched :]:
            row.update({name: float(value) for name, value in row.items() if isinstance(value, Tensor)})
        self._fetched = len(self._rows)
