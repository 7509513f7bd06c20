"""FLOPs and saved bytes of a step without running it: the very step on fake tensors, which have shapes and no data.

So a model of any size is counted on any machine. Matrix products and attention are what is counted
(torch.utils.flop_counter); what is read from values (the look at the loss, the comparison of inputs) is left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lfu_reg.cli.errors import Unusable
from lfu_reg.cli.methods import LFU, blocks_alone, lfu_method, make_method
from lfu_reg.cli.saved_bytes import SavedBytes
from lfu_reg.cli.workloads import Setting, Workload, make_workload
from lfu_reg.model.layers import choose_layers

DEEP = 4  # layers: deeper models are counted at this depth and at half of it


@dataclass(frozen=True)
class Count:
    """What one step takes.

    Attributes:
        flops: floating-point operations of matrix products and attention.
        saved_bytes: peak of what autograd keeps for backward passes.
    """

    flops: int
    saved_bytes: int


@dataclass(frozen=True)
class Counts:
    """What is known of a model and its steps before anything is allocated.

    Attributes:
        parameters: number of all weights.
        trainable: number of those that are trained.
        parameter_bytes: memory of all weights.
        gradient_bytes: memory of the gradients of those that are trained.
        steps: by key: "sft", "blocks" and LfU's auxiliaries; empty where the model's forward needs values.
    """

    parameters: int
    trainable: int
    parameter_bytes: int
    gradient_bytes: int
    steps: dict[str, Count]

    @property
    def blocks_share(self) -> float | None:
        """Of SFT's operations."""
        return self.steps["blocks"].flops / self.steps["sft"].flops if self.steps else None

    @property
    def saved_bytes(self) -> int:
        """Of the step that keeps the most for its backward; 0 where it is not known."""
        return max((step.saved_bytes for step in self.steps.values()), default=0)

    @property
    def bytes_needed(self) -> int:
        """Weights, three sets of gradients (of both passes and their sum), and the activations of one pass."""
        return self.parameter_bytes + 3 * self.gradient_bytes + self.saved_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "blocks_share": self.blocks_share, "bytes_needed": self.bytes_needed}


def count(setting: Setting, keys: tuple[str, ...] = ("sft", *LFU)) -> Counts:
    """Count the steps of a model by name; nothing is compiled, and kernels are those of a CPU.

    Raises:
        Unusable: as `make_workload` does.
    """
    workload = make_workload(replace(setting, device="meta", compile=False))
    weights = list(workload.model.parameters())
    trained = [p for p in weights if p.requires_grad]
    depth = len(choose_layers(workload.model, "all"))
    return Counts(
        parameters=sum(p.numel() for p in weights),
        trainable=sum(p.numel() for p in trained),
        parameter_bytes=sum(p.nbytes for p in weights),
        gradient_bytes=sum(p.nbytes for p in trained),
        steps=count_steps(workload, keys) if depth <= DEEP else _extrapolated(setting, keys, depth),
    )


def _extrapolated(setting: Setting, keys: tuple[str, ...], depth: int) -> dict[str, Count]:
    """From two shallow models: operations and saved bytes grow linearly with the number of equal blocks."""
    shallow, deeper = DEEP // 2, DEEP
    one, two = (
        count_steps(make_workload(replace(setting, device="meta", compile=False, layers=n)), keys)
        for n in (shallow, deeper)
    )

    def at_depth(low: int, high: int) -> int:
        return low + (high - low) * (depth - shallow) // (deeper - shallow)

    return {
        key: Count(at_depth(one[key].flops, two[key].flops), at_depth(one[key].saved_bytes, two[key].saved_bytes))
        for key in one.keys() & two.keys()
    }


def count_steps(workload: Workload, keys: tuple[str, ...]) -> dict[str, Count]:
    """Count the steps of a workload that was made on the meta device; empty where its forward needs values."""
    with FakeTensorMode(), _without_values(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            workload = _on_fake_cpu(workload)
            steps = {key: _count(_runner(key, workload)) for key in keys}
            return {**steps, "blocks": _count(blocks_alone(workload).run)}
        except Unusable:
            raise
        except Exception:  # whatever a model's forward raises on tensors without values
            return {}


def _on_fake_cpu(workload: Workload) -> Workload:
    """The workload, made on the meta device, as if it were on a CPU, where the usual attention kernels are chosen.

    Its masks select every token, and so need not be looked at.
    """
    made: dict[int, Tensor] = {}
    for module in workload.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = made.setdefault(id(parameter), _like(parameter))
                module._parameters[name] = fake  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), _like(buffer))
    ids = torch.zeros(workload.batch["input_ids"].shape, dtype=torch.long)
    mask = torch.ones_like(ids)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return workload.sft_loss(model, {"input_ids": batch["ids"], "labels": batch["ids"], "attention_mask": mask})

    return replace(workload, batch={"ids": ids}, sft_loss=loss)


def _like(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _runner(key: str, workload: Workload) -> Callable[[], None]:
    if key not in LFU:
        return make_method(key, workload).run
    method = lfu_method(key, LFU[key], workload, {"alpha": 0.1, "lam": 0.1})  # which need no values to be set
    method.run()
    return method.run


def _count(run: Callable[[], None]) -> Count:
    with flop_counter() as flops, SavedBytes() as saved:
        run()
    return Count(int(flops.get_total_flops()), saved.peak)


class _NoModules(nullcontext[None]):
    """In the place of a counter's look at modules, which puts hooks on hidden states: then nothing would be shared."""

    parents = frozenset({"Global"})


def flop_counter() -> FlopCounterMode:
    """A counter of operations that leaves hidden states alone."""
    counter = FlopCounterMode(display=False, custom_mapping=cpu_attention())
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


def cpu_attention() -> dict[Any, Any]:
    """Formulas for the CPU's fused attention, which torch's table lacks."""

    def forward(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]

    def backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_backward_flop_count(grad, q, k, v))  # type: ignore[no-untyped-call]

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def _without_values() -> ExitStack:
    """Stands in for the few places of the step that read values or the generators' states."""
    patches = ExitStack()
    for target, stand_in in (
        ("lfu_reg.step.second_pass.differing", lambda *args, **kwargs: None),
        ("lfu_reg.diagnostics.Diagnostics.is_due", lambda *args: False),
        ("lfu_reg.hooks.forward_pass.WriteWatch.can_watch", lambda output: True),
        ("lfu_reg.model.rng.RandomState.capture", lambda *args: mock.Mock()),
        ("torch.Tensor.uniform_", lambda tensor, *args, **kwargs: tensor),
    ):
        patches.enter_context(mock.patch(target, stand_in))
    return patches
