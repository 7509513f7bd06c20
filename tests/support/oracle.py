"""The slow, literal LfU step in three separate forwards, as the paper reads. It shares no code with the library.

    1. forward -> l_SFT
    2. forward with auxiliary components as leaves at "no change" -> g by autograd
       delta = alpha * g / ||g||   (Eq. 2)
    3. forward with delta -> h';   l_cons (Eq. 5);   l_SFT + lam * l_cons (Eq. 6)
    gradients of everything by one autograd call

It runs on a deep copy of the model, so that nothing here can disturb what is compared with it. Which tokens of which
layer count is an argument: the tests say it by hand for every model.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import oracle_parts as parts

Loss = Callable[[Any, Mapping[str, Any]], Tensor]
Mask = Callable[[Mapping[str, Any], str], "Tensor | None"]
Point = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Setup:
    """The step's settings, in the names of the public API."""

    auxiliary: str = "steering"
    alpha: float = 0.1
    lam: float = 0.1
    reduction: str = "mean"
    distance: str | Callable[[Tensor, Tensor], Tensor] = "mse"
    stop_gradient: str = "clean"
    ascent_steps: int = 1
    scale: float = 2.0  # LoRA: lora_alpha / rank
    relative: bool = False
    norm: str = "global"
    tokens: str = "masked"
    channel_axis: int | Callable[[str], int] = -1  # or of the layer's name, where layers differ

    def for_layer(self, name: str) -> Setup:
        """The same with the channel axis of one layer."""
        axis = self.channel_axis
        return self if isinstance(axis, int) else dataclasses.replace(self, channel_axis=axis(name))


@dataclass(frozen=True)
class Result:
    """What a step has to give."""

    loss: Tensor
    sft_loss: Tensor
    consistency: Tensor
    gradients: dict[str, Tensor | None]
    leaf_gradients: list[Tensor | None]
    delta: Point
    ascent_norm: Tensor
    layer_distances: list[Tensor]


def step(
    model: nn.Module,
    batch: Mapping[str, Any],
    sft_loss_fn: Loss,
    layers: Sequence[str],
    setup: Setup,
    mask: Mask,
    *,
    a_matrices: Mapping[str, Tensor] | None = None,
    undesirable: Mapping[str, Any] | None = None,
    leaves: Sequence[Tensor] = (),
    seed: int | None = None,
    linears: Callable[[str], bool] = lambda name: True,
) -> Result:
    """One LfU step.

    Args:
        model: attached model; deep-copied.
        batch: the batch. Every forward gets a shallow copy.
        sft_loss_fn: the user's.
        layers: names of the chosen layers.
        setup: settings.
        mask: (batch, layer name) -> tokens that count, None for all.
        a_matrices: LoRA's random A by linear map.
        undesirable: batch for the ascent gradient; None is the same one.
        leaves: trained tensors outside of the model.
        seed: of the global random state before each forward; None where nothing random happens.
        linears: which linear maps LoRA acts on, by name.
    """
    model = copy.deepcopy(model)
    for module in model.modules():  # a copy of an attached model may carry the library's inert hooks: away with them
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    run = _Runner(model, sft_loss_fn, layers, setup, mask, seed)

    # 1. Clean forward.
    sft_loss, clean, clean_logits = run.forward(batch, None)

    # 2. The undesirable update, from "no change".
    point = parts.no_change(model, layers, clean, setup, a_matrices, linears)
    ascent_norm = torch.zeros(())
    for _ in range(setup.ascent_steps):
        point = {name: tuple(c.detach().requires_grad_() for c in cs) for name, cs in point.items()}
        loss, _, _ = run.forward(batch if undesirable is None else undesirable, point)
        flat = [c for cs in point.values() for c in cs]
        found = torch.autograd.grad(loss, flat, allow_unused=True)
        gradients = iter([torch.zeros_like(c) if g is None else g for c, g in zip(flat, found, strict=True)])
        g = {name: tuple(next(gradients) for _ in cs) for name, cs in point.items()}
        point, ascent_norm = parts.ascended(point, g, setup)

    # 3. Perturbed forward and the loss.
    delta = {name: tuple(c.detach() for c in cs) for name, cs in point.items()}
    _, perturbed, perturbed_logits = run.forward(batch, delta)
    if setup.distance == "logit_kl":
        z, z_perturbed = parts.stopped(clean_logits, perturbed_logits, setup)
        distances = [parts.kl(z, z_perturbed, mask(batch, "logits"))]
    else:
        distances = []
        for (name, h), (name_perturbed, h_perturbed) in zip(clean, perturbed, strict=True):
            assert name == name_perturbed
            pair = parts.stopped(h, h_perturbed, setup)
            distances.append(parts.layer_distance(*pair, mask(batch, name), setup.for_layer(name)))
    consistency = torch.stack(distances).mean()
    total = sft_loss + setup.lam * consistency
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, [*named.values(), *leaves], allow_unused=True)
    return Result(
        loss=total.detach(),
        sft_loss=sft_loss.detach(),
        consistency=consistency.detach(),
        gradients=dict(zip(named, found, strict=False)),
        leaf_gradients=list(found[len(named) :]),
        delta=delta,
        ascent_norm=ascent_norm,
        layer_distances=[d.detach() for d in distances],
    )


