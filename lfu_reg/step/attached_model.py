"""What a regularizer has attached to a model, and what it has learnt of it that outlives a step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor, nn

from lfu_reg.auxiliaries import Auxiliary, Tokens
from lfu_reg.auxiliaries.return_checks import checked_sites
from lfu_reg.diagnostics import Diagnostics
from lfu_reg.distances.base import Distance
from lfu_reg.distributed.ddp import Wrappers
from lfu_reg.distributed.engine import Engine, engine_of
from lfu_reg.distributed.tensor_parallel import differ_between_ranks
from lfu_reg.hooks.coverage import Coverage, Targets
from lfu_reg.hooks.forward_pass import ForwardPass
from lfu_reg.hooks.model_hooks import ModelHooks
from lfu_reg.model.compile import anything_is_compiled
from lfu_reg.model.layers import LayerChoice, choose_layers, is_preset
from lfu_reg.model.module_state import ModuleState
from lfu_reg.model.rng import devices_of
from lfu_reg.model.tokens import COUNTED_BUT_IGNORED, ignored_but_counted
from lfu_reg.step import checks, loss_checks
from lfu_reg.step.reused_blocks import ReusedBlocks

SHARED = (
    "{} was given to another LfURegularizer since, and would move the weights of that one's model. Give each "
    "regularizer an auxiliary of its own."
)
REMOVED = "This LfURegularizer was removed from its model. Create a new one: LfURegularizer(model, ...)."
TWICE = (
    "{} already has an LfURegularizer attached, and two would perturb each other's passes. Call remove() on the first "
    "one, or use it as a context manager."
)

# Which modules somebody regularizes, without a note on the modules themselves.
_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[AttachedModel]] = weakref.WeakKeyDictionary()


class AttachedModel:
    """One regularizer on one model."""

    layers: tuple[str, ...]
    modules: dict[str, nn.Module]
    hooks: ModelHooks
    reused: ReusedBlocks

    def __init__(
        self, model: nn.Module, choice: LayerChoice, auxiliary: Auxiliary, distance: Distance, diagnostics: Diagnostics
    ) -> None:
        check_is_free(model)
        self._model: nn.Module | None = model
        self._choice, self._auxiliary, self._diagnostics = choice, auxiliary, diagnostics
        self._on_logits = distance.measures == "logits"
        self.wrappers = Wrappers()
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        chosen = choose_layers(model, self._choice, self._diagnostics.warn_once)
        sites = checked_sites(self._auxiliary, model, chosen)
        checks.check_no_scripts(chosen)
        self.layers, self.modules = tuple(chosen), chosen
        self.hooks = ModelHooks(model, chosen, sites, self._auxiliary, head=model if self._on_logits else None)
        at_sites = sites if self._auxiliary.acts_at_sites and not self._on_logits else None
        # Not a method: hooks that stay on blocks would keep this object alive, and no other one could take over.
        self.devices = partial(devices_of, tuple(chosen.values()))
        self.reused = ReusedBlocks(model, self.layers, at_sites, self.devices)
        self.hooks.also(self.reused.blocks, self.reused)
        if anything_is_compiled(model):
            with self.hooks.installed(stay=True):
                pass
        self.coverage = Coverage(self.layers, sites, self._diagnostics)
        self._targets = Targets(model, [*chosen, *sites, *self.reused.blocks])
        self.state = ModuleState(model)
        self.has_run = False  # whether a step has found its layers
        self.repeats = False  # whether pass 2 was seen to have pass 1's states where nothing is perturbed
        self.may_be_thrifty = True  # whether the loss has taken no gradients of its own in pass 2 so far
        for module in (model, *chosen.values()):
            _attached[module] = weakref.ref(self)
        self._finalizer = weakref.finalize(self, self.hooks.remove)  # hooks that stay, if nobody calls `remove()`

    def follow(self, *, first: bool) -> None:
        """Hook what is there now, where adapters came around hooked modules or were merged, or blocks were added."""
        if self._targets.were_replaced():
            self._let_go()
            self._attach(self.model)
        if first:
            checks.check_weights(self.model)
        if not self._auxiliary.is_attached_to(self.model):
            raise RuntimeError(SHARED.format(self._auxiliary))

    def _let_go(self) -> None:
        self._finalizer()
        for module in [module for module, owner in _attached.items() if owner() is self]:
            del _attached[module]

    def remove(self) -> None:
        """Take all hooks off the model, and let go of it."""
        if self._model is None:
            return
        self._let_go()
        self._auxiliary.detach(self._model)
        self._model, self.modules = None, {}
        del self.state, self.hooks, self.reused, self.devices, self._targets

    @property
    def is_removed(self) -> bool:
        """Whether `remove()` was called."""
        return self._model is None

    @property
    def model(self) -> nn.Module:
        """The attached model."""
        if self._model is None:
            raise RuntimeError(REMOVED)
        return self._model

    def engine_of(self, model: nn.Module) -> Engine:
        """The engine that spreads the model over processes."""
        return engine_of(model, self.model, self.modules.values())

    def check_clean(self, clean: ForwardPass, leaves: Sequence[Tensor], model: nn.Module, turn: int) -> None:
        """Look at pass 1: whether what was hooked ran, with something to train and tokens that count."""
        record = clean.record
        if all(leaf is clean.anchor for leaf in leaves):
            raise loss_checks.nothing_trainable(model)
        checks.check_not_written(watch.name for watch in record.watched if watch.was_written)
        ran, named = {state.name for state in record.states}, not is_preset(self._choice)
        checks.check_layers_ran(self.hooks.captured, ran, named=named)
        self.coverage.check(clean, model)
        hidden_states = [state.hidden for state in record.states]
        checks.check_token_mask(clean.tokens, hidden_states)
        if not self.has_run and differ_between_ranks(hidden_states, leaves):  # which communicates
            raise ValueError(checks.SLICES)
        if self._diagnostics.is_due(turn) and (message := checks.masks_without_effect(clean.tokens, hidden_states)):
            self._diagnostics.warn_once("no mask", message)
        self.has_run = True

    def compare_with_loss(self, turn: int, batch: Iterable[Tensor]) -> None:
        """Have the coming backward look, where that is due, whether the loss ignores positions that count."""
        self.hooks.look = None
        if self._on_logits or not self._diagnostics.is_due(turn) or not (targets := checks.shapes_of_targets(batch)):
            return

        def look(tokens: Tokens, gradient: Tensor) -> None:
            positions = (gradient != 0).any(tokens.axis)
            if tokens.index is None and tuple(positions.shape) in targets:
                ignored, counted = ignored_but_counted(positions)
                if 0 < ignored < counted:
                    self._diagnostics.warn_once("no mask", COUNTED_BUT_IGNORED.format(ignored=ignored, counted=counted))

        self.hooks.look = look


def is_attached(model: nn.Module) -> bool:
    """Whether a regularizer that somebody still holds is attached to a part of the model."""
    return any(ref() is not None for module in model.modules() if (ref := _attached.get(module)) is not None)


def check_is_free(model: nn.Module) -> None:
    """Raise if a regularizer that somebody still holds is attached to a part of the model."""
    if is_attached(model):
        gc.collect()  # one that nobody holds any more may wait for it
        if is_attached(model):
            raise RuntimeError(TWICE.format(type(model).__name__))
