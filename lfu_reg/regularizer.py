"""Learning from the Undesirable (Nam, Kim, Jeong; AAAI 2026, arXiv 2511.13052) as one call in a training loop.

pass 1   clean forward                        -> l_SFT (Eq. 1), h (Eq. 3)
         one backward, graph released         -> d l_SFT / d theta, and g = d l_SFT / d theta_aux
ascent   theta_aux <- alpha * g / ||g||          (Eq. 2)
pass 2   perturbed forward of the trunk only  -> h' (Eq. 4)
         l_cons = mean ||detach(h) - h'||^2      (Eq. 5), backward -> d l_cons / d theta
return   l_SFT + lam * l_cons                    (Eq. 6), with these gradients grafted on
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lfu_reg import checks
from lfu_reg.adapters import virtual_tokens
from lfu_reg.auxiliaries import Auxiliary, make_auxiliary
from lfu_reg.buffers import BufferWatch, on_copies
from lfu_reg.compiled import failures_explained, graphs_for_two_backwards, unwrapped
from lfu_reg.consistency import consistency, relative_distance
from lfu_reg.diagnostics import Diagnostics
from lfu_reg.distances import DistanceChoice, make_distance
from lfu_reg.distances.base import Reduction
from lfu_reg.distributed.ddp import Wrappers
from lfu_reg.distributed.engine import Engine, engine_of
from lfu_reg.distributed.shared_ascent import SharedAscent
from lfu_reg.firing import Firing
from lfu_reg.graph import leaves_of
from lfu_reg.hooks import ModelHooks, Pass, State
from lfu_reg.layers import LayerChoice, choose_layers
from lfu_reg.loss_scale import LossScales
from lfu_reg.places import Places
from lfu_reg.randomness import RandomState, StepDraws, devices_of
from lfu_reg.replays import Replays
from lfu_reg.schedules import Schedule, check_schedule, value_at
from lfu_reg.strategies import Strategy
from lfu_reg.strategy_choice import choose_strategy
from lfu_reg.tokens import TokenMask, TokenMasks
from lfu_reg.trunk import Trunk, select_samples

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

StopGradient: TypeAlias = Literal["clean", "perturbed", "none"]
LossFunction: TypeAlias = Callable[[Any, Any], Tensor]

NO_GRADIENT = (
    "The consistency term has no gradient: no trainable parameter lies before the chosen layers, so it changes the "
    "loss's value and trains nothing. Choose later layers, or train earlier ones."
)
EVAL_MODE = (
    "LfURegularizer was called on a model in eval mode with gradients enabled: it returns the plain SFT loss there. "
    "Call model.train() to have the regularizer applied."
)


class LfURegularizer:
    """Keeps a model's hidden states consistent with those of its undesirable self, during supervised fine-tuning.

        reg = LfURegularizer(model)
        for batch in loader:
            loss = reg(model, batch, sft_loss_fn)  # was: loss = sft_loss_fn(model, batch)
            loss.backward()
            optimizer.step(); optimizer.zero_grad()
        reg.remove()

    Args:
        model: any module; forward hooks are registered on it. Wrap it (PEFT, DDP, FSDP, compile) before or after.
        auxiliary: theta_aux: "lora", "steering", "weights", "random" or an `Auxiliary` object.
        layers: K, the layers whose hidden states are compared and (but for "weights") perturbed; see `choose_layers`.
        alpha: length of the ascent step (Eq. 2), or a callable of the step number. None: the paper's value.
        lam: lambda, the weight of the consistency term (Eq. 6), or a callable of the step number. None: the paper's.
        reduction: "mean" or "sum" over the hidden dimension. The paper's lambda belongs to "mean"; "sum" is Eq. 5 to
            the letter.
        distance: "mse", "cosine", "contrastive", "logit_kl", a `Distance`, or a function of (clean, perturbed), both
            [tokens, hidden], that returns a scalar.
        stop_gradient: which hidden states are detached: "clean" (Eq. 5), "perturbed" (the authors' steering code) or
            "none".
        token_mask: tensor shaped like the token dimensions (nonzero counts), or a callable of the batch that returns
            one. None: `labels != -100` where the batch has labels of that shape, else `attention_mask`, else every
            position, with a warning if that counts what one of the masks leaves out.
        ascent_steps: steps of length alpha toward the undesirable. Each one after the first evaluates the gradient
            again, at the perturbed point, for one more call of `sft_loss_fn` and its backward.
        every: apply the regularizer at every k-th step only.
        batch_fraction: part of the samples that pass 2 runs on, drawn at random: an unbiased estimate for less time.
        strategy: "released", "retained" (see `strategies.py`) or "auto": released where it can work.
        seed: of LoRA's A, random directions and drawn samples, which depend on (seed, step) alone. None: torch's
            initial seed.
        sync_perturbation: in distributed training, ascend along the gradient averaged over ranks. By default every rank
            perturbs the model along the gradient of its own samples.
        process_group: the ranks to average over. None: those that DDP or FSDP spreads batches over, else all.

    Attributes:
        layers: names of the hooked layers.
        metrics: figures of the last step: "loss", "sft_loss", "consistency_loss", "ascent_grad_norm",
            "distance/<layer>", "relative_distance" (||h' - h|| / ||h||, measured at the first step and every 50th),
            "empty_steps" (how many had no token that counts, so that l_cons = 0), "alpha", "lam". Detached tensors on
            their devices, so reading one is what synchronises.

    Raises:
        TypeError, ValueError: for settings out of range, or layers that do not exist; the message lists what there is.
        RuntimeError: if a regularizer is attached already.
    """

    def __init__(
        self,
        model: nn.Module,
        auxiliary: str | Auxiliary = "lora",
        *,
        layers: LayerChoice = "all",
        alpha: Schedule | None = None,
        lam: Schedule | None = None,
        reduction: Reduction = "mean",
        distance: DistanceChoice = "mse",
        stop_gradient: StopGradient = "clean",
        token_mask: TokenMask | None = None,
        ascent_steps: int = 1,
        every: int = 1,
        batch_fraction: float = 1.0,
        strategy: Literal["auto", "released", "retained"] = "auto",
        seed: int | None = None,
        sync_perturbation: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.auxiliary = make_auxiliary(auxiliary)
        self.distance = make_distance(distance)
        self.alpha: Schedule = self.auxiliary.default_alpha if alpha is None else alpha
        self.lam: Schedule = self.auxiliary.default_lam if lam is None else lam
        check_schedule("alpha", self.alpha)
        check_schedule("lam", self.lam)
        checks.check_one_of("reduction", reduction, ("mean", "sum"))
        checks.check_one_of("stop_gradient", stop_gradient, ("clean", "perturbed", "none"))
        checks.check_one_of("strategy", strategy, ("auto", "released", "retained"))
        checks.check_count("ascent_steps", ascent_steps)
        checks.check_count("every", every)
        checks.check_fraction("batch_fraction", batch_fraction)
        if strategy == "released" and stop_gradient != "clean":
            raise ValueError(
                f"strategy='released' frees the graph of the clean pass, through which stop_gradient={stop_gradient!r} "
                "sends gradients. Use strategy='auto' or 'retained'."
            )
        model = unwrapped(model)
        checks.check_model(model)
        self.reduction, self.stop_gradient, self.token_mask = reduction, stop_gradient, token_mask
        self.ascent_steps, self.every, self.batch_fraction = ascent_steps, every, batch_fraction
        self.strategy = strategy
        self.seed = torch.initial_seed() % 2**31 if seed is None else int(seed)
        self.sync_perturbation = sync_perturbation
        self.metrics: Mapping[str, Any] = {}

        self._choice = layers
        self._named = not isinstance(layers, str) or layers not in ("all", "early", "middle", "late")
        self._model: nn.Module | None = model
        self._diagnostics = Diagnostics()
        self._steps = self._empty_steps = 0
        self._disabled = False
        self._wrappers = Wrappers()
        self._shared_ascent = SharedAscent(process_group)
        self._scales = LossScales()
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        chosen = choose_layers(model, self._choice)
        sites = self.auxiliary.sites(model, chosen)
        on_logits = self.distance.measures == "logits"
        checks.check_no_scripts(chosen)
        self.layers, self._modules = tuple(chosen), chosen
        self._hooks = ModelHooks(model, chosen, sites, self.auxiliary, head=model if on_logits else None)
        self._trunk = Trunk(model, [] if on_logits else self.layers, self._devices)
        self._replays = Replays(self._hooks, self._trunk, self._diagnostics)
        self._firing = Firing(self.layers, sites, self._diagnostics)
        self._places = Places(model, [*chosen, *sites, *self._trunk.names])

    def _follow(self, model: nn.Module) -> None:
        """Hook what is there now, where adapters were put around the hooked modules or merged into them."""
        if self._places.are_taken():
            self._hooks.remove()
            self._trunk.remove()
            self._attach(model)

    # ------------------------------------------------------------------ the step

    def __call__(self, model: Any, batch: Any, sft_loss_fn: LossFunction, *, undesirable: Any = None) -> Tensor:
        """The LfU loss of one batch.

        Args:
            model: the attached module, or any wrapper of it; passed on to `sft_loss_fn`.
            batch: whatever `sft_loss_fn` takes; it is not changed.
            sft_loss_fn: callable of (model, batch) that returns the scalar SFT loss. It runs once, except that each
                ascent step on other data or at a perturbed point runs it again.
            undesirable: another batch, from which the ascent direction is taken instead.

        Returns:
            Scalar l_SFT + lam * l_cons, differentiable once. In eval mode, with gradients disabled, and in
            `disabled()`: the plain SFT loss.

        Raises:
            TypeError, ValueError: for a model, batch or loss that cannot be used; the message says why and what helps.
            RuntimeError: after `remove()`, for layers that do not run, and for reentrant checkpointing.
        """
        attached = self._attached()
        checks.check_is_attached(model, attached)
        if not self._is_active(attached):
            return sft_loss_fn(model, batch)
        checks.check_batch(batch)
        self._follow(attached)
        step = self._steps
        alpha, lam = value_at("alpha", self.alpha, step), value_at("lam", self.lam, step)
        if step % self.every or lam == 0:
            loss = checks.check_loss(sft_loss_fn(model, batch), first=step == 0)
            self.metrics = {"loss": loss.detach(), "sft_loss": loss.detach(), "alpha": alpha, "lam": lam}
        else:
            try:
                with failures_explained():
                    loss = self._regularized(model, batch, sft_loss_fn, undesirable, alpha, lam)
            except BaseException:
                self.auxiliary.reset(torch.Generator)
                raise
            finally:
                self._trunk.forget()
        self._steps += 1
        return loss

    def _regularized(
        self, model: Any, batch: Any, sft_loss_fn: LossFunction, undesirable: Any, alpha: float, lam: float
    ) -> Tensor:
        attached, step = self._attached(), self._steps
        if step == 0:
            checks.check_resident(attached)
        engine = engine_of(model, attached, self._modules.values())
        strategy = choose_strategy(self.strategy, self.stop_gradient, engine, self.auxiliary, self._scales)
        self.auxiliary.shards = engine.shards
        if self._shares_ascent(engine):
            self.seed = self._shared_ascent.begin(engine.groups, self.seed, self._devices()[0])
        tokens = self._token_masks(model, batch)
        again = copy.copy(batch)  # the loss function may take entries out of the batch
        draws = StepDraws(self.seed, step)
        self.auxiliary.reset(draws.generator)
        watch, random_start = BufferWatch(attached), RandomState.capture(self._devices())

        # Pass 1. theta_aux is at "no change", so the SFT forward is the auxiliary forward, too (Eq. 1, 3) ...
        clean = Pass(
            tokens,
            observe=undesirable is None,
            capture="detached" if self.stop_gradient == "clean" else "cloned",
            outlives=strategy.keeps_graph,
        )
        with self._hooks.run(clean):
            with (
                self._trunk.recording(),
                graphs_for_two_backwards(strategy.keeps_graph),
                self._wrappers.must_run(model, attached),
            ):
                sft_loss = checks.check_loss(sft_loss_fn(model, batch), first=step == 0)
            clean.recording = False
            clean.buffers += watch.changed()
            leaves = leaves_of(sft_loss)
            checks.check_trainable(leaves, clean.anchor)
            checks.check_layers_ran(self._hooks.captured, {state.name for state in clean.states}, named=self._named)
            self._firing.check(clean, model)
            hidden_states = [state.hidden for state in clean.states]
            checks.check_token_mask(tokens, hidden_states)
            if self._diagnostics.is_due(step) and (
                message := checks.masks_without_effect(tokens, hidden_states, self._trunk.arguments())
            ):
                self._diagnostics.tell("no mask", message)
            # ... and one backward gives d l_SFT / d theta and g = d l_SFT / d theta_aux.
            with on_copies(clean.buffers):
                strategy.backward_clean(sft_loss, leaves, clean, self.auxiliary)
        sft_loss, scale = sft_loss.detach(), clean.scale

        with on_copies(clean.buffers), self._random_state_kept():
            # Ascent: theta_aux <- theta_aux + alpha * g / ||g|| (Eq. 2).
            ascent_batch = again if undesirable is None else undesirable
            if undesirable is not None:
                random_start.restore()
                scale = self._gradient_here(model, copy.copy(ascent_batch), sft_loss_fn, strategy)
            gradient_norm = self._ascend(alpha, scale, engine)
            for _ in range(1, self.ascent_steps):
                random_start.restore()
                scale = self._gradient_here(model, copy.copy(ascent_batch), sft_loss_fn, strategy)
                self._ascend(alpha, scale, engine)

            # Pass 2: the hidden states of the undesirable self (Eq. 4), and their distance to the clean ones (Eq. 5).
            batch_size = clean.states[0].hidden.shape[0]
            samples = draws.samples(batch_size, self.batch_fraction)

            def loss_function() -> None:
                random_start.restore()
                part = copy.copy(again) if samples is None else select_samples(again, samples, batch_size)
                sft_loss_fn(model, part)

            part_tokens = tokens if samples is None else tokens.select(samples)
            self._replays.prepare(step, model, clean, part_tokens, samples, loss_function, engine)
            undesirable_self = Pass(
                part_tokens,
                apply=True,
                capture="attached",
                replaced=list(self.auxiliary.replacements()),
                buffers=clean.buffers,
                outlives=strategy.keeps_graph,
            )
            with self.auxiliary.shards_moved(), self._replays.running(undesirable_self) as perturbed:
                checks.check_same_layers([s.name for s in clean.states], [s.name for s in perturbed.states])
                if samples is None:
                    self._firing.compare(clean, perturbed)
                l_cons, per_layer = consistency(
                    self.distance,
                    clean.states,
                    perturbed.states,
                    samples,
                    reduction=self.reduction,
                    stop_gradient=self.stop_gradient,
                )
                if not l_cons.requires_grad:
                    self._diagnostics.tell("no gradient", NO_GRADIENT)
                # l_SFT + lam * l_cons (Eq. 6).
                loss = strategy.total(lam * l_cons)

        self._empty_steps += all(state.tokens.is_empty() for state in clean.states)
        distance = (
            relative_distance(clean.states, perturbed.states, samples) if self._diagnostics.is_due(step) else None
        )
        self._diagnostics.watch(step, sft_loss, (lam * l_cons).detach(), gradient_norm, distance, alpha)
        self.metrics = {
            "loss": loss.detach(),
            "sft_loss": sft_loss,
            "consistency_loss": l_cons.detach(),
            "ascent_grad_norm": gradient_norm,
            "relative_distance": self.metrics.get("relative_distance") if distance is None else distance,
            **{f"distance/{name}": value for name, value in zip(_numbered(clean.states), per_layer, strict=True)},
            "empty_steps": self._empty_steps,
            "alpha": alpha,
            "lam": lam,
        }
        return loss

    def _gradient_here(self, model: Any, batch: Any, sft_loss_fn: LossFunction, strategy: Strategy) -> float:
        """The gradient g at the present theta_aux by a pass of its own: for other data, and for later ascent steps.

        Returns:
            What g is multiplied by (see `loss_scale.py`).
        """
        checks.check_batch(batch)
        self.auxiliary.require_gradients(True)
        moved = list(self.auxiliary.replacements())
        this = Pass(self._token_masks(model, batch), apply=True, capture=None, replaced=moved)
        with self.auxiliary.shards_moved(), self._hooks.run(this):
            loss = checks.check_loss(sft_loss_fn(model, batch), first=self._steps == 0)
            this.recording = False
            strategy.backward_explicit(loss, this, self.auxiliary)
        self.auxiliary.require_gradients(False)
        return this.scale

    def _ascend(self, alpha: float, scale: float, engine: Engine) -> Tensor:
        """Eq. 2, along this rank's gradient or along the mean over ranks; returns the norm without `scale`."""
        if self._shares_ascent(engine):
            self.auxiliary.replace_gradients(partial(self._shared_ascent, scale=scale))
            scale = 1.0
        return self.auxiliary.ascend(alpha) / scale

    def _shares_ascent(self, engine: Engine) -> bool:
        # The gradient of FSDP2's shards is a mean over ranks already.
        return self.sync_perturbation and not (self.auxiliary.moves_weights and engine.shards is not None)

    def _token_masks(self, model: nn.Module, batch: Any) -> TokenMasks:
        return TokenMasks(batch, self.token_mask, virtual_tokens(model))

    @contextmanager
    def _random_state_kept(self) -> Iterator[None]:
        """The caller's random stream goes on where pass 1 left it, whatever the block draws."""
        after_clean = RandomState.capture(self._devices())
        try:
            yield
        finally:
            after_clean.restore()

    def _devices(self) -> list[torch.device]:
        return devices_of(self._modules.values())

    def _is_active(self, attached: nn.Module) -> bool:
        if self._disabled or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return False
        if not attached.training and self._steps == 0:
            self._diagnostics.tell("eval mode", EVAL_MODE)
        return attached.training

    def _attached(self) -> nn.Module:
        if self._model is None:
            raise RuntimeError(
                "This LfURegularizer was removed from its model. Create a new one: LfURegularizer(model, ...)."
            )
        return self._model

    # ------------------------------------------------------------------ switching off and on

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Return the plain SFT loss for the block."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs to continue bit for bit: the step count, and the seed of all draws."""
        return {"step": self._steps, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a `state_dict`."""
        missing = {"step", "seed"} - set(state)
        if missing:
            raise ValueError(
                f"The state has entries {sorted(state)}; it needs 'step' and 'seed', as LfURegularizer.state_dict() "
                "gives them."
            )
        self._steps, self.seed = int(state["step"]), int(state["seed"])
        self._shared_ascent.forget()

    @property
    def perturbation(self) -> dict[str, Any]:
        """The last step's delta by name: steering d_l [hidden], LoRA (A [r, in], B [out, r]), weights delta [...]."""
        return self.auxiliary.perturbation()

    def remove(self) -> None:
        """Take all hooks off the model. Calling it again does nothing."""
        self._hooks.remove()
        self._trunk.remove()
        self._model, self._modules, self.auxiliary.shards = None, {}, None
        self.auxiliary.reset(torch.Generator)

    def __enter__(self) -> LfURegularizer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        if self._model is None:
            return "LfURegularizer(removed)"
        listed = "\n".join(f"    {name}" for name in self.layers)
        return (
            f"LfURegularizer({type(self._model).__name__}, {self.auxiliary!r}, alpha={self.alpha}, lam={self.lam}, "
            f"distance={self.distance!r}, reduction={self.reduction!r}, stop_gradient={self.stop_gradient!r}, "
            f"ascent_steps={self.ascent_steps}, every={self.every}, batch_fraction={self.batch_fraction}, "
            f"strategy={self.strategy!r}, seed={self.seed}, step={self._steps},\n  {len(self.layers)} "
            f"layers:\n{listed}\n)"
        )


def _numbered(states: Sequence[State]) -> list[str]:
    """Names of the states; a layer that ran several times gets numbers behind its name."""
    names = [state.name for state in states]
    seen: dict[str, int] = {}
    numbered = []
    for name in names:
        seen[name] = seen.get(name, -1) + 1
        label = name or "logits"
        numbered.append(f"{label}[{seen[name]}]" if names.count(name) > 1 else label)
    return numbered
