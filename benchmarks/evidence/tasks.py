"""What is fine-tuned on, and what is measured: scarce data in the domain, and what the base model knew besides."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from demo.skills import (
    NEW_FORMAT,
    PROMPT_VARIATIONS,
    SKILLS,
    Example,
    Skill,
    Split,
    distinct_items,
    mixed_format_examples,
    render,
    with_wrong_answers,
)

from evidence.corpus import novels, records, wikitext
from evidence.skills import BASE_SKILLS, FACT_SKILLS, skill_example

WRONG = 0.3  # share of wrong answers in the noisy tasks
TEMPLATES = (
    "Question: {prompt}\nAnswer: ",
    "{prompt}\n",
    "Q: {prompt}\nA: ",
    "Instruction: {prompt}\nOutput: ",
    "{prompt}\n\nResponse:\n",
    "Please answer. {prompt}\nAnswer: ",
)


@dataclass(frozen=True)
class Task:
    """One way to fine-tune one base model.

    Attributes:
        key: its name in the results.
        base: the base model, "skills" or "text".
        train: seed -> training examples.
        held_out: split -> (in-domain examples, the same in other words, one list a wording).
        exact: whether a response counts as a whole (exact match) or token by token.
        steps, batch_size, max_length: of fine-tuning.
    """

    key: str
    base: str
    train: Callable[[int], list[Example]]
    held_out: Callable[[Split], tuple[list[Example], list[list[Example]]]]
    exact: bool = True
    steps: int = 60
    batch_size: int = 8
    max_length: int = 160


def _subtraction(size: int, wrong: float) -> Callable[[int], list[Example]]:
    def train(seed: int) -> list[Example]:
        rng = random.Random(f"train {seed}")
        items = distinct_items(SKILLS["subtract"], "train", size, rng)
        return with_wrong_answers([render(SKILLS["subtract"], i, NEW_FORMAT) for i in items], wrong, rng)

    return train


def _subtraction_held_out(split: Split) -> tuple[list[Example], list[list[Example]]]:
    skill = SKILLS["subtract"]
    items = distinct_items(skill, split, 200, random.Random(f"evaluation {split}"))
    return (
        [render(skill, item, NEW_FORMAT) for item in items],
        [[render(skill, item, words) for item in items[:100]] for words in PROMPT_VARIATIONS],
    )


def _asked(pairs: list[Example], template: str) -> list[Example]:
    return [Example(template.replace("{prompt}", p.prompt), p.response) for p in pairs]


def _pairs(name: str) -> tuple[list[Example], list[Example]]:
    """Training pairs and held-out pairs of a data set."""
    if name == "gsm8k":
        train, test = ([Example(r["question"], r["answer"]) for r in records(f)] for f in
                       ("gsm8k/train.jsonl.gz", "gsm8k/test.jsonl"))  # fmt: skip
        return train, test
    if name == "boolq":
        train, test = ([Example(r["query"], r["choices"][r["gold"]]) for r in records(f"boolq/{part}.jsonl.gz")]
                       for part in ("train", "validation"))  # fmt: skip
        return train, test
    rows = [
        Example(f"{r['instruction']}\n{r['input']}".strip(), r["output"]) for r in records("dolly/dolly_3k.jsonl.gz")
    ]
    random.Random("dolly").shuffle(rows)
    return rows[:2000], rows[2000:]


@functools.cache
def _cached_pairs(name: str) -> tuple[list[Example], list[Example]]:
    return _pairs(name)


def text_task(name: str, size: int, *, wrong: float = 0.0) -> Task:
    """So many examples of a data set, a share of them with the answer of another one."""

    def train(seed: int) -> list[Example]:
        rng = random.Random(f"train {seed}")
        chosen = _asked(rng.sample(_cached_pairs(name)[0], size), TEMPLATES[0])
        return with_wrong_answers(chosen, wrong, rng) if wrong else chosen

    def held_out(split: Split) -> tuple[list[Example], list[list[Example]]]:
        pairs = _cached_pairs(name)[1]
        half = len(pairs) // 2
        chosen = (pairs[:half] if split == "validation" else pairs[half:])[:96]
        return _asked(chosen, TEMPLATES[0]), [_asked(chosen[:32], words) for words in TEMPLATES[1:]]

    return Task(f"{name}-{size}", "text", train, held_out, exact=False, steps=48, batch_size=4, max_length=160)


TASKS: dict[str, Task] = {
    task.key: task
    for task in (
        Task("subtract-128", "skills", _subtraction(128, 0.0), _subtraction_held_out),
        Task("subtract-128-noisy", "skills", _subtraction(128, WRONG), _subtraction_held_out),
        Task("subtract-16", "skills", _subtraction(16, 0.0), _subtraction_held_out),
        # Few and clean examples for many steps: the SFT loss gets near zero, and stays there.
        Task("subtract-32-long", "skills", _subtraction(32, 0.0), _subtraction_held_out, steps=250),
        Task("subtract-1000", "skills", _subtraction(1000, 0.0), _subtraction_held_out, steps=125),
        text_task("gsm8k", 64),
        text_task("dolly", 64),
    )
}


def old(base: str) -> dict[str, Skill]:
    """The skills of a base model that are not fine-tuned."""
    if base == "text":
        return BASE_SKILLS
    return {name: skill for name, skill in SKILLS.items() if name != "subtract"}


def old_skills(base: str, split: Split, count: int = 100) -> dict[str, list[Example]]:
    """What the base model could do that is not fine-tuned, in the formats of its pretraining."""
    rng = random.Random(f"retention {split}")
    result = {}
    for name, skill in old(base).items():
        if name in FACT_SKILLS:
            result[name] = [skill_example(rng, {name: skill}) for _ in range(count)]
        else:
            result[name] = mixed_format_examples(skill, split, count, rng)
    return result


def texts(split: Split, characters: int = 500, count: int = 40) -> dict[str, list[Example]]:
    """Pieces of held-out text, as responses without a prompt."""
    novel = "".join(itertools.islice(novels("validation"), 4))
    parts = {"novels": novel, "wikitext": wikitext("test")}
    result = {}
    for name, text in parts.items():
        half = len(text) // 2
        part = text[:half] if split == "validation" else text[half:]
        stride = len(part) // count
        result[name] = [Example("", part[i * stride : i * stride + characters].strip()) for i in range(count)]
    return result


def last_words(split: Split, count: int = 100) -> list[Example]:
    """LAMBADA: the last word of a passage."""
    rows = records("lambada/test.jsonl.gz")
    rows = rows[:count] if split == "validation" else rows[-count:]
    return [Example(r["context"], " " + r["continuation"]) for r in rows]


@dataclass(frozen=True)
class Choice:
    """A question with ranked answers."""

    prompt: str
    answers: list[str]
    gold: int


def choices(count: int = 40) -> dict[str, list[Choice]]:
    """Multiple choice by likelihood; test items only, as small models are near chance on them."""
    piqa = [
        Choice(f"{r['goal']} ", [r["sol1"], r["sol2"]], r["label"]) for r in records("piqa/validation.jsonl")[:count]
    ]
    hella = [
        Choice(r["query"] + " ", r["choices"], r["gold"]) for r in records("hellaswag/validation_1000.jsonl")[:count]
    ]
    csqa = [
        Choice(r["query"] + " ", r["choices"], r["gold"]) for r in records("commonsense_qa/validation.jsonl")[:count]
    ]
    wino = []
    for r in records("winogrande/validation.jsonl")[:count]:
        before, after = r["sentence"].split("_", 1)
        # The end of the sentence is scored given each option (partial evaluation).
        wino.append((before, [r["option1"], r["option2"]], after, int(r["answer"]) - 1))
    return {
        "piqa": piqa,
        "hellaswag": hella,
        "commonsense_qa": csqa,
        "winogrande": [Choice(b, [f"{o}{after}" for o in options], gold) for b, options, after, gold in wino],
    }
