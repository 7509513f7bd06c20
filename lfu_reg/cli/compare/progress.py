"""How far a comparison is, and how long it will still take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from types import TracebackType

from rich.console import Console

from lfu_reg.cli.compare.plan import COST, Run


class Progress:
    """Watches steps and evaluations; in a terminal there is a line that changes, elsewhere one line per run."""

    def __init__(self, console: Console, runs: Sequence[Run], steps: int, evaluations: int) -> None:
        self._console, self._steps, self._evaluations = console, steps, evaluations
        self._left = Counter({step: steps * sum(run.step == step for run in runs) for step in COST})
        self._evaluations_left = evaluations * len(runs)
        self._seconds: dict[str | None, list[float]] = {}
        self._of_evaluation: list[float] = []
        self._status = console.status("", spinner="line")
        self._number, self._since = 0, time.perf_counter()

    def __enter__(self) -> Progress:
        self._status.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.__exit__(kind, value, trace)

    def begins(self, what: str) -> None:
        """Time runs from here."""
        self._number, self._since = 0, time.perf_counter()
        self._say(what)

    def step(self, run: Run, loss: float) -> None:
        """A step is done."""
        self._number += 1
        self._left[run.step] -= 1
        self._seconds.setdefault(run.step, []).append(self._passed())
        self._say(f"{run.setting}, seed {run.seed}: step {self._number} of {self._steps}, loss {loss:.3f}")

    def evaluated(self, what: str) -> None:
        """A model has been scored."""
        self._of_evaluation.append(self._passed())
        self._say(f"{what}: scored")

    def run_is_over(self, run: Run, line: str) -> None:
        """All of a run is done, or was ended early."""
        self._left[run.step] -= self._steps - self._number
        self._evaluations_left -= self._evaluations
        self._console.print(f"{line}{self.left}", markup=False, soft_wrap=True)

    @property
    def left(self) -> str:
        """In words; empty before anything is known."""
        sft = self._seconds.get(None)
        if not sft or not self._of_evaluation:
            return ""
        per_step = {step: fmean(self._seconds.get(step) or [cost * fmean(sft)]) for step, cost in COST.items()}
        seconds = sum(per_step[step] * max(0, number) for step, number in self._left.items())
        return f"; {in_words(seconds + fmean(self._of_evaluation) * self._evaluations_left)} left"

    def _passed(self) -> float:
        now = time.perf_counter()
        self._since, passed = now, now - self._since
        return passed

    def _say(self, line: str) -> None:
        self._status.update(f"{line}{self.left}")


def in_words(seconds: float) -> str:
    """A length of time, roughly."""
    if seconds < 100:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"
