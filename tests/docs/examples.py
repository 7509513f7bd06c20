"""The code of pages; the scripts of docs/examples, and the pages of docs/recipes that show them.

A page has its script's code behind a comment with the script's name; `python -m tests.docs.examples` puts it there.
"""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
PAGES = sorted((ROOT / "docs" / "recipes").glob("*.md"))

_SHOWN = re.compile(r"(<!-- example: (\w+\.py) -->\n\n```python\n).*?(^```$)", re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[str]:
    """A page's python blocks, each behind as many empty lines as are above it, so that tracebacks point there."""
    found = re.finditer(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return ["\n" * page[: block.start(1)].count("\n") + block.group(1) for block in found]


def shown(page: str) -> list[str]:
    """Names of the scripts that a page shows."""
    return [name for _, name, _ in _SHOWN.findall(page)]


def filled(page: str) -> str:
    """The page with its scripts as they are."""
    return _SHOWN.sub(lambda found: found[1] + (EXAMPLES / found[2]).read_text() + found[3], page)


def missing_packages(code: str) -> list[str]:
    """What the code imports and is not installed."""
    tree = ast.parse(code).body
    names = [alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in tree if isinstance(node, ast.ImportFrom)]
    return sorted({top for name in names if find_spec(top := name.partition(".")[0]) is None})


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text()))
