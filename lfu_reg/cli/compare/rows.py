"""The user's rows: questions with answers, from a file of JSON lines, whatever else the file may turn out to be."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfu_reg.cli.errors import Unusable

MOST_ROWS, LONGEST_LINE = 20_000, 1_000_000  # of a file of any size; what is beyond them is not read

ALLOWED = "prompt/response, question/answer, instruction[/input]/output, prompt/completion, messages"
# A question is asked in the model's chat template; a completion goes on where its prompt ends.
ASKED = (("prompt", "response", None), ("question", "answer", None), ("instruction", "output", "input"))

Message = tuple[str, str]  # role, content


@dataclass(frozen=True)
class Row:
    """What a model is given, and what it should answer.

    Attributes:
        prompt: text that the answer follows as it is, or the messages of a chat.
        answer: text.
    """

    prompt: str | tuple[Message, ...]
    answer: str

    @property
    def asked(self) -> str:
        """The prompt, or what was said last."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1][1]


@dataclass(frozen=True)
class Rows:
    """What was read of a file.

    Attributes:
        rows: different ones, in the file's order.
        note: what of the file was left out; empty if nothing was.
    """

    rows: tuple[Row, ...]
    note: str = ""


def read_rows(option: str, file: Path) -> Rows:
    """Rows of a `.jsonl` or `.jsonl.gz` file.

    Raises:
        Unusable: naming option, file and line, for whatever cannot be used.
    """
    check_file(option, file)
    rows: dict[Row, None] = {}
    note = ""
    for number, line in _lines(option, file):
        if len(rows) == MOST_ROWS:
            note = f"{file}: the first {MOST_ROWS:,} different rows are used, and the rest is not read."
            break
        rows.setdefault(_row(f"{option} {file}, line {number}", line))
    if not rows:
        raise Unusable(f"{option} {file}: the file has no rows. Give one JSON object a line, with {ALLOWED}.")
    return Rows(tuple(rows), note)


def check_file(option: str, file: Path) -> None:
    """Raise unless there is such a file."""
    if file.is_dir():
        inside = sorted(entry.name for entry in file.iterdir() if entry.is_file())
        raise Unusable(f"{option} {file}: a folder. Give one file; in it are {', '.join(inside[:10]) or 'no files'}.")
    if not file.is_file():
        raise Unusable(f"{option} {file}: there is no such file in {Path.cwd()}. Check the path.")


def open_text(file: Path) -> Any:
    """The file as UTF-8 text, unpacked if its name ends with .gz."""
    return gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")


def unreadable(option: str, file: Path, error: Exception) -> Unusable:
    """What to raise for a file that is no text."""
    return Unusable(f"{option} {file}: cannot be read as UTF-8 text ({error}). Give a text file, or one packed as .gz.")


READING = (OSError, UnicodeDecodeError, EOFError, zlib.error)  # what reading a file that is no text raises


def _lines(option: str, file: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with open_text(file) as text:
            while line := text.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE:
                    raise Unusable(
                        f"{option} {file}, line {number}: more than {LONGEST_LINE:,} characters. Give one JSON object "
                        "a line; of a JSON list, jq -c '.[]' makes one."
                    )
                if line.strip():
                    yield number, line
    except READING as error:
        raise unreadable(option, file, error) from error


def _row(where: str, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise Unusable(f"{where}: not JSON ({reason}). Give one JSON object a line, with {ALLOWED}.") from error
    if not isinstance(row, dict):
        raise Unusable(f"{where}: a {type(row).__name__}. Give one JSON object a line, with {ALLOWED}.")
    if "messages" in row:
        return _conversation(where, row["messages"])
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        return _conversation(where, [*row["prompt"], *row["completion"]])
    if "prompt" in row and "completion" in row:
        return Row(_text(where, "prompt", row["prompt"]), _text(where, "completion", row["completion"]))
    for question, answer, context in ASKED:
        if question in row and answer in row:
            asked = _text(where, question, row[question])
            more = row.get(context) if context else None
            asked = f"{asked}\n{_text(where, str(context), more)}" if more else asked
            return Row((("user", asked),), _text(where, answer, row[answer]))
    found = ", ".join(list(map(str, row))[:12]) or "none"
    raise Unusable(f"{where}: the fields are {found}; allowed are {ALLOWED}. Rename the file's fields to one of these.")


def _text(where: str, field: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise Unusable(f"{where}: {field!r} is {_short(value)}. Give text that is not empty.")
    return str(value)


def _conversation(where: str, messages: Any) -> Row:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise Unusable(f'{where}: messages are {_short(messages)}. Give a list of {{"role": ..., "content": text}}.')
    turns = tuple((message["role"], message["content"]) for message in messages)
    if len(turns) < 2 or turns[-1][0] != "assistant" or not turns[-1][1].strip():
        raise Unusable(
            f"{where}: the roles are {', '.join(role for role, _ in turns) or 'none'}. The last of at least two "
            "messages has to be the assistant's answer, since that is what is trained."
        )
    return Row(turns[:-1], turns[-1][1])


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
