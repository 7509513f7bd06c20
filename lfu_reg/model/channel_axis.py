"""Which axis of a layer's output is the hidden one: the last, or the second where convolutions put channels first."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lfu_reg.model.linears import linear_sizes

_CONVOLUTIONS = {
    3: (nn.Conv1d, nn.ConvTranspose1d),
    4: (nn.Conv2d, nn.ConvTranspose2d),
    5: (nn.Conv3d, nn.ConvTranspose3d),
}


def channels_first(layer: nn.Module) -> Callable[[Tensor], bool]:
    """A test of whether an output of `layer` is [batch, hidden, ...] instead of [..., hidden]."""
    # Sizes decide where they can: those of the layer's convolutions, linear maps and norms. Where both readings fit (as
    # many tokens as channels) or neither does, what the layer is made of decides.
    modules = list(layer.modules())
    composite = len(modules) > 1
    grouped = {m.num_channels for m in modules if isinstance(m, nn.GroupNorm)}
    grouped |= {m.num_features for m in modules if isinstance(m, nn.modules.batchnorm._NormBase)}
    linear = [size[1] for m in modules if (size := linear_sizes(m)) is not None]
    normed = [m.normalized_shape[-1] for m in modules if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
    convolutions = {rank: [m for m in modules if isinstance(m, kinds)] for rank, kinds in _CONVOLUTIONS.items()}
    # Blocks with a gate have twice the channels inside, and give back what they got.
    sizes = ("out_channels", "in_channels") if composite else ("out_channels",)
    channels = {
        rank: grouped.union(getattr(m, size) for m in found for size in sizes) for rank, found in convolutions.items()
    }

    def decide(output: Tensor) -> bool:
        shape, fitting = tuple(output.shape), channels.get(output.dim())
        if not fitting:
            return False
        first, last = shape[1] in fitting, shape[-1] in (*linear, *normed)
        # Channels may be last around a convolution, too, whose input and output are transposed.
        if first != last and not (first and composite and shape[-1] in fitting):
            return first
        # Of sequences: a norm over the last axis shows where channels are, and else the more frequent kind of module.
        convolve = len(convolutions[len(shape)]) >= len(linear) and shape[-1] not in normed
        return bool(convolutions[len(shape)]) and (len(shape) > 3 or (first and convolve))

    return decide
