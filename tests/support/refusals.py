"""Assertions for bad input: refused with a message that has all its parts, and nothing changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from lfu_reg import LfURegularizer
from tests.support.models import TINY
from tests.support.snapshots import Snapshot


def says(*parts: str) -> str:
    """A pattern for all parts, in any order and case."""
    return "(?is)" + "".join(f"(?=.*{re.escape(part)})" for part in parts)


def refuses(model: nn.Module, parts: tuple[str, ...], *args: Any, **options: Any) -> None:
    before = Snapshot.of(model)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=says(*parts)):
        LfURegularizer(model, *args, **options)
    before.check(model)


def refuses_step(
    parts: tuple[str, ...],
    *,
    model: nn.Module | None = None,
    reg: LfURegularizer | None = None,
    given: Any = None,
    batch: Any = None,
    loss: Callable[..., Any] = TINY.loss,
    **extra: Any,
) -> None:
    model = TINY.make() if model is None else model
    reg = LfURegularizer(model, "steering") if reg is None else reg
    before = Snapshot.of(model)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=says(*parts)):
        reg(model if given is None else given, TINY.batch() if batch is None else batch, loss, **extra)
    before.check(model)
