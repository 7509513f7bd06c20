"""The small model's skills, its tokenizing and its scores."""

import json
import random

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from demo.data import IGNORED, collate, encode
from demo.eval import score
from demo.load import EMBEDDED_MODEL, ModelError, load_model
from demo.skills import (
    NEW_FORMAT,
    PROMPT_VARIATIONS,
    SKILLS,
    TUNED_SKILL,
    Example,
    distinct_items,
    mixed_format_examples,
    new_format_examples,
    split_of,
    with_wrong_answers,
)


@pytest.fixture(scope="module")
def embedded():
    return load_model(str(EMBEDDED_MODEL), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("skill", "item", "answer"),
    [
        ("add", {"a": "47", "b": "85"}, "132"),
        ("subtract", {"a": "80", "b": "17"}, "63"),
        ("max", {"x": "31", "y": "94", "z": "49"}, "94"),
        ("sort", {"w": "30531"}, "01335"),
        ("reverse", {"w": "abcd"}, "dcba"),
        ("capitals", {"w": "xyz"}, "XYZ"),
    ],
)
def test_skills_answer_correctly(skill, item, answer):
    assert SKILLS[skill].answer(item) == answer


@pytest.mark.parametrize("skill", SKILLS.values(), ids=SKILLS)
def test_formats_show_every_operand(skill):
    item = skill.draw(random.Random(0))
    for prompt_format in skill.formats:
        assert all(value in prompt_format.format(**item) for value in item.values())


def test_splits_share_no_item():
    skill = SKILLS[TUNED_SKILL]
    splits = {
        split: {tuple(i.items()) for i in distinct_items(skill, split, 100, random.Random(0))}
        for split in ("train", "validation", "test")
    }
    assert all(len(items) == 100 for items in splits.values())
    assert not splits["train"] & splits["test"]
    assert not splits["train"] & splits["validation"]
    assert not splits["validation"] & splits["test"]
    assert {split_of("add", {"a": "1", "b": str(n)}) for n in range(100)} == {"train", "validation", "test"}


def test_new_formats_are_new():
    known = {f for skill in SKILLS.values() for f in skill.formats}
    assert len(set(PROMPT_VARIATIONS)) >= 5
    assert not known & {NEW_FORMAT, *PROMPT_VARIATIONS}
    assert NEW_FORMAT not in PROMPT_VARIATIONS


def test_wrong_answers_are_wrong_and_as_many_as_asked_for():
    examples = mixed_format_examples(SKILLS["subtract"], "train", 50, random.Random(0))
    noisy = with_wrong_answers(examples, 0.3, random.Random(0))
    assert sum(a.response != b.response for a, b in zip(examples, noisy, strict=True)) == 15
    assert [e.prompt for e in noisy] == [e.prompt for e in examples]


def test_seeds_draw_different_data_and_the_same_again():
    assert new_format_examples(16, seed=0) == new_format_examples(16, seed=0) != new_format_examples(16, seed=1)


def test_labels_cover_response_and_end_token(embedded):
    _, tokenizer = embedded
    row = encode(tokenizer, Example("ab=", "cd"), max_length=64)
    assert tokenizer.decode([i for i in row["labels"] if i != IGNORED]) == "cd<eos>"
    assert row["labels"][:3] == [IGNORED] * 3
    assert len(row["input_ids"]) == len(row["labels"]) == 6


@pytest.mark.parametrize(("prompt", "response"), [(100, 3), (3, 100), (100, 100), (0, 100)])
def test_long_examples_are_cut_on_both_sides(embedded, prompt, response):
    _, tokenizer = embedded
    row = encode(tokenizer, Example("a" * prompt, "b" * response), max_length=20)
    kept = sum(label != IGNORED for label in row["labels"])
    assert len(row["input_ids"]) == 20
    assert kept == {3: 4, 100: 10}[response] or (prompt < 10 and kept == 20 - prompt)


def test_padding_is_masked(embedded):
    _, tokenizer = embedded
    rows = [encode(tokenizer, Example("ab=", "c" * n), 64) for n in (1, 4)]
    batch = collate(rows, tokenizer.pad_token_id, torch.device("cpu"))
    assert batch["attention_mask"].sum(1).tolist() == [5, 8]
    assert batch["labels"][0, 5:].eq(IGNORED).all()


def test_tokenizer_copes_with_any_text(embedded):
    _, tokenizer = embedded
    ids = tokenizer("naïve\n学习")["input_ids"]
    assert len(ids) == 8
    assert ids.count(tokenizer.unk_token_id) == 3


def test_exact_match_is_what_greedy_decoding_gives(embedded):
    model, tokenizer = embedded
    examples = mixed_format_examples(SKILLS["reverse"], "test", 8, random.Random(1))
    examples += [Example("Zebra crossing? ", "yes"), Example("shout cab: ", "CAR")]
    for example in examples:
        ids = tokenizer(example.prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)[0, ids.shape[1] :]
        decoded = tokenizer.decode(out).split("<eos>")[0]
        assert score(model, tokenizer, [example]).exact == float(decoded == example.response)


def test_embedded_model_is_small_and_has_learned_its_skills(embedded):
    model, tokenizer = embedded
    assert sum(f.stat().st_size for f in EMBEDDED_MODEL.iterdir()) <= 5e6
    entries = [json.loads(line) for line in (EMBEDDED_MODEL / "pretrain_log.jsonl").read_text().splitlines()]
    assert entries[-1]["event"] == "end"
    assert set(entries[-1]["validation_accuracy"]) == set(SKILLS)
    for skill in SKILLS.values():
        examples = mixed_format_examples(skill, "test", 64, random.Random(0))
        assert score(model, tokenizer, examples).exact > 0.9, skill.name


@pytest.mark.parametrize(
    ("name", "message"),
    [("./missing/model", "no such folder"), ("{empty}", "no config.json"), ("{broken}", "cannot be loaded")],
)
def test_unusable_models_are_explained(tmp_path, name, message):
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    name = name.format(empty=tmp_path / "empty", broken=tmp_path / "broken")
    with pytest.raises(ModelError, match=message):
        load_model(name, torch.device("cpu"), torch.float32)
