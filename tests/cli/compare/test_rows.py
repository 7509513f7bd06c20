"""Whatever a file of rows turns out to be, it is read or refused at once, in one line that names the cure."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest

from lfu_reg.cli.compare import rows as module
from lfu_reg.cli.compare.rows import LONGEST_LINE, Row, read_rows
from lfu_reg.cli.errors import Unusable

TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
ANSWERED = [*TURNS, {"role": "assistant", "content": "a"}]
CHAT = Row((("system", "s"), ("user", "u")), "a")


@pytest.mark.parametrize(
    ("given", "row"),
    [
        ({"prompt": "p", "response": "r"}, Row((("user", "p"),), "r")),
        ({"question": "q", "answer": 7}, Row((("user", "q"),), "7")),
        ({"instruction": "i", "input": "", "output": "o"}, Row((("user", "i"),), "o")),
        ({"instruction": "i", "input": "c", "output": "o"}, Row((("user", "i\nc"),), "o")),
        ({"prompt": "p", "completion": " c"}, Row("p", " c")),
        ({"messages": ANSWERED}, CHAT),
        ({"prompt": TURNS, "completion": ANSWERED[-1:]}, CHAT),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_fields(tmp_path: Path, given: dict[str, Any], row: Row, packed: bool) -> None:
    file = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    with (gzip.open if packed else open)(file, "wt", encoding="utf-8") as opened:
        opened.write(json.dumps(given) + "\n\n" + json.dumps(given) + "\n")
    assert read_rows("DATA", file).rows == (row,)  # a row that is there twice could be on both sides


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "p", "response": "r"}\n{"text": "t", "label": 1}', "line 2: the fields are text, label; allowed"),
        ('{"prompt": "p",', "line 1: not JSON"),
        ("prompt,response\np,r\n", "line 1: not JSON .* Give one JSON object a line"),
        ("[" * 100_000, "line 1: not JSON"),
        ('["p", "r"]', "line 1: a list"),
        ('{"prompt": "p", "response": null}', "'response' is None"),
        ('{"prompt": "p", "response": " "}', "'response' is ' '"),
        ('{"prompt": "p", "response": true}', "'response' is True"),
        ('{"messages": "hello"}', "messages are 'hello'"),
        ('{"messages": [{"role": "user", "content": null}]}', "Give a list of"),
        ('{"messages": [{"role": "user", "content": "u"}]}', "the roles are user"),
        (json.dumps({"messages": TURNS}), "the roles are system, user"),
        ("\n \n", "the file has no rows"),
        ("", "the file has no rows"),
    ],
)
def test_broken_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(Unusable, match=message) as error:
        read_rows("DATA", file)
    assert str(error.value).startswith(f"DATA {file}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"\x89PNG\r\n\xff\xfe", "cannot be read as UTF-8"),
        ("rows.jsonl.gz", b"not packed", "cannot be read as UTF-8"),
        ("rows.jsonl.gz", gzip.compress(b'{"prompt": "p", "response": "r"}\n' * 99)[:40], "cannot be read as UTF-8"),
    ],
    ids=["a picture", "not packed", "cut off"],
)
def test_files_that_are_no_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Unusable, match=message):
        read_rows("DATA", tmp_path / name)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="there is no such file"):
        read_rows("DATA", tmp_path / "missing.jsonl")
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(Unusable, match=r"a folder\. Give one file; in it are train\.jsonl"):
        read_rows("DATA", tmp_path)
    with pytest.raises(Unusable, match="there is no such file"):
        read_rows("DATA", Path("/dev/zero"))


def test_huge_files_are_answered_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a terabyte without a line break, of which nothing but the beginning may be read."""
    endless = tmp_path / "endless.jsonl"
    with endless.open("wb") as file:
        file.truncate(1 << 40)
    start = time.perf_counter()
    with pytest.raises(Unusable, match=f"line 1: more than {LONGEST_LINE:,} characters"):
        read_rows("DATA", endless)
    assert time.perf_counter() - start < 5

    monkeypatch.setattr(module, "MOST_ROWS", 3)
    many = tmp_path / "many.jsonl"
    many.write_text("".join(f'{{"prompt": "{n}", "response": "r"}}\n' for n in range(4)) + "broken\n")
    read = read_rows("DATA", many)
    assert len(read.rows) == 3
    assert "the first 3 different rows are used" in read.note
