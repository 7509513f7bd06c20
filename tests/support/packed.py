"""A linear map whose weight is packed bytes: no `.weight`, nothing to train, as quantised kernels have it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """y = W x + b with W stored as unsigned bytes and a scale per row.

    Args:
        linear: whose weight is packed.
        compute: dtype of the product; what comes out has the dtype of what went in.
        sizes: names of the attributes that hold the sizes.
    """

    def __init__(
        self,
        linear: nn.Linear,
        compute: torch.dtype | None = None,
        sizes: tuple[str, str] = ("in_features", "out_features"),
    ) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", ((weight / scale).round() + 128).to(torch.uint8).flatten())  # no shape to read
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.compute = compute
        setattr(self, sizes[0], linear.in_features)
        setattr(self, sizes[1], linear.out_features)

    def unpacked(self) -> Tensor:
        return (self.packed.view(len(self.scale), -1).to(self.scale.dtype) - 128) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute or x.dtype
        y = x.to(dtype) @ self.unpacked().to(dtype).t()
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def pack(model: nn.Module, make: Callable[[nn.Linear], nn.Module] = PackedLinear) -> nn.Module:
    """Pack every linear map of the blocks, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, make(module))
    return model


def unpack(model: nn.Module) -> nn.Module:
    """The same model with frozen nn.Linear again, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            weight = module.unpacked()
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype).requires_grad_(False)
            linear.weight.copy_(weight)
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, linear)
    return model
