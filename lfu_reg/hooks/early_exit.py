"""Pass 2 leaves the forward after the last layer whose hidden state is wanted, where that cuts nobody's code off.

What is left is on the stack of frames as the last layer ends: the code of torch, transformers and PEFT, which may be
left by an exception, and user code that has nothing to do any more but return. A user's function that goes on to reset
a flag or to clear a list has to run to its end.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lfu_reg.hooks.forward_pass import ForwardPass
from lfu_reg.hooks.gated_hook import Hook

# Whose functions may be left, and whose may not, although they are inside of these packages.
_LIBRARIES = (
    "torch.",
    "transformers.",
    "peft.",
    "lfu_reg.",
    "functools.",
    "accelerate.utils.operations.",
)
_STORES = ("STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "STORE_NAME", "STORE_DEREF", "STORE_SLICE", "DELETE_")
_CONTEXTS = frozenset(("autocast", "enable_grad", "no_sync"))  # whose blocks may be left by an exception
_DOES_SOMETHING = (*_STORES, "YIELD", "IMPORT", "FOR_ITER", "SEND", "PRINT")
_NEVER = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed._composable", "torch.fx", "torch.jit")


class EarlyExit(BaseException):
    """Leaves the forward pass after the last hidden state that is wanted. Not an Exception: no model may swallow it."""


class Exits:
    """Raises `EarlyExit` at the end of the layer whose hidden state was the last one wanted."""

    def __init__(self) -> None:
        self.listening = False
        self.fwd: ForwardPass | None = None  # the pass whose forward is running; `ModelHooks` sets both

    def on_call(self, name: str, compiled: bool, module: nn.Module, *call: Any) -> None:
        """What the hook on layer `name` does."""
        fwd = self.fwd
        if fwd is None or not fwd.leave_after or len(fwd.record.states) < fwd.leave_after or fwd.record.compiled:
            return
        if fwd.is_elsewhere():  # that thread would keep what is switched off
            return
        is_last = type(next(reversed(module._forward_hooks.values()))) is Hook
        if fwd.leave and is_last and way_is_clear(whoever=fwd.leave is True):
            raise EarlyExit
        if fwd.quiet_tail:  # until the loss function returns: nobody differentiates what comes now, and unpacks it
            torch.set_grad_enabled(False)


def call_loss_function(function: Callable[[Any, Any], Tensor], model: Any, batch: Any) -> Tensor:
    """Call it from a frame that is found again when its forward is to be left."""
    return function(model, batch)


def way_is_clear(*, whoever: bool) -> bool:
    """Whether the frames up to the call of the loss function may be left, by `whoever` also if they would go on."""
    if torch_module._global_forward_hooks:
        return False
    for frame in _frames_to_leave():
        name = f"{frame.f_globals.get('__name__', '')}."
        if name.startswith(_NEVER):
            return False
        if whoever:
            continue
        if name == f"{torch_module.__name__}.":
            left = frame.f_locals.get("self")
            # Its pre-hooks have run, and what they opened would stay open.
            if isinstance(left, nn.Module) and any(type(hook) is not Hook for hook in left._forward_hooks.values()):
                return False
        elif not name.startswith(_LIBRARIES) and not only_returns(frame.f_code, frame.f_lasti):
            return False
    return True


def _frames_to_leave() -> Iterator[FrameType]:
    """From the module that called our hook up to the function that called the loss function."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not Hook.__call__.__code__:
        frame = frame.f_back
    frame = None if frame is None else frame.f_back
    while frame is not None and frame.f_code is not call_loss_function.__code__:
        yield frame
        frame = frame.f_back


@functools.lru_cache(maxsize=1024)
def only_returns(code: CodeType, last: int) -> bool:
    """Whether what is left of a function after instruction `last` calls and stores nothing, but for locals."""
    every = list(dis.get_instructions(code))
    names = [i.opname for i in every]  # an `except` would take the exit for a failure
    if "SETUP_FINALLY" in names or names.count("PUSH_EXC_INFO") > names.count("WITH_EXCEPT_START"):
        return False
    # The end of a `with` block is a call as well. An exception makes it, too, but a generator's may have no `finally`.
    instructions = [i for i in every if i.offset > last and i.opname not in ("CACHE", "PRECALL")]
    for number, instruction in enumerate(instructions):
        name = instruction.opname
        if name.startswith("CALL") and not name.startswith("CALL_INTRINSIC"):
            three = [] if _CONTEXTS.isdisjoint(code.co_names) else instructions[max(number - 3, 0) : number]
            if len(three) == 3 and all(i.opname.startswith("LOAD_CONST") and i.argval is None for i in three):
                continue
            return False
        if name.startswith(_DOES_SOMETHING) or "JUMP" in name:
            return False
        if name.startswith(("RETURN", "RAISE", "RERAISE")):
            return True
    return True
