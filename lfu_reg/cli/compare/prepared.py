"""Everything that a comparison needs, checked in the order of what it costs to find out that it cannot be used."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

from lfu_reg.cli.compare.encoding import Tokens, encode
from lfu_reg.cli.compare.kept import Kept, check_kept, read_kept
from lfu_reg.cli.compare.loading import check_name, load_tokenizer
from lfu_reg.cli.compare.plan import Setting
from lfu_reg.cli.compare.rows import Row, Rows, read_rows
from lfu_reg.cli.errors import Unusable

FEWEST = 8  # rows
SHOWN = 3  # answers


@dataclass(frozen=True)
class Prepared:
    """What is trained on and scored on.

    Attributes:
        tokenizer: of the model.
        train: rows to train on.
        held_out: rows to score on.
        kept: what must not be forgotten.
        questions: the first rows that are held out, as text: what is asked, and the answer.
        notes: what the user should know about these.
    """

    tokenizer: Any
    train: tuple[Tokens, ...]
    held_out: tuple[Tokens, ...]
    kept: tuple[Kept, ...]
    questions: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of all tokens: whether these are the same rows as before."""
        everything = repr((self.train, self.held_out, self.kept))
        return hashlib.sha256(everything.encode()).hexdigest()[:12]


def prepare(setting: Setting) -> Prepared:
    """Read and check the files, then the model's name and its tokenizer.

    Raises:
        Unusable: for what cannot be used.
    """
    read = read_rows("DATA", setting.data)
    for file in setting.keep:
        check_kept(file)
    config = check_name(setting.model)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and setting.tokens > positions:
        raise Unusable(f"--tokens {setting.tokens}: {setting.model} has {positions} positions. Give at most that.")
    tokenizer = load_tokenizer(setting.model)
    rows, sequences, notes = _chosen(read, tokenizer, setting)
    enough = len(rows) == setting.train + setting.held_out
    count = setting.held_out if enough else min(setting.held_out, len(rows) // 4)
    kept = tuple(read_kept(file, tokenizer, setting.tokens, setting.held_out) for file in setting.keep)
    train, held_out = sequences[count : count + setting.train], sequences[:count]
    questions = tuple((row.asked, row.answer) for row in rows[: min(count, SHOWN)])
    return Prepared(tokenizer, tuple(train), tuple(held_out), kept, questions, notes)


def _chosen(read: Rows, tokenizer: Any, setting: Setting) -> tuple[list[Row], list[Tokens], tuple[str, ...]]:
    """As many rows as are needed, drawn the same way each time; those that are too long are left out."""
    rows: list[Row] = random.Random(0).sample(read.rows, len(read.rows))
    found: dict[Row, Tokens] = {}
    looked_at = 0
    for row in rows:
        if len(found) == setting.train + setting.held_out:
            break
        sequence = encode(row, tokenizer)
        if len(sequence.ids) <= setting.tokens:
            found[row] = sequence
        looked_at += 1
    if len(found) < FEWEST:
        raise Unusable(
            f"DATA {setting.data}: {len(found)} of {len(rows)} different rows have at most {setting.tokens} tokens; "
            f"at least {FEWEST} are needed. Give more rows, or a larger --tokens."
        )
    too_long = looked_at - len(found)
    long = f"{too_long} of {looked_at} rows have more than {setting.tokens} tokens and are left out (--tokens)."
    return list(found), list(found.values()), tuple(note for note in (read.note, long if too_long else "") if note)