class _Runner:
    """Forwards of the model with auxiliary components in place, capturing the chosen layers' outputs and the logits."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        layers: Sequence[str],
        setup: Setup,
        mask: Mask,
        seed: int | None,
    ) -> None:
        self.model, self.loss_fn, self.layers = model, loss_fn, layers
        self.setup, self.mask, self.seed = setup, mask, seed

    def forward(
        self, batch: Mapping[str, Any], point: Point | None
    ) -> tuple[Tensor, list[tuple[str, Tensor]], Tensor | None]:
        """(loss, [(layer, hidden state) in the order of the calls], logits)."""
        states: list[tuple[str, Tensor]] = []
        logits: list[Tensor] = []
        if self.seed is not None:
            torch.manual_seed(self.seed)
        with ExitStack() as stack:
            # In front of all other hooks (transformers answers output_hidden_states by some); insertions come last.
            for name in self.layers:
                hook = self._capture(name, states)
                stack.callback(self.model.get_submodule(name).register_forward_hook(hook, prepend=True).remove)
            if point is not None:
                stack.enter_context(self._inserted(point, batch))
            root = self.model.register_forward_hook(lambda m, a, out: logits.append(parts.logits_of(out)))
            stack.callback(root.remove)
            loss = self.loss_fn(self.model, dict(batch))
        return loss, states, logits[-1] if logits else None

    @staticmethod
    def _capture(name: str, states: list[tuple[str, Tensor]]) -> Callable[..., None]:
        def capture(module: Any, args: Any, output: Any) -> None:
            if torch.is_grad_enabled():  # a call without gradients belongs to something that is not trained
                # A clone: what a later in-place operation does to the output is no longer the layer's output.
                states.append((name, parts.hidden_of(output).clone()))

        return capture

    @contextmanager
    def _inserted(self, point: Point, batch: Mapping[str, Any]) -> Iterator[None]:
        setup = self.setup
        with ExitStack() as stack:
            if setup.auxiliary == "weights":
                stack.enter_context(parts.swapped_weights(self.model, point))
            for name, components in point.items() if setup.auxiliary != "weights" else ():
                module = self.model.get_submodule(name)
                if setup.auxiliary == "lora":
                    a, b = components

                    def hook(m: Any, args: Any, kwargs: Any, out: Any, a: Tensor = a, b: Tensor = b) -> Any:
                        if not torch.is_grad_enabled():
                            return out
                        x = args[0] if args else next(iter(kwargs.values()))
                        return parts.with_hidden(out, parts.hidden_of(out) + setup.scale * ((x @ a.T) @ b.T))

                    handle = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
                else:
                    counts = None if setup.tokens == "all" else self.mask(batch, name)

                    own = setup.for_layer(name)

                    def steer(
                        m: Any, args: Any, out: Any, d: Any = components[0], counts: Any = counts, own: Any = own
                    ) -> Any:
                        if not torch.is_grad_enabled():
                            return out
                        h = parts.hidden_of(out)
                        return parts.with_hidden(out, parts.steered(h, d, counts, own))

                    handle = module.register_forward_hook(steer, prepend=True)
                stack.callback(handle.remove)
            yield

    @staticmethod
    def _steer(d: Tensor, counts: Tensor | None, setup: Setup) -> Callable[..., Any]:
        def steer(module: Any, args: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():
                return output
            return parts.with_hidden(output, parts.steered(parts.hidden_of(output), d, counts, setup))

        return steer
