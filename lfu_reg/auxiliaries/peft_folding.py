"""LoRA deltas folded into the rank of the adapter that is trained: PEFT's own two thin products, a little wider.

            ┌─────────────────── W ───────────────────┐
        x ──┤                                        (+)──► y' = W x + p B A x + s B' A' x
            └── [A; A'] ── z ── [B, s/p B'] ── p ─────┘

A, B and p are the adapter's, A', B' and s the delta's. Wider products cost little, as x and y have to be read anyway,
and B' is a zero leaf of pass 1, so the backward gives dl/dB' without a tap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lfu_reg.auxiliaries.base import Components
from lfu_reg.model.patching import patched
from lfu_reg.model.peft import PlainLoRA, acting_adapter


class Fold:
    """Stands in the place of a PEFT layer's forward method during one pass."""

    def __init__(self, site: nn.Module, adapter: PlainLoRA, components: Callable[[], Components], scale: float) -> None:
        self.site, self.acted = site, False  # acted: whether the delta was in what the last call returned
        # Asked for A' and B' at the first call only, so blocks that are repeated for a backward later on (activation
        # checkpointing) get the tensors of their own pass.
        self._adapter, self._components, self._scale = adapter, components, scale
        self._weights: tuple[Tensor, Tensor] | None = None
        self._run = _runner()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy or a pickle that the user's loss function makes of the model is a plain one.
        return functools.partial, (type(self.site).forward, self.site)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward, with the delta where its adapter acts."""
        return self._run(self, args, kwargs)

    def run(self, args: Any, kwargs: Any) -> Any:
        """The same, in plain Python."""
        site, adapter = self.site, self._adapter
        forward = type(site).forward
        self.acted = False
        # Hooks leave calls without gradients alone, and refuse transforms.
        if not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
            return forward(site, *args, **kwargs)
        # A call that the adapter takes no part in (`disable_adapter()`, a mixed batch) is left to taps and outputs.
        if kwargs.get("adapter_names") is not None or acting_adapter(site) != adapter.name:
            return forward(site, *args, **kwargs)
        if self._weights is None:
            self._weights = self._widened(*self._components())
        down, up = self._weights
        # For this call only: a penalty on the weights in the user's loss has to see what is trained.
        with patched([(adapter.down, "weight", down), (adapter.up, "weight", up)]):
            y = forward(site, *args, **kwargs)
        self.acted = True
        return y

    def _widened(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        down, up = self._adapter.down.weight, self._adapter.up.weight
        ratio = self._scale / self._adapter.scaling
        scaled = b if ratio == 1 else b * ratio
        return torch.cat([down, a.to(down.dtype)]), torch.cat([up, scaled.to(up.dtype)], 1)


def has_acted(module: nn.Module) -> bool:
    """Whether the delta is in what `module` has just returned."""
    forward = vars(module).get("forward")
    return isinstance(forward, Fold) and forward.acted


@functools.cache
def _runner() -> Callable[[Fold, Any, Any], Any]:
    # Where torch.compile comes across a fold unforeseen, it is to call it, and not to look inside. Made at the first
    # fold: the decorator imports the compiler.
    runner: Callable[[Fold, Any, Any], Any] = torch.compiler.disable(Fold.run)  # type: ignore[no-untyped-call]
    return runner
