"""Where the time of LfU's step goes, measured around the step's own calls; the step itself knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any
from unittest import mock

from torch import Tensor

from lfu_reg import regularizer
from lfu_reg.cli.methods import Method
from lfu_reg.cli.timing import Clock
from lfu_reg.cli.workloads import Workload
from lfu_reg.step import passes, second_pass
from lfu_reg.step.consistency import consistency
from lfu_reg.step.strategy_choice import choose_strategy

PASSES = ("clean forward", "clean backward", "perturbed forward", "perturbed backward")
BETWEEN = ("ascent", "distance", "returned loss", "bookkeeping")


def phases_of(method: Method, workload: Workload, clock: Clock, rounds: int) -> dict[str, float]:
    """Median seconds of every phase of a step with the released strategy.

    The hooks' work in a pass counts with the pass, as does the distance's share of the second backward.

    Args:
        method: with a regularizer.
        workload: what it trains.
        clock: of the device; waiting for a GPU at every phase makes the whole step somewhat slower than it is.
        rounds: how many steps.
    """
    taken: dict[str, list[float]] = {name: [] for name in (*PASSES, *BETWEEN)}
    for _ in range(rounds):
        laps = dict.fromkeys(taken, 0.0)
        start = clock.now()
        with _instrumented(method, workload, clock, laps) as run:
            run()
        laps["bookkeeping"] = clock.now() - start - sum(laps.values())
        method.model.zero_grad(set_to_none=True)  # a walk over all modules, in SFT's step as well
        for name, seconds in laps.items():
            taken[name].append(seconds)
    return {name: median(seconds) for name, seconds in taken.items()}


@contextmanager
def _instrumented(
    method: Method, workload: Workload, clock: Clock, laps: dict[str, float]
) -> Iterator[Callable[[], None]]:
    reg = method.regularizer
    assert reg is not None

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = clock.now()
            try:
                return function(*args, **kwargs)
            finally:
                laps[name] += clock.now() - start

        return call

    @contextmanager
    def timed_entry(name: str, context: Any) -> Iterator[Any]:
        start = clock.now()
        with context as value:
            laps[name] += clock.now() - start
            yield value

    second = passes.Passes.second

    def strategy(*settings: Any) -> Any:
        made: Any = choose_strategy(*settings)
        made.backward_clean = timed("clean backward", made.backward_clean)
        made.backward_perturbed = timed("perturbed backward", made.backward_perturbed)
        made.total = timed("clean backward", made.total)  # of the reused blocks, for both passes
        return made

    def run() -> None:
        clean = timed("clean forward", workload.sft_loss)
        loss: Tensor = reg(
            method.model, workload.batch, lambda *call: (workload.sft_loss if reg.is_second_pass else clean)(*call)
        )
        timed("returned loss", loss.backward)()

    with ExitStack() as patches:
        for target, name, wrapped in (
            (second_pass, "choose_strategy", strategy),
            (passes.Passes, "second", lambda *args: timed_entry("perturbed forward", second(*args))),
            (reg.auxiliary, "ascend", timed("ascent", reg.auxiliary.ascend)),
            (regularizer, "consistency", timed("distance", consistency)),
        ):
            patches.enter_context(mock.patch.object(target, name, wrapped))
        yield run
