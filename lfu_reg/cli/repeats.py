"""Names of repeated modules as one: `layers.0.up_proj` to `layers.27.up_proj` are `layers.0-27.up_proj`, 28 times."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from itertools import groupby
from typing import TypeVar

Kind = TypeVar("Kind", bound=Hashable)
Path = tuple[str, ...]


def merged(kinds: Mapping[str, Kind]) -> list[tuple[str, Kind, int]]:
    """One entry per kind of module.

    Args:
        kinds: what has to be equal for modules to be merged, by the module's dotted name.

    Returns:
        Name, kind and number of modules, in the order of their first ones. A name stands for exactly the modules that
        its ranges span, so irregular ones keep lines of their own.
    """
    entries = [(tuple(name.split(".")), kind, 1) for name, kind in kinds.items()]
    for place in reversed(range(max((len(path) for path, _, _ in entries), default=0))):
        entries = _merged_at(place, entries)
    return [(".".join(path), kind, number) for path, kind, number in entries]


def _merged_at(place: int, entries: list[tuple[Path, Kind, int]]) -> list[tuple[Path, Kind, int]]:
    """Merge what differs in the index at one place of the path alone."""
    groups: dict[Hashable, list[tuple[Path, Kind, int]]] = {}
    for entry in entries:
        path, kind, number = entry
        is_index = place < len(path) and path[place].isdecimal()
        key = (path[:place], path[place + 1 :], kind, number) if is_index else (path, kind)
        groups.setdefault(key, []).append(entry)
    return [_one(place, group) if len(group) > 1 else group[0] for group in groups.values()]


def _one(place: int, group: list[tuple[Path, Kind, int]]) -> tuple[Path, Kind, int]:
    path, kind, number = group[0]
    indices = ranges(int(path[place]) for path, _, _ in group)
    return (*path[:place], indices, *path[place + 1 :]), kind, number * len(group)


def ranges(indices: Iterable[int]) -> str:
    """Numbers as in "0-3,5"."""
    listed = enumerate(sorted(indices))
    runs = [[value for _, value in run] for _, run in groupby(listed, key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
