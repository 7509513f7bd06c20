"""torch.compile: what hooks and passes have to know of it.

A hook on a compiled module is traced into its graphs. Outside of a step that is a check of one flag and leaves the
graph whole; in a step the hook is handed on to plain Python, which breaks the graph at every hooked module. Graphs
older than the hooks would ignore them, as torch does not guard empty tables of hooks: they are forgotten as hooks come,
and siblings without hooks get idle ones (`ModelHooks`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

# What torch.compile runs the frames of this thread with: None or False outside of its regions. Private, and torch 2.6
# gives it away without counting the reference, and crashes after some calls.
region: Callable[[], Any] = bool
if torch.__version__ >= "2.7":
    region = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", bool)

FULLGRAPH = (
    "The model is compiled with fullgraph=True, which a step of LfURegularizer cannot keep: its hooks break the graph "
    "at every hooked module. Compile with torch.compile(model) or block by block, `for block in blocks: "
    "block.compile()`. Outside of a step (evaluation, generation, reg.disabled()) graphs stay whole."
)
DONATED = (
    "A graph compiled before this step gives its buffers away during the first backward, but strategy='retained' goes "
    "through it twice. Set torch._functorch.config.donated_buffer = False before the model is compiled, or use "
    "strategy='released'."
)


def holds_compiled(model: nn.Module) -> bool:
    """Whether a module in `model` is compiled for itself."""
    return any(unwrapped(m) is not m or vars(m).get("_compiled_call_impl") is not None for m in model.modules())


def anything_is_compiled(model: nn.Module) -> bool:
    """Whether that is so, or something else was compiled that may call the model, as a loss is."""
    utilities: Any = sys.modules.get("torch._dynamo.utils")
    frames = 0 if utilities is None else utilities.counters["frames"]["total"]
    return frames > 0 or holds_compiled(model)


def unwrapped(model: Any) -> Any:
    """The module that `torch.compile(module)` was given; anything else as it is."""
    return getattr(model, "_orig_mod", model) if type(model).__name__ == "OptimizedModule" else model


@contextmanager
def graphs_for_two_backwards(wanted: bool) -> Iterator[None]:
    """Graphs compiled in the block can be backpropagated more than once, where that is wanted."""
    from torch._functorch import config

    wanted = wanted and hasattr(config, "donated_buffer")
    with config.patch(donated_buffer=False) if wanted else nullcontext():
        yield


def allows_one_backward(error: RuntimeError) -> bool:
    """Whether that is why a backward has failed: a compiled graph gives its buffers away in its first."""
    return "donated buffer" in str(error)


@contextmanager
def failures_explained() -> Iterator[None]:
    """Turn errors of torch.compile that a step causes into ones that name the cure."""
    try:
        yield
    except Exception as error:
        if isinstance(error, torch._dynamo.exc.Unsupported) and "hand_on" in str(error):
            raise RuntimeError(FULLGRAPH) from error
        if isinstance(error, RuntimeError) and allows_one_backward(error):
            raise RuntimeError(DONATED) from error
        raise
