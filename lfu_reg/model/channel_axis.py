"""Which axis of a layer's output is the hidden one: the last, or the second where convolutions put channels first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from lfu_reg.model.linears import linear_sizes

_CONVOLUTIONS = {
    3: (nn.Conv1d, nn.ConvTranspose1d),
    4: (nn.Conv2d, nn.ConvTranspose2d),
    5: (nn.Conv3d, nn.ConvTranspose3d),
}
# Nodes of the graph, by the beginning of their names, whose output has its hidden axis second, or last.
_SECOND = ("Convolution", "MkldnnConvolution", "NativeGroupNorm", "NativeBatchNorm", "CudnnBatchNorm")
_LAST = ("Addmm", "Mm", "Linear", "NativeLayerNorm", "FusedRmsNorm", "Embedding")
# So many nodes are looked at: what decides is near to the output.
_MOST = 200


def channels_first(layer: nn.Module) -> Callable[[Tensor], bool]:
    """A test of whether an output of `layer` is [batch, hidden, ...] instead of [..., hidden]."""
    # Sizes decide where they can: those of the layer's convolutions, linear maps and norms. Where both readings fit (as
    # many tokens as channels) or neither does, the graph tells which operation made the output; where there is no
    # graph, the layer's more frequent kind of module decides.
    modules = list(layer.modules())
    composite = len(modules) > 1
    grouped = {number for m in modules if (number := _channels_of_norm(m)) is not None}
    linear = [size[1] for m in modules if (size := linear_sizes(m)) is not None]
    linear += [m.normalized_shape[-1] for m in modules if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
    convolutions = {rank: [m for m in modules if isinstance(m, kinds)] for rank, kinds in _CONVOLUTIONS.items()}
    channels = {rank: grouped.union(*(_channels(m, composite) for m in found)) for rank, found in convolutions.items()}
    ties: dict[tuple[int, ...], bool] = {}

    def decide(output: Tensor) -> bool:
        shape, fitting = tuple(output.shape), channels.get(output.dim())
        if fitting is None:
            return False
        first, last = shape[1] in fitting, shape[-1] in linear
        # Channels may be last around a convolution, too, whose input and output are transposed.
        if first != last and not (first and composite and shape[-1] in fitting):
            return first
        if shape not in ties:  # one answer for both passes, whose graphs may differ
            found = convolutions[len(shape)]
            frequent = bool(found) and (len(shape) > 3 or (first and len(found) >= len(linear)))
            made_so = _made_channels_first(output)
            ties[shape] = frequent if made_so is None else made_so
        return ties[shape]

    return decide


def _channels(convolution: Any, composite: bool) -> set[int]:
    # Blocks with a gate have twice the channels inside, and give back what they got.
    return {convolution.out_channels, convolution.in_channels} if composite else {convolution.out_channels}


def _channels_of_norm(module: nn.Module) -> int | None:
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    return module.num_features if isinstance(module, nn.modules.batchnorm._NormBase) else None


def _made_channels_first(output: Tensor) -> bool | None:
    """Whether the nearest operation that has a hidden axis puts it second; None if none is near."""
    last = output.dim() - 1
    # A node, and where axis 1 and the last axis of `output` are in what it returns.
    waiting: deque[tuple[Any, int, int]] = deque([(output.grad_fn, 1, last)])
    seen: set[Any] = set()
    while waiting and len(seen) < _MOST:
        node, second_at, last_at = waiting.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        axis = _hidden_axis(node, last)
        if axis is not None and axis in (second_at, last_at):
            return axis == second_at
        moved = _axes(node, last + 1)
        waiting += ((above, moved[second_at], moved[last_at]) for above in _of_dim(node, last + 1))
    return None


def _hidden_axis(node: Any, last: int) -> int | None:
    """The hidden axis of what a node returns, if it is an operation that has one."""
    name = node.name()
    if name.startswith(_SECOND):
        return 1
    if name.startswith(("View", "UnsafeView", "ReshapeAlias")):  # a linear map of several dimensions is one of two
        above = next(iter(node.next_functions))[0]
        flat = above is not None and above.name().startswith(("Addmm", "Mm"))
        return last if flat and _shape(above, 0)[-1:] == _shape(node, 0)[-1:] else None
    return last if name.startswith(_LAST) else None


def _axes(node: Any, dims: int) -> list[int]:
    """For every axis of what a node returns, which axis of what it was given that is."""
    axes = list(range(dims))
    name = node.name()
    if name.startswith("Permute"):
        return [_signed(d) % dims for d in node._saved_dims]
    if name.startswith("Transpose"):
        one, other = (_signed(d) % dims for d in (node._saved_dim0, node._saved_dim1))
        axes[one], axes[other] = other, one
    return axes


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _of_dim(node: Any, dims: int) -> Iterator[Any]:
    """The nodes that a node takes tensors of so many dimensions from; none for those that reshape."""
    if node.name().startswith(("View", "UnsafeView", "ReshapeAlias")):
        return
    for above, number in node.next_functions:
        if above is not None and len(_shape(above, number)) == dims:
            yield above


def _shape(node: Any, number: int) -> tuple[int, ...]:
    metadata = getattr(node, "_input_metadata", ())
    return tuple(metadata[number].shape) if number < len(metadata) else ()
