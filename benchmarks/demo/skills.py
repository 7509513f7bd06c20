"""The skills of the demo's small model: tasks with exact answers, generated on the fly.

Every skill draws an *item* (its operands) and renders it in one of several prompt formats. Items are split by
a hash of their operands into train, validation and test, so a test item was never seen in any format: not in
pretraining, not in fine-tuning.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Split = Literal["train", "validation", "test"]


class Example(NamedTuple):
    """A prompt and the text that should follow it."""

    prompt: str
    response: str


Item = dict[str, str]


@dataclass(frozen=True)
class Skill:
    """A task: how to draw an item, how to ask for it, what the answer is."""

    name: str
    draw: Callable[[random.Random], Item]
    answer: Callable[[Item], str]
    formats: tuple[str, ...]


def _numbers(names: str) -> Callable[[random.Random], Item]:
    def draw(rng: random.Random) -> Item:
        return {name: str(rng.randint(10, 99)) for name in names}

    return draw


def _larger_number_first(rng: random.Random) -> Item:
    low, high = sorted(rng.randint(10, 99) for _ in range(2))
    return {"a": str(high), "b": str(low)}


def _word(alphabet: str) -> Callable[[random.Random], Item]:
    def draw(rng: random.Random) -> Item:
        return {"w": "".join(rng.choices(alphabet, k=rng.randint(3, 5)))}

    return draw


SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill(
            "add",
            _numbers("ab"),
            lambda item: str(int(item["a"]) + int(item["b"])),
            ("{a}+{b}=", "add {a} {b}: ", "sum of {a} and {b} is "),
        ),
        Skill(
            "subtract",
            _larger_number_first,
            lambda item: str(int(item["a"]) - int(item["b"])),
            ("{a}-{b}=", "take {b} from {a}: ", "{a} minus {b} is "),
        ),
        Skill(
            "max",
            _numbers("xyz"),
            lambda item: max(item.values()),
            ("max {x} {y} {z}=", "top of {x} {y} {z}: ", "largest of {x} {y} {z} is "),
        ),
        Skill(
            "sort",
            _word("0123456789"),
            lambda item: "".join(sorted(item["w"])),
            ("sort {w}=", "arrange {w}: ", "{w} in order is "),
        ),
        Skill(
            "reverse",
            _word("abcdefghij"),
            lambda item: item["w"][::-1],
            ("reverse {w}=", "flip {w}: ", "{w} backwards is "),
        ),
        Skill(
            "capitals",
            _word("abcdefghijklmnopqrstuvwxyz"),
            lambda item: item["w"].upper(),
            ("upper {w}=", "shout {w}: ", "{w} in capitals is "),
        ),
    )
}

# What fine-tuning teaches: subtraction, asked for in a way that pretraining never used.
TUNED_SKILL = "subtract"
NEW_FORMAT = "What is {a} minus {b}? "

# The same question in other words. None of them is trained on, neither in pretraining nor in fine-tuning.
PROMPT_VARIATIONS: tuple[str, ...] = (
    "what is {a} minus {b}? ",
    "How much is {a} minus {b}? ",
    "What is {a}-{b}? ",
    "{a} minus {b}? ",
    "Q: {a} minus {b}? A: ",
    "What is {a} less {b}? ",
)


def split_of(skill: str, item: Item) -> Split:
    """Which split an item belongs to: 80 % train, 10 % validation, 10 % test, by a hash of its operands."""
    bucket = zlib.crc32(f"{skill}:{sorted(item.items())}".encode()) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def draw_item(skill: Skill, split: Split, rng: random.Random) -> Item:
    """Draws an item of the split."""
    while True:
        item = skill.draw(rng)
        if split_of(skill.name, item) == split:
            return item


def render(skill: Skill, item: Item, prompt_format: str) -> Example:
    """Puts an item into words."""
    return Example(prompt_format.format(**item), skill.answer(item))


def mixed_format_examples(skill: Skill, split: Split, count: int, rng: random.Random) -> list[Example]:
    """Draws examples in the skill's own formats, those of pretraining."""
    return [render(skill, draw_item(skill, split, rng), rng.choice(skill.formats)) for _ in range(count)]


def distinct_items(skill: Skill, split: Split, count: int, rng: random.Random) -> list[Item]:
    """Draws different items of a split."""
    items: dict[tuple[str, ...], Item] = {}
    while len(items) < count:
        item = draw_item(skill, split, rng)
        items.setdefault(tuple(item.values()), item)
    return list(items.values())


def new_format_examples(count: int, seed: int, split: Split = "train") -> list[Example]:
    """Draws different questions of the skill that is tuned, in the new format."""
    skill = SKILLS[TUNED_SKILL]
    items = distinct_items(skill, split, count, random.Random(f"{split} {seed}"))
    return [render(skill, item, NEW_FORMAT) for item in items]


def with_wrong_answers(examples: list[Example], fraction: float, rng: random.Random) -> list[Example]:
    """Gives a fraction of the examples the answer of another example, i.e. a plausible wrong label."""
    noisy = list(examples)
    for index in rng.sample(range(len(examples)), round(fraction * len(examples))):
        wrong = [other.response for other in examples if other.response != examples[index].response]
        if wrong:
            noisy[index] = Example(examples[index].prompt, rng.choice(wrong))
    return noisy
