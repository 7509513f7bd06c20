"""Models whose blocks are checkpointed in every way in which people do it, each beside the same model without."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.support.models import LLAMA
from tests.support.plain_models import ResidualBlock, TinyLM


class PlainLM(TinyLM):
    """Blocks one after the other, nothing checkpointed."""

    def body(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = self.run(block, hidden)
            for norm in self.batch_norms:
                hidden = norm(hidden.flatten(0, 1)).view_as(hidden)
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return block(hidden)


class CheckpointedLM(PlainLM):
    """Every block is run by hand through checkpoint, so that all hooks in and on it are inside the region."""

    use_reentrant = False

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return checkpoint(block, hidden, use_reentrant=self.use_reentrant)


class ReentrantLM(CheckpointedLM):
    use_reentrant = True


class GroupedLM(PlainLM):
    """One checkpoint over all blocks, with hooks in its middle and operations behind the last of them."""

    def body(self, hidden: Tensor) -> Tensor:
        return checkpoint(super().body, hidden, use_reentrant=False)


class NestedLM(CheckpointedLM):
    """Checkpoints inside of a checkpoint."""

    def body(self, hidden: Tensor) -> Tensor:
        return checkpoint(super().body, hidden, use_reentrant=False)


class InnerBlock(ResidualBlock):
    """Checkpoints around the linear maps only: the block's own hooks are outside of them."""

    def forward(self, hidden: Tensor) -> Tensor:
        up = checkpoint(self.up, self.norm(hidden), use_reentrant=False)
        return hidden + checkpoint(lambda x: self.down(self.drop(torch.tanh(x))), up, use_reentrant=False)


class InnerLM(PlainLM):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for block in self.blocks:
            block.__class__ = InnerBlock


class CallCheckpointedLayer(LlamaDecoderLayer):
    """A decoder layer of older transformers: `__call__`, and not `forward`, is checkpointed, with the hooks inside."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caches = dict.fromkeys(kwargs.keys() & {"past_key_value", "past_key_values"})  # the name of 4.51, and today's
        kwargs = {**kwargs, **caches, "use_cache": False}
        return checkpoint(partial(super().__call__, **kwargs), *args, use_reentrant=False)


def call_checkpointed(model: nn.Module) -> nn.Module:
    """Turn a Llama's layers into those of older transformers, in place."""
    for name in LLAMA.layers:
        model.get_submodule(name).__class__ = CallCheckpointedLayer
    return model
