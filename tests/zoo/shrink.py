"""A tiny configuration of any model type, from the names of its fields."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import transformers as tf
from huggingface_hub.errors import StrictDataclassError

from tests.zoo.sizes import RATE, size_of


def tiny_config(model_type: str, changes: Mapping[str, Any] | None = None) -> tf.PretrainedConfig:
    """The configuration of a model type with every size made small.

    Args:
        model_type: transformers' name.
        changes: fields that need another value; an entry "text_config.hidden_size" is for a nested one.
    """
    return _tiny(tf.CONFIG_MAPPING[model_type], dict(changes or {}))


def _tiny(kind: type[tf.PretrainedConfig], changes: dict[str, Any]) -> tf.PretrainedConfig:
    accepted = _fields(kind)
    default = _default(kind)
    settings: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, tf.PretrainedConfig):
            inner = {key.split(".", 1)[1]: new for key, new in changes.items() if key.startswith(f"{name}.")}
            settings[name] = _tiny(type(value), inner)
        elif name in accepted and (size := size_of(name, value)) is not value and size != value:
            settings[name] = size
    settings.update({name: new for name, new in changes.items() if "." not in name})
    return kind(**{name: new for name, new in settings.items() if new is not DEFAULT})


DEFAULT = object()  # as a change: leave this field as it is


def _default(kind: type[tf.PretrainedConfig]) -> Any:
    try:
        return kind()
    except Exception:  # a few have no default, and then the class's own values are looked at
        return kind.__new__(kind)


def _fields(kind: type[tf.PretrainedConfig]) -> set[str]:
    """Names that the constructor has a parameter for: the others are computed from these."""
    return {
        name
        for cls in kind.__mro__[:-1]
        for name in (
            *inspect.signature(cls.__init__).parameters,
            *vars(cls).get("__annotations__", {}),
            *vars(cls).get("attribute_map", {}).values(),
        )
    }


def set_dropout(config: tf.PretrainedConfig, rate: float) -> int:
    """Every plain dropout rate of a configuration set to `rate`; returns how many there are."""
    count = 0
    for name, value in list(vars(config).items()):
        if isinstance(value, tf.PretrainedConfig):
            count += set_dropout(value, rate)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and _is_dropout(name):
            with contextlib.suppress(TypeError, StrictDataclassError):  # a rate that may only be a whole number
                setattr(config, name, rate)
                count += 1
    return count


def _is_dropout(name: str) -> bool:
    return bool(RATE.fullmatch(name)) and "layerdrop" not in name and "jitter" not in name and "router" not in name
