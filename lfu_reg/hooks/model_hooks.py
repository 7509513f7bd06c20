"""Forward hooks that are registered once, stay silent outside of a step, and do what the running pass asks for.

Registering and removing hooks at every step would break compiled models and leak on exceptions; here a pass is one
object (`Pass`) that is put in `ModelHooks.running` and taken out again, and a hook that finds none there returns at
once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from lfu_reg.auxiliaries.base import Auxiliary, Call, GradientRule, Tokens
from lfu_reg.auxiliaries.folding import has_acted
from lfu_reg.hooks.early_exit import EarlyExits
from lfu_reg.hooks.forward_pass import Gate, Pass, State
from lfu_reg.hooks.gated_hook import Hook
from lfu_reg.hooks.inplace import WriteWatch
from lfu_reg.hooks.recompute import Repeats
from lfu_reg.model import outputs
from lfu_reg.model.autocast import in_float16, without_autocast
from lfu_reg.model.channel_axis import channels_first
from lfu_reg.model.compile import forget_graphs
from lfu_reg.model.graph import no_view, take_part
from lfu_reg.model.layers import encoder_and_decoder
from lfu_reg.model.patching import substituted

TRANSFORMED = (
    "The model ran inside of a torch.func transform (vmap, grad, jvp), whose tensors do not live beyond it: no hidden "
    "state can be kept for the second pass. Call the model outside of the transform in sft_loss_fn."
)


class ModelHooks:
    """The hooks of one regularizer on one model.

    Args:
        model: the attached model.
        layers: the chosen layers by name; their hidden states are captured.
        sites: where the auxiliary acts, by name.
        auxiliary: theta_aux.
        head: the module whose output holds the logits, if these are compared instead of hidden states.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        sites: Mapping[str, nn.Module],
        auxiliary: Auxiliary,
        head: nn.Module | None = None,
    ) -> None:
        self.listening = False
        self._exits = EarlyExits()
        self.running: Pass | None = None
        self.overwritten: set[str] = set()  # layers whose outputs the model changes in place: these need a copy
        self._auxiliary = auxiliary
        self._sites = set(sites)
        self.captured = {"": head} if head is not None else dict(layers)
        modules = {**layers, **sites, **({"": head} if head is not None else {})}
        self._encoder, self._decoder = encoder_and_decoder(model, modules)
        self._channels_first = {name: channels_first(module) for name, module in modules.items()}
        self._repeats = Repeats(auxiliary, self._look)
        self._handles: list[RemovableHandle] = []
        for name, module in modules.items():
            # First of all hooks, whenever the others came: what they capture or change is then downstream of ours.
            self._handles.append(module.register_forward_hook(Hook(self, name), with_kwargs=True, prepend=True))
        for name, module in self.captured.items():
            # Last of those there are, so that what others opened around the layer (checkpoint, FSDP) is closed.
            self._handles.append(module.register_forward_hook(Hook(self._exits, name), with_kwargs=True))
        # A compiled block shares its graphs with its siblings, and torch tells a module with hooks from one without
        # only where both have some. So every other module of the same classes gets an idle one.
        classes, hooked = {type(module) for module in modules.values()}, set(modules.values())
        for module in model.modules():
            if type(module) in classes and module not in hooked:
                self._handles.append(module.register_forward_hook(Hook(None, ""), with_kwargs=True))
        forget_graphs()

    def remove(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.captured = [], {}
        self._repeats.possible = False

    @contextmanager
    def run(self, this: Pass) -> Iterator[Pass]:
        """Let `this` be the running pass for the block, whatever happens in it."""
        before, self.running = self.running, this
        self._look()
        try:
            with self._repeats.prepared(this), substituted(this.replaced):
                yield this
        finally:
            this.recording = this.gate.is_open = False
            this.taps.clear()
            self.running = before
            self._look()

    def _look(self) -> None:
        self.listening = self.running is not None or bool(self._repeats.running)
        self._exits.running = self.running
        self._exits.listening = self.running is not None and self.running.stop_after is not None

    def on_call(self, name: str, compiled: bool, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """What the hook on `name` does; None leaves the output alone."""
        this, auxiliary = self.running, self._auxiliary
        if self._repeats.running:
            this, auxiliary = self._repeats.running.get(threading.get_ident(), (this, auxiliary))
        # Parts of a model that run without gradients (frozen towers, a reference model's pass) have none to offer.
        if this is None or output is None or not torch.is_grad_enabled():
            return None
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(TRANSFORMED)
        if this.recording:
            this.fired[name] += 1
            this.compiled |= compiled
        path = outputs.locate(output) if name else outputs.locate_logits(output)
        if path is None:
            raise ValueError(
                f"Layer {name!r} returned {outputs.describe(output)}, which holds no floating-point tensor, so there "
                "is no hidden state to compare or to steer. Choose other layers with layers=...."
            )
        y = outputs.get(output, path)
        if not this.float16 and in_float16(y):
            this.float16 = True
        tokens = self._tokens(name, y, this)
        changed = y
        if name in self._sites and (this.apply or this.observe):
            changed = self._at_site(Call(name, module, _first_input(args, kwargs), y, tokens), this, auxiliary)
        if name in self.captured and this.recording and this.capture is not None:
            self._keep(name, changed, tokens, this)
        return None if changed is y else outputs.replace(output, path, changed, (*args, *kwargs.values()))

    def _at_site(self, call: Call, this: Pass, auxiliary: Auxiliary) -> Tensor:
        if has_acted(call.module):
            return call.y
        with without_autocast(call.y.device.type):
            if this.apply:
                return auxiliary.apply_at(call)
            y = no_view(call.y) if call.y.requires_grad else take_part(call.y, this.anchor)
            if this.recording:
                y.register_hook(_tap(auxiliary.observe(call), this.gate))  # type: ignore[no-untyped-call]
                if this.outlives:
                    this.taps.append(get_gradient_edge(y))
                if y is not call.y and WriteWatch.can_watch(call.y):
                    this.watched.append(WriteWatch(call.name, call.y))
            return y

    def _keep(self, name: str, hidden: Tensor, tokens: Tokens, this: Pass) -> None:
        kept = hidden.detach() if this.capture == "detached" else hidden
        if name in self.overwritten or this.capture == "cloned":
            kept = kept.clone()
        this.states.append(State(name, kept, tokens, kept._version))

    def _tokens(self, name: str, y: Tensor, this: Pass) -> Tokens:
        axis = 1 if self._channels_first[name](y) else -1
        mask, index = this.tokens.match(y, axis, encoder=name in self._encoder, decoder=name in self._decoder)
        return Tokens(mask, index, axis)


def _tap(rule: GradientRule | None, gate: Gate) -> Callable[[Tensor], None]:
    def tap(grad_y: Tensor) -> None:
        if gate.is_open and rule is not None:
            collected = rule(grad_y)
            if gate.finite is not None:
                gate.finite += [torch.isfinite(c).all() for c in collected if c is not None]

    return tap


def _first_input(args: Any, kwargs: Any) -> Tensor | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None
