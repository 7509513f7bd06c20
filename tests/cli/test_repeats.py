"""A merged name stands for exactly the modules that its ranges span."""

from __future__ import annotations

from lfu_reg.cli.repeats import merged, ranges


def test_ranges() -> None:
    assert ranges([0, 1, 2, 3]) == "0-3"
    assert ranges([5, 0, 1]) == "0-1,5"
    assert ranges([7]) == "7"


def test_repeated_blocks_are_one_line_per_map() -> None:
    kinds = {f"model.layers.{i}.mlp.{name}": size for i in range(28) for name, size in (("up", 1), ("down", 2))}
    assert merged(kinds) == [("model.layers.0-27.mlp.up", 1, 28), ("model.layers.0-27.mlp.down", 2, 28)]


def test_blocks_of_another_size_are_a_line_of_their_own() -> None:
    kinds = {f"h.{i}.fc": 9 if i == 2 else 4 for i in range(5)}
    assert merged(kinds) == [("h.0-1,3-4.fc", 4, 4), ("h.2.fc", 9, 1)]


def test_experts_in_blocks() -> None:
    kinds = {f"layers.{i}.experts.{j}.up": 1 for i in range(3) for j in range(8)}
    assert merged(kinds) == [("layers.0-2.experts.0-7.up", 1, 24)]
    del kinds["layers.1.experts.7.up"]  # one pattern for all would name a map that is not there
    assert merged(kinds) == [("layers.0,2.experts.0-7.up", 1, 16), ("layers.1.experts.0-6.up", 1, 7)]


def test_names_without_an_index_stay() -> None:
    assert merged({"head": 1, "blocks.0": 1, "blocks.1": 1}) == [("head", 1, 1), ("blocks.0-1", 1, 2)]
    assert merged({"encoder.0.fc": 1, "decoder.0.fc": 1}) == [("encoder.0.fc", 1, 1), ("decoder.0.fc", 1, 1)]
    assert merged({}) == []
