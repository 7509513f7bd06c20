"""Run one step of the library and one of the oracle on the same model and batch, and compare."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer, LoRADeltas, SteeringVectors, WeightDeltas
from tests.support import oracle
from tests.support.cases import Batch, Case
from tests.support.compare import LOSS_TOLERANCE, assert_same_gradients, close, gradients_of, scaled


def auxiliary(name: str, **options: Any) -> Any:
    """The library's auxiliary; LoRA with a small rank and scale 2."""
    if name == "lora":
        return LoRADeltas(**{"rank": 2, "lora_alpha": 4, **options})
    return {"steering": SteeringVectors, "weights": WeightDeltas}[name](**options)


def a_matrices_of(reg: LfURegularizer) -> dict[str, Tensor]:
    """LoRA's random A of the last step, by linear map; empty for other auxiliaries."""
    return {name: p[0].clone() for name, p in reg.perturbation.items() if isinstance(p, tuple)}


def drawn_a_matrices(
    case: Case, name: str, model: nn.Module, batch: Batch, seed: int, **call: Any
) -> dict[str, Tensor]:
    """LoRA's A as drawn, before later ascent steps move it: read from a twin that takes one step."""
    with LfURegularizer(model, auxiliary(name), alpha=0.05, lam=0.7, seed=seed) as twin:
        twin(model, dict(batch), case.loss, **call)
        return a_matrices_of(twin)


@dataclass
class Pair:
    """A library step and what the oracle says about it."""

    model: nn.Module
    reg: LfURegularizer
    loss: Tensor
    want: oracle.Result

    def backward(self, upstream: float = 1.0) -> None:
        (self.loss * upstream if upstream != 1.0 else self.loss).backward()

    def check(self, upstream: float = 1.0) -> None:
        """Backward, then compare everything."""
        self.backward(upstream)
        assert_same_gradients(gradients_of(self.model), scaled(self.want.gradients, upstream))
        self.check_values()

    def check_values(self) -> None:
        want = self.want
        assert abs(float(self.loss.detach() - want.loss)) <= LOSS_TOLERANCE * max(1.0, abs(float(want.loss)))
        close(self.reg.metrics["loss"], want.loss)
        close(self.reg.metrics["sft_loss"], want.sft_loss)
        close(self.reg.metrics["consistency_loss"], want.consistency, 1e-10)


def run_pair(
    case: Case,
    name: str,
    *,
    reg_options: Mapping[str, Any] | None = None,
    aux_options: Mapping[str, Any] | None = None,
    setup: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    batch: Batch | None = None,
    seed: int | None = None,
    undesirable: Batch | None = None,
    leaves: Sequence[Tensor] = (),
    layers: Sequence[str] | None = None,
    a_matrices: Mapping[str, Tensor] | None = None,
    **common: Any,
) -> Pair:
    """One step of both, before any backward.

    Args:
        case: model, batch and loss.
        name: of the auxiliary.
        reg_options: more arguments of LfURegularizer.
        aux_options: arguments of the auxiliary, which the oracle gets too where it knows them.
        setup: settings of the oracle that differ from the library's.
        model, batch: instead of the case's.
        seed: global random state at the start of each step.
        undesirable: batch for the ascent.
        leaves: trained tensors outside the model.
        layers: the layers that the oracle takes, instead of those the library says it has hooked.
        a_matrices: LoRA's A; None reads them from the library.
        common: settings of both (alpha, lam, reduction, distance, stop_gradient, ascent_steps).
    """
    model = case.make() if model is None else model
    batch = case.batch() if batch is None else batch
    aux_options = dict(aux_options or {})
    common = {"alpha": 0.05, "lam": 0.7, **common}
    before = copy.deepcopy(model)
    reg = LfURegularizer(model, auxiliary(name, **aux_options), **common, **(reg_options or {}))
    if seed is not None:
        torch.manual_seed(seed)
    extra = {} if undesirable is None else {"undesirable": undesirable}
    loss = reg(model, dict(batch), case.loss, **extra)
    known = {k: v for k, v in aux_options.items() if k in oracle.Setup.__dataclass_fields__}
    settings = oracle.Setup(auxiliary=name, channel_axis=case.channel_axis, **{**common, **known, **(setup or {})})
    want = oracle.step(
        before,
        batch,
        case.loss,
        reg.layers if layers is None else layers,
        settings,
        case.mask,
        a_matrices=a_matrices_of(reg) if a_matrices is None else a_matrices,
        undesirable=undesirable,
        leaves=leaves,
        seed=seed,
    )
    return Pair(model, reg, loss, want)
