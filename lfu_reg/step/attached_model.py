"""What a regularizer has attached to a model: hooks on the chosen layers, and what follows from where these are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.diagnostics import Diagnostics
from lfu_reg.distances.base import Distance
from lfu_reg.distributed.ddp import Wrappers
from lfu_reg.distributed.engine import Engine, engine_of
from lfu_reg.hooks.coverage import Firing
from lfu_reg.hooks.forward_pass import Pass
from lfu_reg.hooks.model_hooks import ModelHooks
from lfu_reg.hooks.targets import Places
from lfu_reg.model.buffers import ForwardWatch
from lfu_reg.model.compile import graphs_for_two_backwards
from lfu_reg.model.graph import leaves_of
from lfu_reg.model.layers import LayerChoice, choose_layers, is_preset
from lfu_reg.model.rng import devices_of
from lfu_reg.step import checks
from lfu_reg.step.chain import Chain
from lfu_reg.step.float16 import float16_in_play
from lfu_reg.step.replays import Replays
from lfu_reg.step.sft_loss import SFTLoss
from lfu_reg.step.shared_backward import shared_prefix
from lfu_reg.step.trunk import Trunk

SHARED = (
    "{} was given to another LfURegularizer since, and would move the weights of that one's model. Give each "
    "regularizer an auxiliary of its own."
)
REMOVED = "This LfURegularizer was removed from its model. Create a new one: LfURegularizer(model, ...)."


class Attachment:
    """One regularizer on one model.

    Args:
        model: any module.
        choice: see `choose_layers`.
        auxiliary: theta_aux, which says where it acts.
        distance: says whether it compares hidden states or the model's logits.
        diagnostics: told what looks wrong.

    Attributes:
        layers: names of the chosen layers.
        modules: the chosen layers by name.
        hooks: capture hidden states, and run the model with theta_aux in place.
        trunk: records calls in pass 1.
        chain: records the calls of layers in pass 1.
        replays: repeats one of them in pass 2.

    Raises:
        ValueError: for layers that do not exist or cannot be hooked.
    """

    layers: tuple[str, ...]
    modules: dict[str, nn.Module]
    hooks: ModelHooks
    trunk: Trunk
    chain: Chain
    replays: Replays

    def __init__(
        self,
        model: nn.Module,
        choice: LayerChoice,
        auxiliary: Auxiliary,
        distance: Distance,
        diagnostics: Diagnostics,
    ) -> None:
        self._model: nn.Module | None = model
        self._choice, self._auxiliary, self._diagnostics = choice, auxiliary, diagnostics
        self._on_logits = distance.measures == "logits"
        self._wrappers = Wrappers()
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        chosen = choose_layers(model, self._choice, self._diagnostics.tell)
        sites = self._auxiliary.sites(model, chosen)
        checks.check_no_scripts(chosen)
        self.layers, self.modules = tuple(chosen), chosen
        self.hooks = ModelHooks(model, chosen, sites, self._auxiliary, head=model if self._on_logits else None)
        self.trunk = Trunk(model, [] if self._on_logits else self.layers, self.devices)
        at_sites = sites if self._auxiliary.acts_at_sites and not self._on_logits else None
        self.chain = Chain(model, self.layers, at_sites, self.devices)
        self.replays = Replays(self.hooks, self.trunk, self.chain, self._diagnostics)
        self._site_names = tuple(sites)
        self._firing = Firing(self.layers, sites, self._diagnostics)
        self._places = Places(model, [*chosen, *sites, *self.trunk.names, *self.chain.names])

    def follow(self) -> None:
        """Hook what is there now, where adapters came around hooked modules or were merged, or blocks were added.

        Raises:
            RuntimeError: if the auxiliary belongs to another regularizer by now.
        """
        if self._places.are_taken():
            self.hooks.remove()
            self.trunk.remove()
            self.chain.remove()
            self._attach(self.model)
        if not self._auxiliary.serves(self.model):
            raise RuntimeError(SHARED.format(self._auxiliary))

    def forget(self) -> None:
        """Let go of the inputs of a step."""
        self.trunk.forget()
        self.chain.forget()
        self.replays.forget()

    def remove(self) -> None:
        """Take all hooks off the model, and let go of it."""
        self.hooks.remove()
        self.trunk.remove()
        self.chain.remove()
        self.replays.remove()
        self._places.forget()
        if self._model is not None:
            self._auxiliary.let_go(self._model)
        self._model, self.modules = None, {}

    @property
    def is_removed(self) -> bool:
        """Whether `remove()` was called."""
        return self._model is None

    @property
    def model(self) -> nn.Module:
        """The attached model.

        Raises:
            RuntimeError: after `remove()`.
        """
        if self._model is None:
            raise RuntimeError(REMOVED)
        return self._model

    def devices(self) -> list[torch.device]:
        """The devices that the chosen layers compute on."""
        return devices_of(self.modules.values())

    def engine_of(self, model: nn.Module, *, first: bool) -> Engine:
        """The engine that spreads the model over processes.

        Args:
            model: what the user trains, the attached module or a wrapper of it.
            first: whether this is the first step, at which offloaded weights are looked for.

        Raises:
            ValueError: for trainable weights that are offloaded, and for a DeepSpeed engine.
        """
        if first:
            checks.check_resident(self.model)
        return engine_of(model, self.model, self.modules.values())

    def clean_forward(self, sft: SFTLoss, clean: Pass, *, first: bool, shares_prefix: bool) -> Tensor:
        """The forward of pass 1, with everything noted down that later passes are to repeat or to leave alone.

        Args:
            sft: the loss function of the step.
            clean: the running pass.
            first: whether this is the first step, at which the loss's value is checked as well.
            shares_prefix: whether pass 2 may start behind what no perturbation reaches.

        Returns:
            l_SFT with its graph.

        Raises:
            TypeError, ValueError: for a loss that cannot be used, or that did not come through DDP's wrapper.
        """
        watch = ForwardWatch(self.model)
        with (
            self.trunk.recording(),
            self.chain.recording(shares_prefix and self.replays.can_shorten),
            graphs_for_two_backwards(clean.outlives),
            self._wrappers.must_run(sft.model, self.model),
        ):
            loss = sft.clean(self.devices(), first=first)
        clean.recording = False
        buffers, weights = watch.changed()
        clean.buffers += buffers
        if weights:  # pass 2 writes to them as well, before the prefix, whose backward waits, has used them
            self.chain.forget()
        return loss

    def leaves_of(self, sft_loss: Tensor, clean: Pass) -> list[Tensor]:
        """The leaves of pass 1's graph, of which `clean` is given the prefix if there is one to share.

        Args:
            sft_loss: scalar with the graph of pass 1.
            clean: the pass, after its forward.

        Raises:
            RuntimeError: if the graph holds a reentrant checkpoint.
        """
        cut = self.chain.cut
        # A site that fired more often is shared with another layer, perhaps below the cut.
        once = all(clean.fired[name] <= 1 for name in self._site_names)
        if cut is not None and once and self.chain.is_whole() and self.trunk.runs_once_and_bare():
            prefix = shared_prefix(sft_loss, cut, clean.anchor)
            leaves = [] if prefix is None else [*prefix.above, *prefix.below]
            # A scaled loss may have to be backpropagated again, which the part that waits would not follow.
            if prefix is not None and not float16_in_play(clean, [sft_loss, *leaves]):
                clean.prefix = prefix
                return leaves
        self.chain.forget()  # it holds on to the graph
        return leaves_of(sft_loss)

    def check_clean(self, clean: Pass, leaves: Sequence[Tensor], model: nn.Module, turn: int) -> None:
        """Look at pass 1: whether what was hooked ran, with something to train and tokens that count.

        Args:
            clean: the pass, after its forward.
            leaves: what its loss depends on.
            model: what the user trains, the attached module or a wrapper of it.
            turn: number of the step among those that `every` leaves.

        Raises:
            ValueError: if the loss trains nothing, or if the user's token mask fits no hidden state.
            RuntimeError: for layers that did not run, or ran without their hooks, or whose outputs were written to past
                the hooks.
        """
        checks.check_trainable(leaves, clean.anchor)
        checks.check_not_written(watch.name for watch in clean.watched if watch.was_written)
        ran, named = {state.name for state in clean.states}, not is_preset(self._choice)
        checks.check_layers_ran(self.hooks.captured, ran, named=named)
        self._firing.check(clean, model)
        hidden_states = [state.hidden for state in clean.states]
        checks.check_token_mask(clean.tokens, hidden_states)
        if self._diagnostics.is_due(turn) and (
            message := checks.masks_without_effect(clean.tokens, hidden_states, self.trunk.arguments())
        ):
            self._diagnostics.tell("no mask", message)

    def check_perturbed(self, perturbed: Pass, clean: Pass, samples: Tensor | None) -> None:
        """Look at pass 2: whether the same ran as in pass 1.

        Args:
            perturbed: pass 2, after its forward.
            clean: pass 1.
            samples: the samples of the batch that pass 2 ran on, None for all.

        Raises:
            RuntimeError: if other layers ran.
        """
        checks.check_same_layers([state.name for state in clean.states], [state.name for state in perturbed.states])
        if samples is None:
            self._firing.compare(clean, perturbed)
