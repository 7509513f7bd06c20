"""Auxiliary components that change what some modules return.

`OutputAuxiliary` does the bookkeeping for all of them; a new one says where (`sites`), with what (`start`) and how
(`apply`), and nothing else: docs/extending.md has a complete one. What these methods return is checked at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lfu_reg.auxiliaries import return_checks
from lfu_reg.auxiliaries.ascent import ascend, gradient_norm
from lfu_reg.auxiliaries.base import Auxiliary, Call, Components, Generators, GradientRule


class OutputAuxiliary(Auxiliary):
    """Auxiliary components that change the outputs of some modules."""

    acts_at_sites = True

    def __init__(self) -> None:
        self._components: dict[str, Components] = {}
        self._starts: dict[str, Components] = {}  # of those that were moved
        self._gradients: dict[str, list[Tensor | None]] = {}
        self._generators: Generators = torch.Generator
        self._required = False

    @abstractmethod
    def start(self, call: Call, generator: torch.Generator) -> Components:
        """The components of one site at "no change", made when it first runs in a step: so device and sizes are known.

        Args:
            call: the first call of the site in this step.
            generator: the step's seeded generator on the device of `call.y`.

        Returns:
            At least one floating-point tensor of any shape, on the device of `call.y`, such that `apply` gives
            `call.y`.
        """

    @abstractmethod
    def apply(self, components: Components, call: Call) -> Tensor:
        """The output with the components in place.

        Args:
            components: those of the site, as `start` returned them and moved since.
            call: this call of the site; neither its x nor its y may be written to.

        Returns:
            A tensor like `call.y` in shape, dtype and device.
        """

    def gradient_rule(self, components: Components, call: Call) -> GradientRule:
        """Rule from dl/dy to the gradients of the components at "no change".

        The default differentiates `apply`. It keeps x and y alive until the backward pass reaches the site; override it
        with a closed form that keeps less.

        Args:
            components: those of the site at "no change".
            call: this call of the site.

        Returns:
            A function of dl/dy, shaped like `call.y`, that returns one entry per component: a tensor of its shape, or
            None where it has no gradient.
        """
        call = replace(call, x=None if call.x is None else call.x.detach(), y=call.y.detach())
        before = return_checks.versions(call.x, call.y)

        def rule(grad_y: Tensor) -> Sequence[Tensor | None]:
            return_checks.check_unwritten(self._label, call, before)
            with torch.enable_grad():
                leaves = [component.detach().requires_grad_() for component in components]
                changed = self._applied(tuple(leaves), call)
                if changed is call.y:  # nothing to change in this call
                    return [None] * len(leaves)
                return_checks.check_depends(self._label, changed, call.name)
                return torch.autograd.grad(changed, leaves, grad_y, allow_unused=True)

        return rule

    def groups(self, names: Sequence[str]) -> Sequence[int] | None:
        """Group numbers for a separate normalisation, one per site; None for one global norm (the paper)."""
        return None

    def direction(self, gradients: list[Tensor]) -> list[Tensor]:
        """The direction to go, before normalisation: the gradient, as in the paper."""
        return gradients

    # What the regularizer calls.

    def reset(self, generators: Generators) -> None:
        """Forget components and gradients."""
        self._components, self._starts, self._gradients = {}, {}, {}
        self._generators, self._required = generators, False

    def observe(self, call: Call) -> GradientRule:
        """`gradient_rule`, adding what it gives to g."""
        components = self._at(call)
        rule = self.gradient_rule(components, call)
        name = call.name  # and not `call`: the rule ends up in a hook of call.y, which would keep itself alive
        return_checks.check_rule(self._label, rule, name)
        like = [(component.shape, component.device) for component in components]

        def collect(grad_y: Tensor) -> Sequence[Tensor | None]:
            gradients = rule(grad_y)
            return_checks.check_gradients(self._label, gradients, name, like)
            self._collect(name, gradients)
            return gradients

        return collect

    def apply_at(self, call: Call) -> Tensor:
        """`apply` with the components of the call's site."""
        y, changed = call.y, self._applied(self._at(call), call)
        # With the strides of y: dropout draws in the order of memory, so pass 2 would draw another mask.
        return changed if changed.stride() == y.stride() else torch.empty_like(y).copy_(changed)

    def leaves(self) -> list[Tensor]:
        """The components."""
        return [component for components in self._components.values() for component in components]

    def require_gradients(self, required: bool) -> None:
        """Make components leaves that require gradients, also those yet to be started, or plain tensors again."""
        self._required = required
        for name, components in self._components.items():
            self._components[name] = tuple(c.detach().requires_grad_(required) for c in components)

    def gradient_from(self, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Pick the components' gradients out of others."""
        by_leaf = {id(leaf): gradient for leaf, gradient in zip(leaves, gradients, strict=True)}
        for name, components in self._components.items():
            self._collect(name, [by_leaf.get(id(component)) for component in components])

    def forget_gradient(self) -> None:
        """Drop what was collected of g."""
        self._gradients = {}

    def replace_gradients(self, function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> None:
        """Replace g of all components, those without a gradient included."""
        named = {}
        for name in sorted(self._components):
            components = self._components[name]
            gradients = self._gradients.get(name, [None] * len(components))
            for i, (component, gradient) in enumerate(zip(components, gradients, strict=True)):
                named[f"{name}/{i}"] = torch.zeros_like(component) if gradient is None else gradient
        new = function(named)
        self._gradients = {name: [new[f"{name}/{i}"] for i in range(len(cs))] for name, cs in self._components.items()}

    def ascend(self, alpha: float) -> Tensor:
        """Eq. 2 over all components that got a gradient."""
        found = {(name, i): g for name, gs in self._gradients.items() for i, g in enumerate(gs) if g is not None}
        self._gradients = {}
        if not found:
            return gradient_norm(())
        gradients = self.direction(list(found.values()))
        return_checks.check_direction(self._label, gradients, list(found.values()))
        names = list(dict.fromkeys(name for name, _ in found))
        groups = self.groups(names)
        return_checks.check_groups(self._label, groups, names)
        per_group = None if groups is None else [groups[names.index(name)] for name, _ in found]
        norm, steps = ascend(gradients, alpha, per_group)
        for (name, i), step in zip(found, steps, strict=True):
            components = list(self._components[name])
            self._starts.setdefault(name, self._components[name])
            components[i] = components[i].detach() + step
            self._components[name] = tuple(components)
        return norm

    def rescale(self, factor: float) -> bool:
        """From where each component started, `factor` times as far."""
        for name, starts in self._starts.items():
            pairs = zip(starts, self._components[name], strict=True)
            self._components[name] = tuple(torch.lerp(start.detach(), moved, factor) for start, moved in pairs)
        return True

    def perturbation(self) -> dict[str, Any]:
        """Name of a site to its component, or to the tuple of them where there are several."""
        return {
            name: components[0].detach() if len(components) == 1 else tuple(c.detach() for c in components)
            for name, components in self._components.items()
        }

    def _at(self, call: Call) -> Components:
        if call.name not in self._components:
            with torch.no_grad():
                components = self.start(call, self._generators(call.y.device))
            return_checks.check_components(self._label, components, call.name, call.y)
            # Detached: what `start` returned may be somebody's parameter, whose requires_grad is not ours to set.
            self._components[call.name] = tuple(c.detach().requires_grad_(self._required) for c in components)
        return self._components[call.name]

    def _applied(self, components: Components, call: Call) -> Tensor:
        before = return_checks.versions(call.x, call.y)
        changed = self.apply(components, call)
        written = return_checks.versions(call.x, call.y) != before
        return_checks.check_output(self._label, changed, call.name, call.y, written=written)
        return changed

    def _collect(self, name: str, gradients: Sequence[Tensor | None]) -> None:
        # Adding up: a shared layer, or a loss function that calls the model twice, passes a site more than once.
        collected = self._gradients.get(name, [None] * len(gradients))
        self._gradients[name] = [
            new if old is None else old if new is None else old + new
            for old, new in zip(collected, gradients, strict=True)
        ]
