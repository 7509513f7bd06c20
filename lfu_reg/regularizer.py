"""Learning from the Undesirable (Nam, Kim, Jeong; AAAI 2026, arXiv 2511.13052) as one call in a training loop.

pass 1   clean forward                        -> l_SFT (Eq. 1), h (Eq. 3)
         one backward, graph released         -> d l_SFT / d theta, and g = d l_SFT / d theta_aux
ascent   theta_aux <- alpha * g / ||g||          (Eq. 2)
pass 2   perturbed forward of the trunk only  -> h' (Eq. 4)
         l_cons = mean ||detach(h) - h'||^2      (Eq. 5), backward -> d l_cons / d theta
return   l_SFT + lam * l_cons                    (Eq. 6), with these gradients grafted on
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lfu_reg.auxiliaries import Auxiliary, make_auxiliary
from lfu_reg.diagnostics import EVAL_MODE, NO_GRADIENT, UNSCALED_FLOAT16, Diagnostics
from lfu_reg.distances import DistanceChoice, make_distance
from lfu_reg.distances.base import Reduction
from lfu_reg.distributed.engine import Engine
from lfu_reg.distributed.shared_ascent import SharedAscent
from lfu_reg.hooks.forward_pass import Pass
from lfu_reg.model.buffers import on_copies
from lfu_reg.model.compile import entrances, failures_explained, unwrapped
from lfu_reg.model.layers import LayerChoice
from lfu_reg.model.rng import StepDraws, check_seed, random_state_kept
from lfu_reg.model.tokens import TokenMask
from lfu_reg.step import checks, metrics
from lfu_reg.step.attached_model import Attachment
from lfu_reg.step.consistency import consistency, relative_distance
from lfu_reg.step.float16 import LossScales, float16_in_play
from lfu_reg.step.gradient_pass import gradient_pass
from lfu_reg.step.gradients import Strategy
from lfu_reg.step.schedules import Schedule, value_at
from lfu_reg.step.sft_loss import LossFunction, SFTLoss, check_loss_function
from lfu_reg.step.strategy_choice import choose_strategy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
            "distance/<layer>", "relative_distance" (||h' - h|| / ||h||, measured at the first regularized step
            and every 50th), "empty_steps" (how many had no token that counts, so that l_cons = 0), "alpha", "lam".
            Detached tensors on their devices, so reading one is what synchronises.

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
        stop_gradient: Literal["clean", "perturbed", "none"] = "clean",
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
        self.reduction, self.stop_gradient, self.token_mask = reduction, stop_gradient, token_mask
        self.ascent_steps, self.every, self.batch_fraction = ascent_steps, every, batch_fraction
        self.strategy, self.sync_perturbation = strategy, sync_perturbation
        checks.check_terms(
            alpha=self.alpha, lam=self.lam, reduction=reduction, stop_gradient=stop_gradient, strategy=strategy
        )
        checks.check_amounts(ascent_steps=ascent_steps, every=every, batch_fraction=batch_fraction)
        check_seed(seed)
        model = unwrapped(model)
        checks.check_model(model)
        self.seed = torch.initial_seed() % 2**31 if seed is None else int(seed)
        self.metrics: Mapping[str, Any] = {}

        self._steps, self._empty_steps, self._disabled = 0, 0, False
        self._diagnostics, self._scales = Diagnostics(), LossScales()
        self._shared_ascent = SharedAscent(process_group)
        self._attached = Attachment(model, layers, self.auxiliary, self.distance, self._diagnostics)

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
        checks.check_is_attached(model, self._attached.model)
        check_loss_function(sft_loss_fn)
        if not self._is_active():
            return sft_loss_fn(model, batch)
        checks.check_batch(batch)
        self._attached.follow()
        step = self._steps
        alpha, lam = value_at("alpha", self.alpha, step), value_at("lam", self.lam, step)
        if step % self.every or lam == 0:
            loss = checks.check_loss(sft_loss_fn(model, batch), first=step == 0)
            self.metrics = metrics.plain_step(loss, self.metrics, alpha=alpha, lam=lam)
        else:
            try:
                with failures_explained():
                    sft = SFTLoss(sft_loss_fn, model, batch, self.token_mask)
                    loss = self._regularized(sft, undesirable, alpha, lam)
            except BaseException:
                self.auxiliary.reset(torch.Generator)
                raise
            finally:
                self._attached.forget()
        self._steps += 1
        return loss

    def _regularized(self, sft: SFTLoss, undesirable: Any, alpha: float, lam: float) -> Tensor:
        attached, step, turn = self._attached, self._steps, self._steps // self.every
        engine, strategy = self._prepare(sft.model)
        draws = StepDraws(self.seed, step)
        self.auxiliary.reset(draws.generator)

        # Pass 1. theta_aux is at "no change", so the SFT forward is the auxiliary forward, too (Eq. 1, 3) ...
        kept = "detached" if self.stop_gradient == "clean" else "cloned"
        clean = Pass(sft.tokens, capture=kept, observe=undesirable is None, outlives=strategy.keeps_graph)
        clean.replaced = list(self.auxiliary.pass1_patches()) if clean.observe else ()
        with attached.hooks.run(clean):
            shares = strategy.shares_prefix and not engine.in_lockstep
            sft_loss = attached.clean_forward(sft, clean, first=step == 0, shares_prefix=shares)
            leaves = attached.leaves_of(sft_loss, clean)
            attached.check_clean(clean, leaves, sft.model, turn)
            if not strategy.scales_float16 and float16_in_play(clean, [sft_loss, *leaves]):
                self._diagnostics.tell("float16 shards", UNSCALED_FLOAT16)
            # ... and one backward gives d l_SFT / d theta and g = d l_SFT / d theta_aux.
            with on_copies(clean.buffers):
                strategy.backward_clean(sft_loss, leaves, clean, self.auxiliary)
        sft_loss = sft_loss.detach()

        with on_copies(clean.buffers), random_state_kept(attached.devices()):
            # Ascent: theta_aux <- theta_aux + alpha * g / ||g|| (Eq. 2).
            ascent_batch = sft.batch if undesirable is None else undesirable
            gradient_here = partial(gradient_pass, sft, ascent_batch, self.auxiliary, attached.hooks, strategy)
            gradient_norm = self._ascend(alpha, clean.scale if undesirable is None else gradient_here(), engine)
            for _ in range(1, self.ascent_steps):
                self._ascend(alpha, gradient_here(), engine)

            # Pass 2: the hidden states of the undesirable self (Eq. 4) ...
            samples = draws.samples(clean.batch_size, self.batch_fraction)
            tokens = sft.tokens.select(samples)
            perturbed = clean.with_components(tokens, list(self.auxiliary.pass2_patches()))
            attached.replays.prepare(turn, sft, clean, perturbed, samples, engine)
            with self.auxiliary.shards_moved(), attached.replays.running(perturbed):
                attached.check_perturbed(perturbed, clean, samples)
                # ... and their distance to the clean ones (Eq. 5).
                h, h_prime = clean.states, perturbed.states
                l_cons, distances = consistency(
                    self.distance, h, h_prime, samples, reduction=self.reduction, stop_gradient=self.stop_gradient
                )
                if not l_cons.requires_grad:
                    self._diagnostics.tell("no gradient", NO_GRADIENT)
                strategy.backward_perturbed(lam * l_cons)
            # l_SFT + lam * l_cons (Eq. 6).
            with attached.hooks.run(clean):
                loss = strategy.total()

        self._empty_steps += clean.is_empty()
        reached = relative_distance(h, h_prime, samples) if self._diagnostics.is_due(turn) else None
        self._diagnostics.watch(turn, sft_loss, (lam * l_cons).detach(), gradient_norm, reached, alpha)
        self.metrics = metrics.regularized_step(
            loss=loss,
            sft_loss=sft_loss,
            consistency_loss=l_cons,
            ascent_grad_norm=gradient_norm,
            relative_distance=self.metrics.get("relative_distance") if reached is None else reached,
            states=h,
            distances=distances,
            empty_steps=self._empty_steps,
            alpha=alpha,
            lam=lam,
        )
        return loss

    def _prepare(self, model: nn.Module) -> tuple[Engine, Strategy]:
        """What this step runs on, and how its gradients are taken."""
        engine = self._attached.engine_of(model, first=self._steps == 0)
        strategy = choose_strategy(self.strategy, self.stop_gradient, engine, self.auxiliary, self._scales)
        self.auxiliary.shards = engine.shards
        if self.auxiliary.folds:  # looking for compiled modules is a walk over all of them
            self.auxiliary.may_fold = not engine.is_sharded and not entrances(model)
        if self._shares_ascent(engine):
            home = next(iter(self._attached.devices()), torch.device("cpu"))
            self.seed = self._shared_ascent.begin(engine.groups, self.seed, home)
        return engine, strategy

    def _ascend(self, alpha: float, scale: float, engine: Engine) -> Tensor:
        """Eq. 2, along this rank's gradient or along the mean over ranks; returns the norm without `scale`."""
        if self._shares_ascent(engine):
            self.auxiliary.replace_gradients(partial(self._shared_ascent, scale=scale))
            scale = 1.0
        return self.auxiliary.ascend(alpha) / scale

    def _shares_ascent(self, engine: Engine) -> bool:
        # The gradient of FSDP2's shards is a mean over ranks already.
        return self.sync_perturbation and not (self.auxiliary.moves_weights and engine.shards is not None)

    def _is_active(self) -> bool:
        if self._disabled or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return False
        if not (training := self._attached.model.training) and self._steps == 0:
            self._diagnostics.tell("eval mode", EVAL_MODE)
        return training

    # ------------------------------------------------------------------ switching off and on

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Return the plain SFT loss for the block."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue bit for bit: step count, seed of all draws, scales of float16."""
        return {"step": self._steps, "seed": self.seed, "loss_scales": self._scales.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        checks.check_state(state)
        self._steps, self.seed = int(state["step"]), int(state["seed"])
        self._scales.load_state_dict(state.get("loss_scales", {}))
        self._shared_ascent.forget()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the hooked layers."""
        return self._attached.layers

    @property
    def perturbation(self) -> dict[str, Any]:
        """The last step's delta by name: steering d_l [hidden], LoRA (A [r, in], B [out, r]), weights delta [...]."""
        return self.auxiliary.perturbation()

    def remove(self) -> None:
        """Take all hooks off the model. Calling it again does nothing."""
        self._attached.remove()
        self.auxiliary.shards = None
        self.auxiliary.reset(torch.Generator)

    def __enter__(self) -> LfURegularizer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        if self._attached.is_removed:
            return "LfURegularizer(removed)"
        model, listed = type(self._attached.model).__name__, "\n".join(f"    {name}" for name in self.layers)
        return (
            f"LfURegularizer({model}, {self.auxiliary!r}, alpha={self.alpha}, lam={self.lam}, "
            f"distance={self.distance!r}, reduction={self.reduction!r}, stop_gradient={self.stop_gradient!r}, "
            f"ascent_steps={self.ascent_steps}, every={self.every}, batch_fraction={self.batch_fraction}, "
            f"strategy={self.strategy!r}, seed={self.seed}, step={self._steps},\n  {len(self.layers)} "
            f"layers:\n{listed}\n)"
        )
