"""Gradients under FSDP2 (`torch.distributed.fsdp.fully_shard`), whose sharded parameters are on no autograd graph.

The forward runs on gathered copies, and the reduced gradients appear in the shards' `.grad` when a real backward pass
has run through FSDP's hooks. So that is what happens here: `.grad` is set aside, the backward runs, what it left is
taken, and the old `.grad` is put back. All that is read of FSDP's private state is in this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lfu_reg.model.autocast import no_autocast
from lfu_reg.model.graph import grad_set_aside, hooks_quiet
from lfu_reg.model.moving import moved_in_place
from lfu_reg.model.patching import patched


class Shards:
    """The sharded parameters in FSDP units; losses may be computed from the outputs of `layers` inside of them."""

    def __init__(self, units: Sequence[Any], layers: Iterable[nn.Module] = ()) -> None:
        self._units = units
        states = [unit._get_fsdp_state() for unit in units]
        self._states = list(dict.fromkeys(states))  # fully_shard([a, b]) gives both the same one
        self._groups = [group for state in self._states for group in _groups(state)]
        inside = {id(layer) for layer in layers}
        self._around = [
            state
            for unit, state in zip(units, states, strict=True)
            if any(id(module) in inside for module in unit.modules() if module is not unit)
        ]

    def parameters(self) -> list[Any]:
        """The trainable shards, DTensors."""
        shards = [parameter.sharded_param for group in self._groups for parameter in group.fsdp_params]
        return [shard for shard in shards if shard.requires_grad]

    def process_groups(self) -> tuple[Any, ...]:
        """The ranks that parameters are sharded over, one group per dimension of the device mesh."""
        meshes = [parameter.sharded_param.device_mesh for group in self._groups for parameter in group.fsdp_params[:1]]
        return tuple(meshes[0].get_group(dimension) for dimension in range(meshes[0].ndim)) if meshes else ()

    def have_pending_gradients(self) -> bool:
        """Whether unreduced gradients of earlier backward passes (gradient sync off) wait for the next one."""
        return any(
            getattr(group, "_partial_reduce_output", None) is not None
            or any(
                getattr(parameter, "unsharded_accumulated_grad", None) is not None
                or getattr(getattr(parameter, "_unsharded_param", None), "grad", None) is not None
                for parameter in group.fsdp_params
            )
            for group in self._groups
        )

    def gradients_of(self, loss: Tensor, leaves: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Every shard and leaf that got a gradient, with it, reduced over ranks; frees the graph of `loss`."""
        # They are reduced whether or not the user has switched that off to accumulate: sharded ones cannot be
        # accumulated otherwise. Gathered copies of shards are among the leaves.
        copies = {id(getattr(p, "_unsharded_param", None)) for group in self._groups for p in group.fsdp_params}
        tensors = [*self.parameters(), *leaves]
        aside = grad_set_aside(tensors)
        with self._reducing(), self._entered(loss), hooks_quiet(tensors), aside as written, no_autocast():
            loss.backward()  # type: ignore[no-untyped-call]
        return [(tensor, gradient) for tensor, gradient in written if id(tensor) not in copies]

    def moved(self, deltas: Sequence[tuple[Any, Any]]) -> AbstractContextManager[None]:
        """Shards moved by deltas (pairs of DTensors) for the block."""
        local = [(shard.detach().to_local(), delta.to_local()) for shard, delta in deltas]  # the same memory
        return moved_in_place(local, self.reshard)

    def reshard(self) -> None:
        """Free gathered copies, so that the next forward gathers anew."""
        for unit in self._units:
            unit.reshard()

    def _entered(self, loss: Tensor) -> RemovableHandle:
        """Prepare units around the layers when the backward of `loss` starts."""
        # FSDP does so when the gradient of a unit's output arrives. Pass 2's loss comes from the layers inside, and the
        # outputs of the units around them play no part in it.

        def enter(gradient: Tensor) -> None:
            for state in self._around:
                state._pre_backward(gradient)

        handle: RemovableHandle = loss.register_hook(enter)  # type: ignore[no-untyped-call]
        return handle

    def _reducing(self) -> AbstractContextManager[None]:
        """Reduce gradients in the block, and wait for them, whatever the user has set for accumulation."""
        return patched(
            (vars(holder), name, True)
            for holder in (*self._groups, *(state._state_ctx for state in self._states))
            for name in ("reduce_grads", "all_reduce_grads", "is_last_backward")
            if hasattr(holder, name)
        )


def _groups(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)  # one only, without the plural, before torch 2.11
    if several is not None:
        return list(several)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
