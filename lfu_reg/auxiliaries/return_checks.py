"""What the methods of an auxiliary return, and what they read, checked where it happens.

Only types, shapes, dtypes, devices and version counters are looked at: reading a value would wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lfu_reg.auxiliaries.base import Auxiliary, Call
from lfu_reg.model.outputs import describe

_START = "a tuple of floating-point tensors at 'no change', such as (call.y.new_zeros(call.y.shape[-1]),)"
_APPLY = "one tensor shaped like call.y, of its dtype and on its device"
_RULE = "one entry per component, each a tensor of the component's shape or None"


def _wrong(method: str, returned: str, name: str, allowed: str, end: str = "") -> str:
    return f"{method} returned {returned} for {name}; it has to return {allowed}{end}."


def checked_sites(auxiliary: Auxiliary, model: nn.Module, layers: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """`auxiliary.sites(model, layers)`; raises unless it maps full names to the modules of these names in `model`."""
    owner, sites = auxiliary._label, auxiliary.sites(model, layers)
    allowed = f"{owner}.sites has to return a mapping from full names to modules of the model, such as `layers`"
    if not isinstance(sites, Mapping):
        raise TypeError(f"{owner}.sites returned {describe(sites)}. {allowed}.")
    if not sites and auxiliary.acts_at_sites:
        raise ValueError(f"{owner}.sites returned no module, so nothing would be perturbed. {allowed}.")
    there = dict(model.named_modules(remove_duplicate=False))
    for name, module in sites.items():
        if not isinstance(name, str) or not isinstance(module, nn.Module):
            raise TypeError(f"{owner}.sites returned an entry {name!r}: {describe(module)}. {allowed}.")
        if there.get(name) is not module:
            raise ValueError(
                f"{owner}.sites returned {name!r}: a {type(module).__name__} that is not the model's module of that "
                f"name. {allowed}; the names are those of model.named_modules()."
            )
    return sites


def check_components(owner: str, components: Any, name: str, y: Tensor) -> None:
    """Raise unless `components` are what `start` has to return for the site `name` with the output `y`."""
    start = f"{owner}.start"
    if not isinstance(components, tuple):
        comma = ". Put a comma behind the one tensor: (c,)" if isinstance(components, Tensor) else ""
        raise TypeError(_wrong(start, describe(components), name, _START, comma))
    if not components:
        raise ValueError(_wrong(start, "an empty tuple", name, _START))
    for component in components:
        if not isinstance(component, Tensor):
            raise TypeError(_wrong(start, f"a tuple with {describe(component)}", name, _START))
        if not component.is_floating_point():
            cure = ", as components are moved along a gradient. Make them with dtype=master_dtype(call.y)"
            raise TypeError(_wrong(start, describe(component), name, _START, cure))
        if component.device != y.device:
            where = f"{name}, whose output is on {y.device}"
            cure = ", which is on the device of call.y"
            raise ValueError(_wrong(start, f"a tensor on {component.device}", where, _START, cure))


def versions(x: Tensor | None, y: Tensor) -> tuple[int, int]:
    """How often the input and the output of a site were written to."""
    return 0 if x is None or x.is_inference() else x._version, 0 if y.is_inference() else y._version


def check_unwritten(owner: str, call: Call, before: tuple[int, int]) -> None:
    """Raise if the model has written to `call.x` or `call.y` since their versions were `before`."""
    if versions(call.x, call.y) != before:
        raise ValueError(
            f"After {call.name} had returned, the model wrote in place to its input or output, of which {owner} takes "
            "its gradient in the backward pass. Let the module return a copy (y.clone()), write out of place "
            "(y = y + 1 for y.add_(1)), choose other layers=..., or use an auxiliary that does not read outputs, such "
            'as auxiliary="steering".'
        )


def check_output(owner: str, changed: Any, name: str, y: Tensor, *, written: bool) -> None:
    """Raise unless `changed` is what `apply` has to return for the output `y` of the site `name`."""
    apply = f"{owner}.apply"
    if not isinstance(changed, Tensor):
        hint = "; a return statement is missing" if changed is None else ""
        raise TypeError(_wrong(apply, describe(changed), name, _APPLY, hint))
    if written:
        raise ValueError(
            f"{apply} wrote to call.x or call.y of {name} in place; it has to return a new tensor, as the model and "
            "the other pass use these. Write y * c for y.mul_(c), and y = y.clone() before y[mask] = ...."
        )
    if changed.shape != y.shape or changed.dtype != y.dtype or changed.device != y.device:
        where = f"{name}, whose output is {describe(y)} on {y.device}"
        cure = ". Cast the components: c.to(call.y.dtype)"
        raise ValueError(_wrong(apply, f"{describe(changed)} on {changed.device}", where, _APPLY, cure))


def check_depends(owner: str, changed: Tensor, name: str) -> None:
    """Raise unless `changed` has a gradient with respect to the components."""
    if not changed.requires_grad:
        raise ValueError(
            f"{owner}.apply returned a tensor for {name} that does not depend on the components, so there is no "
            "gradient to ascend along; it has to use them without detach(), item() or torch.no_grad()."
        )


def check_rule(owner: str, rule: Any, name: str) -> None:
    """Raise unless `rule` is what `gradient_rule` has to return."""
    if not callable(rule):
        allowed = f"a function of dl/dy that returns a sequence with {_RULE}"
        raise TypeError(_wrong(f"{owner}.gradient_rule", describe(rule), name, allowed))


def check_gradients(owner: str, gradients: Any, name: str, like: Sequence[tuple[torch.Size, torch.device]]) -> None:
    """Raise unless `gradients` are what the rule of `gradient_rule` has to return for components `like` these."""

    def wrong(returned: str, comma: str = "") -> str:
        here = ", ".join(f"{list(shape)} on {device}" for shape, device in like)
        allowed = f"a sequence with {_RULE} (here {here})"
        return _wrong(f"The rule of {owner}.gradient_rule", returned, name, allowed, comma)

    if not isinstance(gradients, Sequence):
        comma = ". Put a comma behind the one tensor: (gradient,)" if isinstance(gradients, Tensor) else ""
        raise TypeError(wrong(describe(gradients), comma))
    if len(gradients) != len(like):
        raise ValueError(wrong(f"{len(gradients)} entries"))
    for gradient, (shape, device) in zip(gradients, like, strict=True):
        if gradient is None:
            continue
        if not isinstance(gradient, Tensor):
            raise TypeError(wrong(f"an entry that is {describe(gradient)}"))
        if gradient.shape != shape or gradient.device != device or not gradient.is_floating_point():
            raise ValueError(wrong(f"{describe(gradient)} on {gradient.device}"))


def check_direction(owner: str, direction: Any, gradients: Sequence[Tensor]) -> None:
    """Raise unless `direction` has one tensor for each of `gradients`, of its shape."""
    shapes = [gradient.shape for gradient in gradients]
    listed = isinstance(direction, Sequence) and all(isinstance(moved, Tensor) for moved in direction)
    if not listed or [moved.shape for moved in direction] != shapes:
        allowed = "one tensor per gradient that it is given, each of that gradient's shape"
        raise ValueError(_wrong(f"{owner}.direction", _listed(direction), f"{len(shapes)} gradients", allowed))


def check_groups(owner: str, groups: Any, names: Sequence[str]) -> None:
    """Raise unless `groups` is None or has one number for each of `names`."""
    whole = isinstance(groups, Sequence) and all(isinstance(group, int) for group in groups)
    if groups is not None and not (whole and len(groups) == len(names)):
        allowed = "one whole number per name that it is given, or None for one global norm"
        raise ValueError(_wrong(f"{owner}.groups", _listed(groups), f"{len(names)} names", allowed))


def _listed(returned: Any) -> str:
    return f"[{', '.join(map(describe, returned))}]" if isinstance(returned, Sequence) else describe(returned)
