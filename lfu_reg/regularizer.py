"""Learning from the Undesirable (Nam, Kim, Jeong; AAAI 2026, arXiv 2511.13052) as one call in a training loop.

pass 1   sft_loss_fn(model, batch)               -> l_SFT (Eq. 1), h (Eq. 3)
         one backward, graph released            -> d l_SFT / d theta, and g = d l_SFT / d theta_aux
ascent   theta_aux <- alpha * g / ||g||          (Eq. 2)
pass 2   sft_loss_fn again, with theta_aux moved -> h' (Eq. 4)
         l_cons = mean ||detach(h) - h'||^2      (Eq. 5), backward -> d l_cons / d theta
return   l_SFT + lam * l_cons                    (Eq. 6), with these gradients
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from lfu_reg.auxiliaries import Auxiliary, AuxiliaryName, acting_in, make_auxiliary
from lfu_reg.diagnostics import Diagnostics
from lfu_reg.distances import DistanceChoice, make_distance
from lfu_reg.distances.base import Reduction
from lfu_reg.model.compile import failures_explained, unwrapped
from lfu_reg.model.layers import LayerChoice, choose_layers
from lfu_reg.model.rng import check_seed
from lfu_reg.model.tokens import TokenMask
from lfu_reg.step import checks, loss_checks, metrics
from lfu_reg.step.ascent import Ascent
from lfu_reg.step.attached_model import AttachedModel
from lfu_reg.step.consistency import consistency, displacement
from lfu_reg.step.controls import Controls
from lfu_reg.step.passes import Passes
from lfu_reg.step.progress import Progress
from lfu_reg.step.settings import Schedule, Settings, StopGradient, StrategyName
from lfu_reg.step.sft_loss import LossFunction, PlainSFT, SFTLoss
from lfu_reg.step.strength import StepStrength


class LfURegularizer(Controls):
    """Keeps a model's hidden states consistent with those of its undesirable self, during supervised fine-tuning.

        reg = LfURegularizer(model)
        for batch in loader:
            loss = reg(model, batch, sft_loss_fn)  # was: loss = sft_loss_fn(model, batch)
            loss.backward()
            optimizer.step(); optimizer.zero_grad()
        reg.remove()

    `sft_loss_fn` runs twice per regularized step, as a closure does under SAM: once plainly, and once with the model
    perturbed, since only your own code knows all that surrounds the model's call. So it has to repeat: what it draws
    from torch's, numpy's and Python's global generators, and what the model's modules keep, is put back for it; data,
    counters and generators of its own belong outside. Where it does not repeat, that step is plain SFT, with a warning.

    Args:
        model: any module. Wrap it (PEFT, DDP, FSDP, compile) before or after.
        auxiliary: theta_aux: "lora" (steering where no linear map is), "steering", "weights", "random", an `Auxiliary`.
        layers: K, the layers whose hidden states are compared and (but for "weights") perturbed; see `choose_layers`.
        strength: length of lam * l_cons's gradient in lengths of l_SFT's; sets lam. None: 1, where lam is not given.
        alpha: length of the ascent step (Eq. 2). None: what `displacement` asks for; the paper's value beside lam.
        lam: lambda, the weight of the consistency term (Eq. 6), instead of `strength`. All three may be callables of
            the step number.
        displacement: relative length ||h' - h|| / ||h|| that alpha is set for; more where rounding is coarser.
        reduction: "mean" (the paper's lambda) or "sum" (Eq. 5 to the letter) over the hidden dimension.
        distance: "mse", "cosine", "contrastive", "logit_kl", a `Distance`, or a function of (clean, perturbed), both
            [tokens, hidden], that returns a scalar.
        stop_gradient: which hidden states are detached: "clean" (Eq. 5), "perturbed" (the authors' steering code, which
            moves the model toward its undesirable self: steering at strength 1 took the task's loss of a 2.2 M model to
            11.0 instead of 3.9) or "none".
        token_mask: tensor shaped like the token dimensions (nonzero counts), or a callable of the batch that returns
            one. None: labels that are not ignored, where the attention mask allows, else every position.
        ignore_index: the label that the loss ignores, besides negative ones.
        ascent_steps: steps toward the undesirable, each with a call of `sft_loss_fn` of its own after the first.
        every: apply the regularizer at every k-th step only.
        batch_fraction: part of the samples that pass 2 runs on, drawn at random: an unbiased estimate for less time.
        strategy: "released", "retained" (`step/gradients.py`), "one-backward" (`step/one_backward.py`), or "auto".
        leave_early: whether pass 2 leaves your code after the last chosen layer: "auto" where nothing but a return is
            cut off, True always, False never.
        seed: of LoRA's A, random directions and drawn samples. None: torch's initial seed.
        sync_perturbation: ascend along the gradient averaged over ranks, not each along its own.
        process_group: the ranks to average over. None: those that DDP or FSDP spreads batches over, else all.

    Attributes:
        layers: names of the hooked layers.
        metrics: figures of the last step (see `step/metrics.py`), detached tensors on their devices.

    Raises:
        TypeError, ValueError: for settings out of range, or layers that do not exist; the message lists what there is.
        RuntimeError: if a regularizer that is still in use is attached already.
    """

    def __init__(
        self,
        model: nn.Module,
        auxiliary: AuxiliaryName | Auxiliary = "lora",
        *,
        layers: LayerChoice = "all",
        strength: Schedule | None = None,
        alpha: Schedule | None = None,
        lam: Schedule | None = None,
        displacement: float = 1e-2,
        reduction: Reduction = "mean",
        distance: DistanceChoice = "mse",
        stop_gradient: StopGradient = "clean",
        token_mask: TokenMask | None = None,
        ignore_index: int = -100,
        ascent_steps: int = 1,
        every: int = 1,
        batch_fraction: float = 1.0,
        strategy: StrategyName = "auto",
        leave_early: Literal["auto"] | bool = "auto",
        seed: int | None = None,
        sync_perturbation: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        made, self.distance, self._diagnostics = make_auxiliary(auxiliary), make_distance(distance), Diagnostics()
        checks.check_model(model := unwrapped(model))
        self.auxiliary = acting_in(choose_layers(model, layers), made, auxiliary, self._diagnostics)
        strength = 1.0 if strength is None and lam is None else strength
        alpha = self.auxiliary.default_of("alpha") if strength is None and alpha is None else alpha
        terms = (alpha, lam, strength, displacement, reduction, stop_gradient, token_mask, ignore_index)
        self.settings = Settings(*terms, ascent_steps, every, batch_fraction, strategy, leave_early, sync_perturbation)
        check_seed(seed)
        self._disabled, self._progress = False, Progress(seed, self.settings)
        self._ascent = Ascent(self.auxiliary, self.settings, self._progress, process_group)
        self._attached = AttachedModel(model, layers, self.auxiliary, self.distance, self._diagnostics)

    @_disable_dynamo  # a compiled training step has a break here
    def __call__(self, model: Any, batch: Any, sft_loss_fn: LossFunction, *, undesirable: Any = None) -> Tensor:
        """The LfU loss of one batch.

        Args:
            model: the attached module, or any wrapper of it; passed on to `sft_loss_fn`.
            batch: whatever `sft_loss_fn` takes; its containers are copied for the second call.
            sft_loss_fn: callable of (model, batch) that returns the scalar SFT loss. It runs twice, and once more for
                each ascent step on other data, at a perturbed point or through second derivatives.
            undesirable: another batch, from which the ascent direction is taken instead.

        Returns:
            Scalar l_SFT + lam * l_cons, differentiable once. In eval mode, with gradients disabled, and in
            `disabled()`: the plain SFT loss.

        Raises:
            TypeError, ValueError: for a model, batch or loss that cannot be used; the message says why and what helps.
            RuntimeError: after `remove()`, for layers that do not run, and for reentrant checkpointing.
        """
        checks.check_is_attached(model, self._attached.model)
        loss_checks.check_loss_function(sft_loss_fn, model)
        if not self._is_active():
            return sft_loss_fn(model, batch)
        checks.check_batch(batch)
        self._attached.follow(first=self._progress.step == 0)
        progress, trained = self._progress, [p for p in model.parameters() if p.requires_grad]
        progress.step = step = progress.begin(trained, batch)
        strength = progress.strength.at(step)
        try:
            if not strength.is_off:
                strength.engine = self._attached.engine_of(model)
            with failures_explained(), loss_checks.errors_explained(), strength.together(self._attached.devices()):
                if strength.is_off or progress.waits():
                    raise PlainSFT(loss_checks.check_loss(sft_loss_fn(model, batch), model, first=step == 0))
                sft = SFTLoss(sft_loss_fn, model, batch, self.settings.token_mask, self.settings.ignore_index)
                loss = self._regularized(sft, trained, undesirable, strength)
        except PlainSFT as plain:
            loss = plain.loss
            terms = {"loss": loss, "sft_loss": loss, "consistency_loss": torch.zeros_like(loss)}
            self.metrics = metrics.of_step(terms, progress, strength)
        except BaseException:
            self.auxiliary.reset(torch.Generator)
            raise
        progress.step = step + 1
        return loss

    def _regularized(self, sft: SFTLoss, trained: list[Tensor], undesirable: Any, strength: StepStrength) -> Tensor:
        progress, settings, diagnostics = self._progress, self.settings, self._diagnostics
        passes = Passes(self._attached, self.auxiliary, sft, trained, settings, strength, progress, diagnostics)
        self._ascent.begin(passes.engine, self._attached.devices())
        with passes.running(progress.generators()):
            # Pass 1. theta_aux is at "no change", so the SFT forward is the auxiliary forward, too (Eq. 1, 3), and one
            # backward gives d l_SFT / d theta and g = d l_SFT / d theta_aux.
            sft_loss, h = passes.first(observe=undesirable is None)
            samples = passes.samples()
            # Ascent: theta_aux <- theta_aux + alpha * g / ||g|| (Eq. 2).
            gradient_norm = self._ascent(strength.alpha, passes, undesirable)
            # Pass 2: the hidden states of the undesirable self (Eq. 4), and their distance to the clean ones (Eq. 5).
            if strength.searches:
                strength.alpha = passes.find_alpha(samples)
            with passes.second(samples) as h_prime:
                l_cons, distances = consistency(self.distance, h, h_prime, samples, settings)
                strength.moved = displacement(h, h_prime, samples) if strength.is_due else None
                passes.backward(l_cons)
            # l_SFT + lam * l_cons (Eq. 6).
            loss = passes.total()
            progress.empty_steps += (empty := passes.clean.record.is_empty())
            look = strength.look(tokens_count=not empty, sensible_alpha=lambda: passes.sensible_alpha(samples))
            diagnostics.watch(progress.step // settings.every, sft_loss, l_cons.detach(), gradient_norm, look)
        terms = {"loss": loss, "sft_loss": sft_loss, "consistency_loss": l_cons, "ascent_grad_norm": gradient_norm}
        self.metrics = metrics.of_step(terms, progress, strength, h, distances)
        return loss
