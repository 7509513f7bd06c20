"""The settings of a regularizer that somebody else's loop creates later, checked when they are given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from lfu_reg.regularizer import LfURegularizer


def checked_settings(settings: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    """The keyword arguments for `LfURegularizer(model, **settings)`.

    Args:
        settings: keyword arguments; None for the defaults.
        what: where they were given, for the message.

    Raises:
        TypeError: if they are no mapping, or LfURegularizer does not take one of them.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise TypeError(
            f"{what} is a {type(settings).__name__}; allowed is a mapping of LfURegularizer's settings, for example "
            f"{what}={{'auxiliary': 'steering', 'lam': 0.1}}, or None for the defaults."
        )
    allowed = [name for name in inspect.signature(LfURegularizer).parameters if name != "model"]
    unknown = [name for name in settings or {} if name not in allowed]
    if unknown:
        raise TypeError(
            f"{what} has the unknown setting(s) {', '.join(map(repr, unknown))}; LfURegularizer takes "
            f"{', '.join(allowed)}."
        )
    return dict(settings or {})


def try_on(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Attach and remove: whatever is wrong with the settings is raised here, and not hours later."""
    LfURegularizer(model, **settings).remove()
