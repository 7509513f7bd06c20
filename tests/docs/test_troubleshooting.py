"""docs/troubleshooting.md quotes messages that the package has, and leads to every page on what goes wrong."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
# A cell that begins with a quotation and does not name another library.
OURS = re.findall(r"^\| `([^`]{20,})` \|", PAGE, re.MULTILINE)


def messages() -> str:
    """All text of the package, one string a line, what is filled in as a zero byte."""
    lines = []
    for file in (ROOT / "lfu_reg").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                lines.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(re.sub(r"\{[^{}]*\}", "\0", node.value))
    return "\n".join(line.replace("\n", " ") for line in lines)


TEXT = messages()


@pytest.mark.parametrize("message", OURS)
def test_a_quoted_message_exists(message: str) -> None:
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    # A quotation may have a word where the code fills one in.
    pattern = ".*".join(part.replace(r"\ ", r"[ \0]+") for part in parts)
    assert re.search(pattern, TEXT), message


def test_most_rows_are_messages() -> None:
    assert len(OURS) > 30


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "gotchas").glob("*.md")), ids=lambda page: page.stem)
def test_every_page_is_led_to(page: Path) -> None:
    assert f"(gotchas/{page.name})" in PAGE
