"""What several ranks have to give together, computed by one process.

`expected` asks the literal oracle for every rank's batch and averages; `train` runs the library itself on one copy of
the model per rank, without any engine, and averages their gradients by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from tests.distributed.launch import RANKS
from tests.support import oracle
from tests.support.cases import Batch, Case
from tests.support.compare import Gradients, gradients_of
from tests.support.harness import auxiliary

SETTINGS = {"alpha": 0.05, "lam": 0.7}
Optimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def mean(per_rank: Sequence[Gradients]) -> dict[str, Tensor | None]:
    """The average over ranks; a missing gradient counts as zero, and stays missing where no rank has one."""
    result: dict[str, Tensor | None] = {}
    for name in per_rank[0]:
        given = [g for gradients in per_rank if (g := gradients[name]) is not None]
        result[name] = torch.stack(given).sum(0) / len(per_rank) if given else None
    return result


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of all ranks' samples."""
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def expected(
    case: Case, name: str, a_matrices: Sequence[Mapping[str, Tensor]], *, shared: bool = False, **settings: Any
) -> dict[str, Tensor | None]:
    """The oracle's gradients of one step from the case's model, rank r having batch number r.

    Args:
        case: model, batches and loss.
        name: of the auxiliary.
        a_matrices: every rank's LoRA A.
        shared: whether all ranks ascend along the gradient of all samples.
        settings: of the oracle.
    """
    model, batches = case.make(), [case.batch(rank) for rank in range(RANKS)]
    setup = oracle.Setup(auxiliary=name, **{**SETTINGS, **settings})
    return mean(
        [
            oracle.step(
                model,
                batch,
                case.loss,
                case.layers,
                setup,
                case.mask,
                a_matrices=a_matrices[rank],
                undesirable=joined(batches) if shared else None,
            ).gradients
            for rank, batch in enumerate(batches)
        ]
    )


def train(
    case: Case,
    name: str,
    *,
    steps: int = 3,
    micro: int = 1,
    make: Callable[[], nn.Module] | None = None,
    optimizer: Optimizer | None = None,
    clip: float | None = None,
    batch_of: Callable[[int, int], Batch] | None = None,
    extra: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """Train with the library on every rank's batches; returns the last gradients, and the parameters.

    Args:
        case: model, batches and loss.
        name: of the auxiliary.
        steps: optimizer steps.
        micro: batches per step, over which the loss is averaged.
        make: another model than the case's.
        optimizer: of the parameters; None is none.
        clip: norm to clip to.
        batch_of: (rank, number of the micro-batch) -> batch; None is the case's.
        extra: arguments of the regularizer's call.
        options: of the regularizer.
    """
    batch_of = batch_of or (lambda rank, number: case.batch(10 * number + rank))
    model = (make or case.make)()
    models = [model, *(copy.deepcopy(model) for _ in range(RANKS - 1))]
    regs = [regularizer(m, name, **options) for m in models]
    optimizers = [optimizer(list(m.parameters())) if optimizer else None for m in models]
    gradients: dict[str, Tensor | None] = {}
    for step in range(steps):
        for rank, (m, reg) in enumerate(zip(models, regs, strict=True)):
            m.zero_grad()
            for number in range(step * micro, (step + 1) * micro):
                (reg(m, batch_of(rank, number), case.loss, **(extra or {})) / micro).backward()
        gradients = mean([gradients_of(m) for m in models])
        for m, opt in zip(models, optimizers, strict=True):
            for parameter_name, parameter in m.named_parameters():
                if (gradient := gradients.get(parameter_name)) is not None:
                    parameter.grad = gradient.clone()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(m.parameters(), clip)
            if opt is not None:
                opt.step()
    return gradients_of(models[0]) if clip is not None else gradients, parameters_of(models[0])


def regularizer(model: nn.Module, name: str, **options: Any) -> LfURegularizer:
    """With small steps and a fixed seed."""
    aux = name if name == "random" else auxiliary(name)
    return LfURegularizer(model, aux, **{**SETTINGS, "seed": 3, **options})


def both_terms(
    case: Case, name: str, a_matrices: Sequence[Mapping[str, Tensor]], **settings: Any
) -> tuple[list[Gradients], list[Gradients]]:
    """Every rank's gradients of l_SFT and of l_cons, rank r having batch number r, by the oracle."""
    sft, consistency = [], []
    much = 1e4  # so that the gradient of l_cons is no small difference
    for rank in range(RANKS):
        found = []
        for lam in (0.0, much):
            setup = oracle.Setup(auxiliary=name, **{**SETTINGS, **settings, "lam": lam})
            step = oracle.step(
                case.make(), case.batch(rank), case.loss, case.layers, setup, case.mask, a_matrices=a_matrices[rank]
            )
            found.append({key: g for key, g in step.gradients.items() if g is not None})
        sft.append(found[0])
        consistency.append({key: (g - found[0].get(key, 0.0)) / much for key, g in found[1].items()})
    return sft, consistency


def length(gradients: Gradients) -> float:
    """Of all of them together."""
    return float(torch.cat([g.flatten() for g in gradients.values() if g is not None]).norm())


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
