"""The forward hooks of one regularizer, and the pass that they serve.

Hooks are registered for the length of a step, so that a model can be saved, scripted, copied and exported between
steps as if nothing was attached. Only where something is compiled they stay, silent: torch.compile does not look for
new hooks. A pass is one object (`ForwardPass`) that is put in `ModelHooks.running` and taken out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lfu_reg.auxiliaries.base import Auxiliary, Call, Tokens
from lfu_reg.hooks.early_exit import Exits
from lfu_reg.hooks.entries import Entries
from lfu_reg.hooks.forward_pass import ForwardPass, State, WriteWatch
from lfu_reg.hooks.gated_hook import Hook, Listener
from lfu_reg.hooks.taps import Gate, tap
from lfu_reg.model import outputs
from lfu_reg.model.autocast import in_float16, without_autocast
from lfu_reg.model.channel_axis import channels_first
from lfu_reg.model.checkpoints import saves_elsewhere
from lfu_reg.model.layers import encoder_and_decoder
from lfu_reg.model.patching import patched

TRANSFORMED = (
    "The model ran inside of a torch.func transform (vmap, grad, jvp), whose tensors do not live beyond it: no hidden "
    "state can be kept for the second pass. Call the model outside of the transform in sft_loss_fn."
)

NESTED = (
    "{!r} returned a nested tensor, whose samples have lengths of their own. Pad them, or hand all tokens to the "
    "layers in one tensor (x.values())."
)


class ModelHooks:
    """The hooks of one regularizer on one model."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        sites: Mapping[str, nn.Module],
        auxiliary: Auxiliary,
        head: nn.Module | None = None,
    ) -> None:
        self.listening = self._recording = False
        self.running: ForwardPass | None = None
        self.overwritten: set[str] | None = None  # layers whose outputs the model changes in place; None: not known yet
        # Gets which positions of the last captured state count, and dl/dh there, once.
        self.look: Callable[[Tokens, Tensor], None] | None = None
        self.captured = {"": head} if head is not None else dict(layers)
        self._model, self._auxiliary, self._sites = model, auxiliary, set(sites)
        self._hooked = {**layers, **sites, **self.captured}
        self._encoder, self._decoder = encoder_and_decoder(model, self._hooked)
        self._channels_first = {name: channels_first(module) for name, module in self._hooked.items()}
        self._exits, self._entries = Exits(), Entries(model, layers, auxiliary)
        self._others: list[tuple[nn.Module, Hook]] = []
        self._handles: list[RemovableHandle] = []
        self._stay = False

    def also(self, modules: Mapping[str, nn.Module], listener: Listener) -> None:
        """Let somebody else listen to some modules, before everybody."""
        self._others += [(module, Hook(listener, name)) for name, module in modules.items()]

    @contextmanager
    def installed(self, *, stay: bool) -> Iterator[None]:
        """Hooks are on the model for the block; with `stay` beyond it and from then on, until `remove()`."""
        if stay and not self._stay:
            self.remove()
            self._stay = True
        if not self._handles:
            self._register()
        try:
            yield
        finally:
            if not self._stay:
                self.remove()

    def remove(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _register(self) -> None:
        add = self._handles.append
        for name, module in self._hooked.items():
            # Before all other hooks, whenever they came: what they capture or change is then downstream of ours.
            add(module.register_forward_hook(Hook(self, name), with_kwargs=True, prepend=True))
        for module, hook in self._others:
            add(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        for name, module in self.captured.items():
            # After all other hooks, so that what they opened around the layer (checkpoint, DDP) is closed.
            add(module.register_forward_hook(Hook(self._exits, name), with_kwargs=True))
        for name, module in self._entries.modules.items():
            add(module.register_forward_pre_hook(Hook(self._entries, name), with_kwargs=True, prepend=True))
        if self._stay:
            # A compiled block shares its graphs with its siblings, and torch tells a module with hooks from one
            # without only where both have some. So every other module of the same classes gets an idle one.
            classes, hooked = {type(m) for m in self._hooked.values()}, set(self._hooked.values())
            for module in self._model.modules():
                if type(module) in classes and module not in hooked:
                    add(module.register_forward_hook(Hook(None, ""), with_kwargs=True))
            torch.compiler.reset()  # one compilation, if there was one

    @contextmanager
    def run(self, fwd: ForwardPass) -> Iterator[ForwardPass]:
        """Let `fwd` be the running pass for the block: its forward, and backwards that repeat parts of it."""
        before, self.running = self.running, fwd
        self._look()
        try:
            with patched(fwd.patches):
                yield fwd
        finally:
            self.running, self._recording = before, False
            self._look()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The running pass's forward is in the block: what happens in it is noted down."""
        self._recording = True
        self._look()
        try:
            yield
        finally:
            self._recording = False
            self._look()

    def _look(self) -> None:
        self.listening = self.running is not None
        for listener in (self._exits, self._entries):
            listener.fwd = self.running if self._recording else None
            listener.listening = listener.fwd is not None

    def on_call(self, name: str, compiled: bool, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """What the hook on `name` does; None leaves the output alone."""
        fwd = self.running
        # Parts of a model that run without gradients (frozen towers, a reference model's pass) have none to offer.
        if fwd is None or output is None or not torch.is_grad_enabled():
            return None
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(TRANSFORMED)
        if self._recording:
            fwd.record.fired[name] += 1
            fwd.record.compiled |= compiled
        path = outputs.locate(output) if name else outputs.locate_logits(output)
        if path is None:
            raise ValueError(
                f"Layer {name!r} returned {outputs.describe(output)}, which holds no floating-point tensor, so there "
                "is no hidden state to compare or to steer. Choose other layers with layers=...."
            )
        y = outputs.get(output, path)
        if y.is_nested:
            raise ValueError(NESTED.format(name))
        fwd.record.float16 = fwd.record.float16 or in_float16(y)
        tokens = self._tokens(name, y, fwd)
        changed = y
        if name in self._sites and (fwd.apply or fwd.observe):
            given = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
            changed = self._at_site(Call(name, module, next(given, None), y, tokens), fwd)
        if name in self.captured and self._recording and fwd.capture is not None:
            changed = self._keep(name, changed, tokens, fwd)
        if changed is y:
            return None
        if module._backward_hooks and not module._is_full_backward_hook:
            fwd.record.old_backward_hooks.append(name)
        return outputs.replace(output, path, changed, (*args, *kwargs.values()))

    def _at_site(self, call: Call, fwd: ForwardPass) -> Tensor:
        with without_autocast(call.y.device.type):
            if fwd.apply:
                return self._auxiliary.apply_at(call)
            if not self._recording:  # a checkpointed block that a backward repeats: its taps are in the graph
                return tap(call.y, fwd.anchor, fwd.gate)
            y = tap(call.y, fwd.anchor, fwd.gate, lambda y: self._auxiliary.observe(replace(call, y=y)))
            if WriteWatch.can_watch(call.y):
                fwd.record.watched.append(WriteWatch(call.name, call.y))
            return y

    def _keep(self, name: str, hidden: Tensor, tokens: Tokens, fwd: ForwardPass) -> Tensor:
        fwd.record.goes_once = fwd.record.goes_once or saves_elsewhere()
        fwd.record.in_thread = fwd.record.in_thread or fwd.is_elsewhere()
        if self.look is not None and not fwd.apply and hidden.grad_fn is not None:
            hidden.grad_fn.register_prehook(partial(self._arrived, tokens, hidden.output_nr, fwd.gate))
        kept = hidden.detach() if fwd.capture == "detached" else hidden
        watch = WriteWatch(name, hidden) if WriteWatch.can_watch(hidden) else None
        copy = fwd.capture == "cloned" or self.overwritten is None or name in self.overwritten or watch is None
        if self._auxiliary.moves_weights:  # a state that is a weight, or a view of one, would move with it
            copy = copy or (hidden if hidden._base is None else hidden._base).is_leaf
        fwd.record.states.append(State(name, kept.clone() if copy else kept, tokens, watch, copy))
        return hidden

    def _arrived(self, tokens: Tokens, number: int, gate: Gate, gradients: tuple[Tensor | None, ...]) -> None:
        """What a backward calls at a captured state, at the last one first."""
        if gate.is_open and self.look is not None and (gradient := gradients[number]) is not None:
            look, self.look = self.look, None
            look(tokens, gradient)

    def _tokens(self, name: str, y: Tensor, fwd: ForwardPass) -> Tokens:
        axis = 1 if self._channels_first[name](y) else -1
        mask, index = fwd.tokens.match(y, axis, encoder=name in self._encoder, decoder=name in self._decoder)
        return Tokens(mask, index, axis)
