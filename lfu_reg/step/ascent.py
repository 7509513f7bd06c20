"""Eq. 2 within a step: where g comes from, and whether ranks share it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.distributed.engine import Engine
from lfu_reg.distributed.shared_ascent import SharedAscent
from lfu_reg.step.one_backward import ONE_STEP
from lfu_reg.step.passes import Passes
from lfu_reg.step.progress import Progress
from lfu_reg.step.settings import Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ascent:
    """Moves theta_aux, along this rank's gradient or along the mean over ranks."""

    def __init__(
        self, auxiliary: Auxiliary, settings: Settings, progress: Progress, process_group: ProcessGroup | None
    ) -> None:
        if process_group is not None and not settings.sync_perturbation:
            raise ValueError("process_group= names the ranks to average over: set sync_perturbation=True.")
        self._auxiliary, self._settings, self._progress = auxiliary, settings, progress
        self._shared = SharedAscent(process_group)
        self._is_shared = False

    def begin(self, engine: Engine, devices: Sequence[torch.device]) -> None:
        """Start a step: ranks that ascend together agree on a seed."""
        # The gradient of FSDP2's shards is a mean over ranks already.
        own_mean = self._auxiliary.moves_weights and engine.shards is not None
        self._is_shared = self._settings.sync_perturbation and not own_mean
        if self._is_shared:
            home = next(iter(devices), torch.device("cpu"))
            self._progress.seed = self._shared.begin(engine.groups, self._progress.seed, home)

    def forget(self) -> None:
        """Ask the first rank for its seed again at the next step."""
        self._shared.forget()

    def __call__(self, alpha: float, passes: Passes, undesirable: Any) -> Tensor:
        """theta_aux <- theta_aux + alpha * g / ||g||, `ascent_steps` times; returns the last ||g||."""
        if self._settings.is_one_backward:
            if undesirable is not None:
                raise ValueError(ONE_STEP.format(what="undesirable="))
            self._progress.direction.hand_over(self._auxiliary)
            return self._auxiliary.ascend(alpha)
        batch = passes.batch if undesirable is None else undesirable
        # Gradients of gradients inside of the loss depend on the components in ways that no tap sees.
        crossed = passes.clean.gate.is_crossed and not self._auxiliary.moves_weights
        if crossed:
            self._auxiliary.forget_gradient()
        taken = undesirable is None and not crossed
        norm = self._ascend(alpha, passes.scale if taken else passes.gradient_here(batch))
        for _ in range(1, self._settings.ascent_steps):
            norm = self._ascend(alpha, passes.gradient_here(batch))
        return norm

    def _ascend(self, alpha: float, scale: float) -> Tensor:
        """One step; `scale` is what g is multiplied by (see `float16.py`)."""
        if self._is_shared:
            self._auxiliary.replace_gradients(partial(self._shared, scale=scale))
            scale = 1.0
        return self._auxiliary.ascend(alpha) / scale
