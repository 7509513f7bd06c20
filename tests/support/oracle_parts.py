"""The formulas of the oracle, each as literal as possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tests.support.oracle import Point, Setup


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a layer's output: the tensor itself, or the first item of a container."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output["last_hidden_state"] if "last_hidden_state" in output else hidden_of(next(iter(output.values())))
    return hidden_of(output[0])


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The same output with another hidden state."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, Mapping):
        key = "last_hidden_state" if "last_hidden_state" in output else next(iter(output))
        return type(output)(**{**output, key: hidden})
    changed = [with_hidden(output[0], hidden), *output[1:]]
    return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else getattr(output, "logits", None)


def linear_maps(model: nn.Module, layers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear map in the layers. A PEFT layer is one map, and what it wraps is none."""
    from peft.tuners.lora import layer as lora_layer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper
    from transformers.pytorch_utils import Conv1D

    found: dict[str, tuple[int, int]] = {}
    wrapper_of_a_parameter = getattr(lora_layer, "ParamWrapper", ())  # since PEFT 0.17

    def visit(module: nn.Module, name: str) -> None:
        inner = module
        if isinstance(module, wrapper_of_a_parameter):  # what is inside goes on as it was
            return visit(module.base_layer, f"{name}.base_layer")
        if isinstance(module, BaseTunerLayer):
            inner = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            inner = module.original_module
        block_diagonal = getattr(inner, "n_groups", 1) != 1
        if isinstance(inner, Conv1D):
            found[name] = (inner.weight.shape[0], inner.weight.shape[1])
        elif hasattr(inner, "in_features") and hasattr(inner, "out_features") and not block_diagonal:
            found[name] = (inner.in_features, inner.out_features)
        else:
            assert inner is module
            for child_name, child in module.named_children():
                visit(child, f"{name}.{child_name}")
        return None

    for layer in layers:
        visit(model.get_submodule(layer), layer)
    return found


def no_change(
    model: nn.Module,
    layers: Sequence[str],
    clean: Sequence[tuple[str, Tensor]],
    setup: Setup,
    a_matrices: Mapping[str, Tensor] | None,
    linears: Callable[[str], bool],
) -> Point:
    """The auxiliary components where they change nothing."""
    if setup.auxiliary == "weights":
        return {name: (torch.zeros_like(p),) for name, p in model.named_parameters() if p.requires_grad}
    if setup.auxiliary == "steering":
        return {name: (h.new_zeros(h.shape[setup.for_layer(name).channel_axis]),) for name, h in clean}
    assert a_matrices is not None
    point: Point = {}
    for name, (_, outputs) in linear_maps(model, layers).items():
        if linears(name) and name in a_matrices:
            a = a_matrices[name].detach()
            point[name] = (a, a.new_zeros(outputs, a.shape[0]))
    return point


def ascended(point: Point, gradients: Point, setup: Setup) -> tuple[Point, Tensor]:
    """point + alpha * g / ||g||, with one norm for all or one per layer; and the norm of all."""

    def norm_of(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.flatten() for t in tensors]).norm()

    everything = norm_of([g for gs in gradients.values() for g in gs])
    moved: Point = {}
    for name, components in point.items():
        norm = norm_of(gradients[name]) if setup.norm == "per-layer" else everything
        factor = setup.alpha / norm if norm > 0 else torch.zeros(())
        moved[name] = tuple(c.detach() + factor * g for c, g in zip(components, gradients[name], strict=True))
    return moved, everything


def steered(h: Tensor, d: Tensor, mask: Tensor | None, setup: Setup) -> Tensor:
    """h + d at the tokens that count; relative: ||h|| * normalise(h / ||h|| + d)."""
    axis = setup.channel_axis
    h_last = h.movedim(axis, -1)
    if setup.relative:
        length = h_last.norm(dim=-1, keepdim=True)
        turned = h_last / length + d
        changed = length * turned / turned.norm(dim=-1, keepdim=True)
    else:
        changed = h_last + d
    if mask is not None:
        changed = torch.where(mask[..., None], changed, h_last)
    # Laid out in memory as before: dropout after it draws in the order of memory.
    return torch.empty_like(h).copy_(changed.movedim(-1, axis))


def stopped(clean: Tensor, perturbed: Tensor, setup: Setup) -> tuple[Tensor, Tensor]:
    """The pair with the gradient stopped where the settings say."""
    if setup.stop_gradient == "clean":
        return clean.detach(), perturbed
    if setup.stop_gradient == "perturbed":
        return clean, perturbed.detach()
    assert setup.stop_gradient == "none"
    return clean, perturbed


def _tokens(h: Tensor, mask: Tensor | None, axis: int = -1) -> Tensor:
    h = h.movedim(axis, -1)
    return h.flatten(0, -2) if mask is None else h[mask]  # [tokens, hidden]


def layer_distance(clean: Tensor, perturbed: Tensor, mask: Tensor | None, setup: Setup) -> Tensor:
    """Distance of one layer's hidden states over the tokens that count."""
    h, h_perturbed = _tokens(clean, mask, setup.channel_axis), _tokens(perturbed, mask, setup.channel_axis)
    if h.shape[0] == 0:
        return h_perturbed.sum() * 0
    if callable(setup.distance):
        return setup.distance(h, h_perturbed)
    if setup.distance == "cosine":
        return (1 - (h * h_perturbed).sum(-1) / (h.norm(dim=-1) * h_perturbed.norm(dim=-1))).mean()
    squares = (h_perturbed - h) ** 2
    return squares.mean() if setup.reduction == "mean" else squares.sum(-1).mean()


def kl(clean: Tensor, perturbed: Tensor, mask: Tensor | None) -> Tensor:
    """Eq. 7 at the tokens that count, averaged over them."""
    p = _tokens(clean, mask).softmax(-1)
    q = _tokens(perturbed, mask).softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean()


@contextmanager
def swapped_weights(model: nn.Module, point: Point) -> Iterator[None]:
    """theta + delta in the place of every trainable parameter, tied ones together."""
    moved = {id(p): p + point[name][0] for name, p in model.named_parameters() if name in point}
    places = [(m, key, p) for m in model.modules() for key, p in m._parameters.items() if id(p) in moved]
    try:
        for module, key, parameter in places:
            _put(module, key, moved[id(parameter)])
        yield
    finally:
        for module, key, parameter in places:
            _put(module, key, parameter)


def _put(module: nn.Module, key: str, tensor: Tensor) -> None:
    module._parameters[key] = tensor  # type: ignore[assignment]
    if isinstance(module, nn.RNNBase):  # keeps a second list of its weights, and computes with that
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
