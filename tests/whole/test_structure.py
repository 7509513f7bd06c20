"""The shape of the package: imports point down, no cycle, short chains, few entries, short files."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "lfu_reg"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports modules of its own folder and of lower floors only; folders of one floor do not import each other.
FLOORS = (
    ("model", "diagnostics"),
    ("distances", "distributed"),
    ("auxiliaries",),
    ("hooks",),
    ("step",),
    ("regularizer",),
    ("__init__",),
    ("cli", "integrations"),
)
FLOOR_OF = {folder: number for number, floor in enumerate(FLOORS) for folder in floor}

LONGEST_CHAIN, ENTRIES = 9, 12
FILE, REGULARIZER, KERNELS = 250, 199, 900
CORE = 7_776  # may fall, and not rise; the aim is 5,000


def name_of(file: Path) -> str:
    """`step.checks` for lfu_reg/step/checks.py; a folder's name for its __init__.py."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(file): file for file in FILES}


def statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """What runs when the module is imported: not functions, and not what is for type checkers alone."""
    found: list[ast.stmt] = []
    for statement in body:
        found.append(statement)
        if isinstance(statement, ast.If):
            found += [] if "TYPE_CHECKING" in ast.unparse(statement.test) else statements(statement.body)
            found += statements(statement.orelse)
        elif isinstance(statement, ast.Try):
            handlers = [inner for handler in statement.handlers for inner in handler.body]
            found += statements([*statement.body, *handlers, *statement.orelse, *statement.finalbody])
        elif isinstance(statement, (ast.With, ast.ClassDef)):
            found += statements(statement.body)
    return found


@functools.cache
def imports(name: str) -> frozenset[str]:
    """The modules of the package that a module imports when it is imported."""
    found: set[str] = set()
    for statement in statements(ast.parse(MODULES[name].read_text()).body):
        if isinstance(statement, ast.Import):
            targets = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, f"{name} has a relative import"
            whole = f"{statement.module}."
            targets = [whole + alias.name for alias in statement.names]
        else:
            continue
        found |= {module for target in targets if (module := module_in(target)) is not None}
    return frozenset(found - {name})


def module_in(target: str) -> str | None:
    """The module that `lfu_reg.step.checks` or `lfu_reg.step.checks.check_batch` is in; None outside of the package."""
    top, _, inside = target.partition(".")
    if top != PACKAGE.name:
        return None
    while inside and inside not in MODULES:
        inside = inside.rpartition(".")[0]
    return inside or "__init__"


def cycle_from(name: str) -> list[str]:
    """A cycle of imports that goes through a module; empty if there is none."""
    ways: dict[str, list[str]] = {name: [name]}
    waiting = [name]
    while waiting:
        here = waiting.pop(0)
        for module in sorted(imports(here)):
            if module == name:
                return [*ways[here], name]
            if module not in ways:
                ways[module] = [*ways[here], module]
                waiting.append(module)
    return []


def lines(files: list[Path]) -> int:
    return sum(len(file.read_text().splitlines()) for file in files)


def inside(*folders: str) -> list[Path]:
    return [file for file in FILES for folder in folders if (PACKAGE / folder) in file.parents]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_floor(name: str) -> None:
    assert name.partition(".")[0] in FLOOR_OF


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    own = name.partition(".")[0]
    others = {module: module.partition(".")[0] for module in imports(name)}
    wrong = [module for module, folder in others.items() if folder != own and FLOOR_OF[folder] >= FLOOR_OF[own]]
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("name", MODULES)
def test_no_cycle_of_imports(name: str) -> None:
    cycle = cycle_from(name)
    assert not cycle, " -> ".join(cycle)


def test_few_floors() -> None:
    """The longest chain of folders, each of which imports from the next."""
    assert len(FLOORS) <= LONGEST_CHAIN


def test_few_entries_at_the_top() -> None:
    entries = sorted(path.name for path in PACKAGE.iterdir() if path.name != "__pycache__")
    assert len(entries) <= ENTRIES, entries


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short(name: str) -> None:
    assert lines([MODULES[name]]) <= FILE


def test_the_regularizer_is_short() -> None:
    assert lines([PACKAGE / "regularizer.py"]) <= REGULARIZER


def test_the_core_is_small() -> None:
    left_out = inside("distances/kernels", "cli", "integrations")
    assert lines([file for file in FILES if file not in left_out]) <= CORE


def test_the_kernels_are_small() -> None:
    assert lines(inside("distances/kernels")) <= KERNELS
