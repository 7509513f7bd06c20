"""What surrounds the step: switching it off and on, saving where it is, and letting go of the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lfu_reg.auxiliaries import Auxiliary, AuxiliaryName, make_auxiliary
from lfu_reg.diagnostics import EVAL_MODE, Diagnostics
from lfu_reg.distances.base import Distance
from lfu_reg.step.ascent import Ascent
from lfu_reg.step.attached_model import AttachedModel
from lfu_reg.step.progress import Progress
from lfu_reg.step.settings import Settings
from lfu_reg.step.sft_loss import is_repeating

if TYPE_CHECKING:
    from typing_extensions import Self


class Controls:
    """All of `LfURegularizer` but its step."""

    auxiliary: Auxiliary
    distance: Distance
    settings: Settings
    metrics: Mapping[str, Any] = {}
    _attached: AttachedModel
    _ascent: Ascent
    _diagnostics: Diagnostics
    _progress: Progress
    _disabled: bool

    @classmethod
    def paper(cls, model: nn.Module, auxiliary: AuxiliaryName | Auxiliary = "lora", **settings: Any) -> Self:
        """A regularizer with the paper's alpha and lambda, those of models of 1 to 8 B; settings as everywhere."""
        chosen = make_auxiliary(auxiliary)
        for name in {"alpha", "lam"} - settings.keys():
            settings[name] = chosen.default_of(name)
        return cls(model, chosen, **settings)  # type: ignore[call-arg]

    def _is_active(self) -> bool:
        if self._disabled or is_repeating() or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return False
        if not (training := self._attached.model.training):
            self._diagnostics.warn_once("eval mode", EVAL_MODE)
        return training

    @property
    def is_second_pass(self) -> bool:
        """Whether `sft_loss_fn` runs again at present: hooks and losses that count or collect may ask."""
        return is_repeating()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Return the plain SFT loss for the block."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit for bit: step, seed, float16's scales, what sets alpha and lam."""
        return {**self._progress.state_dict(), "measured_with": self._measured_with()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; under other settings alpha and lam are measured anew."""
        if isinstance(state, Mapping) and state.get("measured_with", here := self._measured_with()) != here:
            state = {name: value for name, value in state.items() if name != "strength"}
        self._progress.load_state_dict(state)
        self._ascent.forget()

    def _measured_with(self) -> str:
        """What alpha and lam follow from besides model and data, in any process."""
        made = f"{self.auxiliary!r} on {len(self.layers)} layers, {self.distance!r}, {self.settings!r}"
        return re.sub(" at 0x[0-9a-fA-F]+", "", made)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the hooked layers."""
        return self._attached.layers

    @property
    def seed(self) -> int:
        """The seed of all draws."""
        return self._progress.seed

    @property
    def perturbation(self) -> dict[str, Any]:
        """The last step's delta by name: steering d_l [hidden], LoRA (A [r, in], B [out, r]), weights delta [...]."""
        return self.auxiliary.perturbation()

    def remove(self) -> None:
        """Let go of the model. Calling it again does nothing."""
        self._attached.remove()
        self._progress.same_step.remove()
        self.auxiliary.shards = None
        self.auxiliary.reset(torch.Generator)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        if self._attached.is_removed:
            return "LfURegularizer(removed)"
        chosen = ", ".join(f"{name}={value!r}" for name, value in vars(self.settings).items() if value is not None)
        listed = "\n".join(f"    {name}" for name in self.layers)
        return (
            f"LfURegularizer({type(self._attached.model).__name__}, {self.auxiliary!r}, distance={self.distance!r}, "
            f"{chosen}, seed={self.seed}, step={self._progress.step},\n  {len(self.layers)} layers:\n{listed}\n)"
        )
