"""What must not be forgotten: texts, and questions with answers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lfu_reg.cli.compare.encoding import Tokens, encode
from lfu_reg.cli.compare.rows import READING, check_file, open_text, read_rows, unreadable
from lfu_reg.cli.errors import Unusable

CHARACTERS = 2_000_000  # of a text file of any size


@dataclass(frozen=True)
class Kept:
    """A part of what must not be forgotten.

    Attributes:
        name: of its file.
        sequences: whose answers are scored; of a text, all but the first token.
        questions: whether these are questions with answers, and not a text.
    """

    name: str
    sequences: tuple[Tokens, ...]
    questions: bool

    @property
    def unit(self) -> str:
        """What it has several of."""
        return "questions" if self.questions else "pieces of text"


def is_rows(file: Path) -> bool:
    """Whether a file holds rows, and not text, by its name."""
    return file.name.endswith((".jsonl", ".jsonl.gz"))


def read_text(file: Path) -> str:
    """The beginning of a text file.

    Raises:
        Unusable: for a file that is no text.
    """
    check_file("--keep", file)
    try:
        with open_text(file) as opened:
            text: str = opened.read(CHARACTERS)
    except READING as error:
        raise unreadable("--keep", file, error) from error
    if not text.strip():
        raise Unusable(f"--keep {file}: the file holds no text. Give text, or .jsonl rows of questions and answers.")
    return text


def check_kept(file: Path) -> None:
    """Raise, before a model is loaded, for a file that cannot be used."""
    read_rows("--keep", file) if is_rows(file) else read_text(file)


def read_kept(file: Path, tokenizer: Any, tokens: int, count: int) -> Kept:
    """A part of what must not be forgotten, from its file.

    Args:
        file: `.jsonl` rows as of the data, or text.
        tokenizer: of the model.
        tokens: no longer sequences.
        count: as many rows, or a quarter as many pieces of text of `tokens` tokens each.

    Raises:
        Unusable: for a file that cannot be used.
    """
    if is_rows(file):
        rows = read_rows("--keep", file).rows
        encoded = (encode(row, tokenizer, ends=False) for row in rows)
        sequences = list(islice((one for one in encoded if len(one.ids) <= tokens), count))
        if not sequences:
            raise Unusable(f"--keep {file}: no row has at most {tokens} tokens. Give --tokens a larger number.")
        return Kept(file.name, tuple(sequences), questions=True)
    ids = tokenizer(read_text(file), add_special_tokens=False)["input_ids"]
    pieces = [ids[first : first + tokens] for first in range(0, len(ids), tokens)][: max(1, count // 4)]
    sequences = [Tokens(tuple(piece), 1) for piece in pieces if len(piece) > 1]
    if not sequences:
        raise Unusable(f"--keep {file}: {len(ids)} token. Give a text of some thousand words.")
    return Kept(file.name, tuple(sequences), questions=False)
