"""Names that people type: in any case, and answered with the nearest ones where there is none like it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

Value = TypeVar("Value")


def one_of(setting: str, given: Any, allowed: Collection[Value], more: str = "") -> Value:
    """The allowed value that was given, words in any case; `more` says what else the setting takes."""
    typed = given.strip().lower() if isinstance(given, str) else given
    for value in allowed:
        if type(value) is type(typed) and value == typed:
            return value
    raise (ValueError if isinstance(given, str) else TypeError)(
        f"{setting}={shown(given)}; allowed are {', '.join(map(repr, allowed))}{more}."
        + did_you_mean(given, [value for value in allowed if isinstance(value, str)], most=1)
    )


def did_you_mean(given: object, names: Iterable[str], most: int = 3) -> str:
    """A sentence with the names that are nearest to the given one; empty if none is near."""
    by_lower = {name.lower(): name for name in names}
    near = get_close_matches(given.lower(), by_lower, n=most) if isinstance(given, str) else []
    return f" Did you mean {' or '.join(repr(by_lower[name]) for name in near)}?" if near else ""


def listed(names: Iterable[str], most: int) -> str:
    """Some names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shown(value: object) -> str:
    """`value` as code, on one line and not too long: modules and tensors have pages of it."""
    text = value.__name__ if isinstance(value, type) else " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
