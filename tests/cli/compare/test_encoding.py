"""What is trained is the answer, with the prompt as the model knows prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from lfu_reg.cli.compare.encoding import IGNORED, Tokens, collate, encode
from lfu_reg.cli.compare.kept import read_kept
from lfu_reg.cli.compare.rows import Row
from lfu_reg.cli.errors import Unusable
from tests.cli.compare.support import SMALL

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}<eos>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SMALL)


def parts(tokens: Tokens, tokenizer: Any) -> tuple[str, str]:
    return tokenizer.decode(tokens.ids[: tokens.start]), tokenizer.decode(tokens.ids[tokens.start :])


def test_completions_go_on_as_they_are(tokenizer: Any) -> None:
    assert parts(encode(Row("ab", " cd"), tokenizer), tokenizer) == ("ab", " cd<eos>")
    assert parts(encode(Row("ab", " cd"), tokenizer, ends=False), tokenizer) == ("ab", " cd")


def test_questions_are_asked_in_the_chat_template(tokenizer: Any) -> None:
    row = Row((("user", "q"),), "a")
    assert parts(encode(row, tokenizer), tokenizer) == ("q\n", "a<eos>")
    tokenizer.chat_template = TEMPLATE
    assert parts(encode(row, tokenizer), tokenizer) == ("[user]q<eos>\n[assistant]", "a<eos>")


def test_a_template_that_writes_answers_otherwise_than_it_asks_for_them(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    assert parts(encode(Row((("user", "q"),), "a"), tokenizer), tokenizer) == ("q!", "a<eos>")


def test_chats_that_cannot_be_asked(tokenizer: Any) -> None:
    chat = Row((("system", "s"), ("user", "u")), "a")
    with pytest.raises(Unusable, match="no chat template"):
        encode(chat, tokenizer)
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(Unusable, match=r"roles system, user: the model's chat template refuses them \(no system\)"):
        encode(chat, tokenizer)


def test_labels_are_the_answers() -> None:
    batch = collate([Tokens((5, 6, 7), 1), Tokens((8, 9), 1)], pad=0, device="cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_what_is_to_be_kept(tmp_path: Path, tokenizer: Any) -> None:
    text, rows = tmp_path / "text.md", tmp_path / "rows.jsonl"
    text.write_text("abcdefghij" * 5)
    kept = read_kept(text, tokenizer, tokens=20, count=8)
    assert [(len(piece.ids), piece.start) for piece in kept.sequences] == [(20, 1), (20, 1)]
    assert not kept.questions
    rows.write_text('{"prompt": "ab", "completion": "c"}\n{"prompt": "ab", "completion": "' + "c" * 30 + '"}\n')
    kept = read_kept(rows, tokenizer, tokens=20, count=8)
    assert [parts(piece, tokenizer) for piece in kept.sequences] == [("ab", "c")]  # no end token, and none too long
    with pytest.raises(Unusable, match="no row has at most 2 tokens"):
        read_kept(rows, tokenizer, tokens=2, count=8)
    text.write_text(" \n")
    with pytest.raises(Unusable, match="holds no text"):
        read_kept(text, tokenizer, tokens=20, count=8)
