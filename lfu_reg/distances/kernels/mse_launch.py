"""The squared difference over layers by kernels that read a table of layers: the autograd function around them.

Which kernels is up to the launcher: Triton's on GPUs (`mse_gpu`), compiled C++ on CPUs (`mse_native`).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from lfu_reg.distances.kernels.mse_layout import collapse
from lfu_reg.distances.kernels.mse_problem import Problem
from lfu_reg.distances.kernels.mse_rows import Strides
from lfu_reg.distances.kernels.mse_table import Table, build_table, strides_of
from lfu_reg.distances.kernels.once import once

_REQUIRES_GRAD = attrgetter("requires_grad")

Gradients = list[Tensor | None]


class Launcher(Protocol):
    """Runs the kernels of one table."""

    def forward(self, problem: Problem, table: Table) -> tuple[Tensor, Tensor]:
        """The loss and the per-layer distances; h' - h is left in the clean tensors that are to be overwritten."""

    def backward(
        self, problem: Problem, table: Table, upstream: Tensor, clean: Sequence[Tensor]
    ) -> tuple[Gradients, Gradients]:
        """Gradients of the K perturbed and the K clean tensors, None where none is wanted.

        Args:
            problem: what is asked.
            table: points to the tensors.
            upstream: gradient of the loss.
            clean: the K clean tensors.
        """


def run(problem: Problem, launcher: Launcher) -> tuple[Tensor, Tensor]:
    """The loss and the per-layer distances of a checked problem."""
    clean, perturbed = problem.clean, problem.perturbed
    strides = strides_of(clean, perturbed)
    if strides is not None:
        clean, perturbed = _describable(clean), _describable(perturbed)
        strides = strides_of(clean, perturbed)
    wants = (False,) * len(clean)
    if problem.grad_perturbed:
        wants = tuple(map(_REQUIRES_GRAD, perturbed))
    if problem.grad_clean:
        wants = tuple(w or h.requires_grad for w, h in zip(wants, clean, strict=True))
    # Saved-tensor hooks may move the tensors away between the passes; a reference here would keep them.
    problem.clean, problem.perturbed = [], []
    inputs = (*(perturbed if problem.grad_perturbed else ()), *(clean if problem.grad_clean else ()))
    loss, per_layer = _MSEOverLayers.apply(  # type: ignore[no-untyped-call]
        problem, launcher, clean, perturbed, wants, strides, *inputs
    )
    return loss, per_layer


class _MSEOverLayers(torch.autograd.Function):
    """loss = sum_l w_l d_l of K layers; gradient 2 w_l scale_l (h' - h) to h', and the negative to h."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        launcher: Launcher,
        clean: list[Tensor],
        perturbed: list[Tensor],
        wants: tuple[bool, ...],
        strides: tuple[Strides, Strides] | None,
        *_: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One look at every selected position of every layer."""
        table = build_table(problem, clean, perturbed, wants, strides)
        loss, per_layer = launcher.forward(problem, table)
        if problem.grad_clean or problem.grad_perturbed:
            if True in problem.overwrite:
                for h, overwritten in zip(clean, problem.overwrite, strict=True):
                    if overwritten:  # a kernel wrote to it, which autograd cannot see
                        torch.autograd.graph.increment_version(h)
                # Where the difference took the place of h, nothing of h' is needed any more.
                kept = (None if o else t for o, t in zip(problem.overwrite, perturbed, strict=True))
                ctx.save_for_backward(*clean, *kept)
            else:
                ctx.save_for_backward(*clean, *perturbed)
            ctx.problem, ctx.launcher, ctx.table, ctx.wants = problem, launcher, table, wants
        ctx.mark_non_differentiable(per_layer)
        ctx.set_materialize_grads(False)
        return loss, per_layer

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Writes every element of every gradient once, without looking at a value on a GPU from the host."""
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        problem: Problem = ctx.problem
        problem.spend()
        count = len(problem.scales)
        saved = ctx.saved_tensors
        clean, kept = saved[:count], saved[count:]
        table: Table = ctx.table
        if not table.points_to(clean, kept):  # saved-tensor hooks have put them elsewhere
            perturbed = [h if h_prime is None else h_prime for h, h_prime in zip(clean, kept, strict=True)]
            table = build_table(problem, clean, perturbed, ctx.wants, strides_of(clean, perturbed))
        to_perturbed, to_clean = ctx.launcher.backward(problem, table, upstream, clean)
        return (
            *(None,) * 6,
            *(to_perturbed if problem.grad_perturbed else ()),
            *(to_clean if problem.grad_clean else ()),
        )


def views(buffer: Tensor, shapes: Sequence[torch.Size]) -> Sequence[Tensor]:
    """The buffer cut into contiguous tensors of these shapes, one after the other."""
    if all(shape == shapes[0] for shape in shapes):
        return buffer.view(len(shapes), *shapes[0]).unbind()
    parts = torch.split(buffer, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _describable(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, with a contiguous copy of those whose leading dimensions do not merge into two."""
    return [
        tensor if tensor.is_contiguous() or collapse(tensor.shape, tensor.stride()) else tensor.contiguous()
        for tensor in tensors
    ]
