"""Tiny models from torch.nn alone, at module level so that they can be pickled."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn


class FailingBackward(torch.autograd.Function):
    """Passes a tensor on, and raises KeyError in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise KeyError("backward")


class ResidualBlock(nn.Module):
    """Pre-norm residual block with dropout, the smallest thing that looks like a transformer block."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(self.drop(torch.tanh(self.up(self.norm(hidden)))))


class TinyLM(nn.Module):
    """Token model of residual blocks with causal mixing, head and optional BatchNorm; every part is plain torch."""

    def __init__(
        self,
        vocab: int = 13,
        width: int = 8,
        depth: int = 3,
        dropout: float = 0.0,
        batch_norm: bool = False,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, dropout) for _ in range(depth))
        self.norm = nn.BatchNorm1d(width) if batch_norm else nn.LayerNorm(width)
        self.batch_norms = nn.ModuleList([nn.BatchNorm1d(width)] if batch_norm else [])
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def body(self, hidden: Tensor) -> Tensor:
        steps = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype, device=hidden.device)
        for block in self.blocks:
            hidden = block(hidden.cumsum(1) / steps[:, None])  # every token sees the ones before it
            for norm in self.batch_norms:
                hidden = norm(hidden.flatten(0, 1)).view_as(hidden)
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(input_ids)))


class ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class TinyCNN(nn.Module):
    """Convolutions with BatchNorm; channels first, widths change with depth."""

    def __init__(self, widths: tuple[int, ...] = (3, 4, 6, 6), classes: int = 5) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.stages = nn.Sequential(*(ConvBlock(a, b) for a, b in pairs))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.stages(pixels).mean((2, 3)))


class EncoderClassifier(nn.Module):
    """nn.TransformerEncoder with padding, classification from the first token."""

    def __init__(self, vocab: int = 19, width: int = 8, depth: int = 3, classes: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        layer = nn.TransformerEncoderLayer(width, 2, 12, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)[:, 0])


class LSTMStack(nn.Module):
    """One-layer LSTMs in a list, each of which returns (output, (h, c))."""

    def __init__(self, vocab: int = 13, width: int = 6, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.lstms = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(depth))
        self.head = nn.Linear(width, vocab)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for lstm in self.lstms:
            hidden, _ = lstm(hidden)
        return self.head(hidden)
