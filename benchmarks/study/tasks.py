"""The tasks of the study, and what a model is examined on; `evidence.tasks.TASKS` gets to know them by import."""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import dataclass, replace

from demo.data import encode
from demo.skills import Example, Split
from evidence import tasks
from evidence.corpus import records
from evidence.finetune import base_of
from evidence.tasks import Task, last_words, old_skills, text_task, texts

from lfu_reg.cli.compare.encoding import Tokens

HEADLINE, LARGE = "study/gsm8k-64", "study/svamp-64"
OTHERS = (
    "study/dolly-64",
    "study/gsm8k-64-wrong",
    "study/boolq-64",
    "study/gsm8k-256",
    "study/dolly-256",
    "study/boolq-256",
)
# On the large model: other kinds of answers, and four times the examples and the steps.
LARGE_OTHERS = ("study/135m-gsm8k-64", "study/135m-svamp-256", "study/135m-dolly-64", "study/135m-boolq-64")
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def _short(key: str, task: Task) -> Task:
    """In 96 tokens; more steps for more examples, but fewer epochs."""
    return replace(task, key=key, max_length=96, steps=64 if key.endswith("256") else 32)


def _svamp() -> tuple[list[Example], list[Example]]:
    rows = [
        Example(f"Question: {r['Body']} {r['Question']}\nEquation:", " " + _equation(r["Equation"], r["Answer"]))
        for r in records("svamp/svamp.jsonl")
    ]
    random.Random("svamp").shuffle(rows)
    return rows[:300], rows[300:]


def _equation(equation: str, answer: float) -> str:
    """`( 76.0 - 25.0 )` and 51 as "76 - 25 = 51"."""
    words = equation.strip().removeprefix("(").removesuffix(")").split()
    return " ".join([*(w.removesuffix(".0") for w in words), "=", f"{answer:g}"])


def _svamp_task(key: str, size: int, steps: int) -> Task:
    def train(seed: int) -> list[Example]:
        return random.Random(f"train {seed}").sample(_svamp()[0], size)

    def held_out(split: Split) -> tuple[list[Example], list[list[Example]]]:
        rows = _svamp()[1]
        return (rows[:100] if split == "validation" else rows[100:]), []

    return Task(key, "smollm2", train, held_out, exact=False, steps=steps, batch_size=4, max_length=96)


def _large(key: str) -> Task:
    name, size = key.removeprefix("study/135m-").split("-")
    if name == "svamp":
        return _svamp_task(key, int(size), 48)
    return replace(text_task(name, int(size)), key=key, base="smollm2", steps=12, max_length=96)


def _made(key: str) -> Task:
    name, size, *wrong = key.removeprefix("study/").split("-")
    return _short(key, text_task(name, int(size), wrong=0.3 if wrong else 0.0))


tasks.TASKS.update({key: _made(key) for key in (HEADLINE, *OTHERS)})
tasks.TASKS.update({key: _large(key) for key in LARGE_OTHERS} | {LARGE: _svamp_task(LARGE, 64, 12)})


@dataclass(frozen=True)
class Battery:
    """What a model is examined on.

    Attributes:
        domain: held-out examples.
        variations: the same in other wordings; may be empty.
        kept: what is to be kept, by name.
        prompts: of the domain, for the divergence from the base model.
    """

    domain: list[Tokens]
    variations: list[Tokens]
    kept: dict[str, list[Tokens]]
    prompts: list[Tokens]


@functools.cache
def battery(key: str, split: Split) -> Battery:
    """Of a task, on validation data or test data."""
    task = tasks.TASKS[key]
    tokenizer = base_of(task.base)[1]

    def tokens(examples: list[Example], length: int, *, ends: bool = False) -> list[Tokens]:
        rows = [encode(tokenizer, example, length, ends) for example in examples]
        return [Tokens(tuple(r["input_ids"]), max(1, r["labels"].count(-100))) for r in rows]

    def every(examples: list[Example], count: int) -> list[Example]:
        return examples[:: max(1, len(examples) // count)][:count]

    domain, others = task.held_out(split)
    small = task.base == "text"
    domain = domain[: 40 if small else 24]
    prompts = [Example("", e.prompt) for e in domain[: 10 if small else 4]]
    variations: list[Example] = list(itertools.chain(*(wording[:4] for wording in others)))
    if small:
        pieces = texts(split)
        skills = [e for listed in old_skills("text", split, 8).values() for e in listed]
        kept = {name: tokens(every(pieces[name], 10), 192) for name in ("wikitext", "novels")}
        kept |= {"lambada": tokens(last_words(split, 20), 160), "skills": tokens(skills, 96, ends=True)}
    else:
        kept = {
            "wikitext": tokens(every(texts(split)["wikitext"], 5), 96),
            "lambada": tokens(_short_passages(split, 8), 96),
            "chat": tokens(_chats(split, 6), 96, ends=True),
        }
    return Battery(tokens(domain, 96, ends=True), tokens(variations, 96, ends=True), kept, tokens(prompts, 96))


def _short_passages(split: Split, count: int) -> list[Example]:
    return [e for e in last_words(split, 200) if len(e.prompt) < 320][:count]


def _chats(split: Split, count: int) -> list[Example]:
    """Instructions with people's answers, in the model's own chat format."""
    rows = [r for r in records("dolly/dolly_3k.jsonl.gz") if not r["input"] and 80 < len(r["output"]) < 240]
    rows = rows[:count] if split == "validation" else rows[-count:]
    return [Example(CHAT.format(r["instruction"]), r["output"]) for r in rows]
