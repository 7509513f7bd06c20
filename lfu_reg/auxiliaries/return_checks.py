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


def _wrong(method: str, returned: Any, where: str, allowed: str) -> ValueError:
    return ValueError(f"{method} returned {_shown(returned)} for {where}; it has to return {allowed}.")


def _shown(returned: Any) -> str:
    if isinstance(returned, (tuple, list)):
        return f"{describe(returned)} with {len(returned)} entries ({', '.join(map(_shown, returned))})"
    if isinstance(returned, Tensor):
        return f"{describe(returned)} on {returned.device}"
    return "None (is a return statement missing?)" if returned is None else describe(returned)


def checked_sites(auxiliary: Auxiliary, model: nn.Module, layers: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """`auxiliary.sites(model, layers)`; raises unless it maps full names to the modules of these names in `model`."""
    method, sites = f"{auxiliary._label}.sites", auxiliary.sites(model, layers)
    allowed = "a mapping from full names, as in model.named_modules(), to these modules, such as `layers`"
    if not isinstance(sites, Mapping):
        raise _wrong(method, sites, "the chosen layers", allowed)
    if not sites and auxiliary.acts_at_sites:
        raise ValueError(f"{method} returned no module, so nothing would be perturbed; it has to return {allowed}.")
    there = dict(model.named_modules(remove_duplicate=False))
    for name, module in sites.items():
        if not isinstance(module, nn.Module) or there.get(name) is not module:
            entry = f"an entry {name!r}: {describe(module)}, which is not the model's module of that name"
            raise ValueError(f"{method} returned {entry}; it has to return {allowed}.")
    return sites


def check_components(owner: str, components: Any, name: str, y: Tensor) -> None:
    """Raise unless `components` are what `start` has to return for the site `name` with the output `y`."""
    entries = components if isinstance(components, tuple) and components else [None]
    if not all(isinstance(c, Tensor) and c.is_floating_point() and c.device == y.device for c in entries):
        allowed = f"a tuple of floating-point tensors at 'no change' on {y.device}; a single one with a comma: (c,)"
        cure = "c = call.y.new_zeros(call.y.shape[-1], dtype=master_dtype(call.y))"
        raise _wrong(f"{owner}.start", components, name, f"{allowed}, such as {cure}")


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
    if written:
        raise ValueError(
            f"{owner}.apply wrote to call.x or call.y of {name} in place; it has to return a new tensor, as the model "
            "and the other pass use these. Write y * c for y.mul_(c), and y = y.clone() before y[mask] = ...."
        )
    like = isinstance(changed, Tensor) and changed.shape == y.shape
    if not (like and changed.dtype == y.dtype and changed.device == y.device):
        allowed = "one tensor shaped like call.y, of its dtype and on its device; cast components: c.to(call.y.dtype)"
        raise _wrong(f"{owner}.apply", changed, f"{name}, whose output is {_shown(y)}", allowed)


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
        raise _wrong(f"{owner}.gradient_rule", rule, name, "a function of dl/dy that returns gradients")


def check_gradients(owner: str, gradients: Any, name: str, like: Sequence[tuple[torch.Size, torch.device]]) -> None:
    """Raise unless `gradients` are what the rule of `gradient_rule` has to return for components `like` these."""
    fine = isinstance(gradients, Sequence) and len(gradients) == len(like)
    for gradient, kind in zip(gradients, like, strict=True) if fine else ():
        right = isinstance(gradient, Tensor) and gradient.is_floating_point()
        fine = fine and (gradient is None or (right and (gradient.shape, gradient.device) == kind))
    if not fine:
        here = ", ".join(f"{list(shape)} on {device}" for shape, device in like)
        allowed = f"a sequence with one entry per component: None or a tensor of its shape (here {here})"
        raise _wrong(f"The rule of {owner}.gradient_rule", gradients, name, f"{allowed}, such as (gradient,)")


def check_direction(owner: str, direction: Any, gradients: Sequence[Tensor]) -> None:
    """Raise unless `direction` has one tensor for each of `gradients`, of its shape."""
    shapes = [gradient.shape for gradient in gradients]
    if not isinstance(direction, Sequence) or [getattr(moved, "shape", None) for moved in direction] != shapes:
        allowed = "one tensor per gradient that it is given, each of that gradient's shape"
        raise _wrong(f"{owner}.direction", direction, f"{len(shapes)} gradients", allowed)


def check_groups(owner: str, groups: Any, names: Sequence[str]) -> None:
    """Raise unless `groups` is None or has one number for each of `names`."""
    whole = isinstance(groups, Sequence) and all(isinstance(group, int) for group in groups)
    if groups is not None and not (whole and len(groups) == len(names)):
        allowed = "one whole number per name that it is given, or None for one global norm"
        raise _wrong(f"{owner}.groups", groups, f"{len(names)} names", allowed)
