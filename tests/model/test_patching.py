"""What stood in for something gives its place back."""

from __future__ import annotations

import pytest

from lfu_reg.model.patching import patched


def test_entries_are_back_after_an_exception() -> None:
    one, other = {"a": 1, "b": 2}, {}

    def failing() -> None:
        with patched([(one, "a", 3), (other, "c", 4), (one, "a", 5)]):
            assert (one, other) == ({"a": 5, "b": 2}, {"c": 4})
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert (one, other) == ({"a": 1, "b": 2}, {})
