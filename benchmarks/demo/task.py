"""What the demo trains on and what it scores: the embedded skills, or the user's own pairs."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from demo.data import DataError, read_pairs
from demo.eval import Scores, score
from demo.skills import (
    NEW_FORMAT,
    PROMPT_VARIATIONS,
    SKILLS,
    TUNED_SKILL,
    Example,
    Split,
    distinct_items,
    mixed_format_examples,
    render,
    with_wrong_answers,
)

TRAIN_SIZE = 128  # examples that the demo fine-tunes on

# The first template is trained on; all of them count for the spread over prompt variations.
PAIR_TEMPLATES: tuple[str, ...] = (
    "Question: {prompt}\nAnswer: ",
    "{prompt}\n",
    "Q: {prompt}\nA: ",
    "Instruction: {prompt}\nOutput: ",
    "{prompt}\n\nResponse:\n",
)
# The opening of F. H. Burnett, A Little Princess (1905), in the public domain.
DEFAULT_TEXT = Path(__file__).parent / "retention.txt"


@dataclass(frozen=True)
class Metric:
    """Which number of a Scores object counts, and what it is called."""

    name: str
    pick: Callable[[Scores], float]
    higher_is_better: bool = True


EXACT = Metric("accuracy", lambda scores: scores.exact)
TOKEN_ACCURACY = Metric("token accuracy", lambda scores: scores.token_accuracy)
PERPLEXITY = Metric("perplexity", lambda scores: scores.perplexity, higher_is_better=False)


@dataclass(frozen=True)
class Task:
    """Training examples per seed, and held-out examples of three kinds."""

    description: str
    train: Callable[[int, float], list[Example]]  # (seed, share of wrong answers) -> examples
    in_domain: list[Example]
    variations: list[list[Example]]  # the same kind of question in other words
    metric: Metric  # of the two above
    retention: dict[str, list[Example]]  # what the model could do before and should not forget
    retention_metric: Metric
    retention_name: str = "old skills"
    retention_ends: bool = True  # whether the end token is scored, too


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model."""

    in_domain: float
    in_domain_loss: float
    retention: float  # mean over the parts
    retention_parts: dict[str, float]
    variation_mean: float
    variation_spread: float  # standard deviation over the prompt variations
    variations: list[float]


def evaluate(task: Task, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Evaluation:
    """Scores a model on everything that the task holds out."""
    in_domain = score(model, tokenizer, task.in_domain, max_length)
    parts = {
        name: task.retention_metric.pick(score(model, tokenizer, examples, max_length, ends=task.retention_ends))
        for name, examples in task.retention.items()
    }
    variations = [task.metric.pick(score(model, tokenizer, v, max_length)) for v in task.variations]
    return Evaluation(
        in_domain=task.metric.pick(in_domain),
        in_domain_loss=in_domain.loss,
        retention=statistics.fmean(parts.values()),
        retention_parts=parts,
        variation_mean=statistics.fmean(variations),
        variation_spread=statistics.pstdev(variations),
        variations=variations,
    )


def skills_task(train_size: int, eval_size: int, split: Split = "test") -> Task:
    """Subtraction in a new prompt format, while the other skills should stay."""
    skill = SKILLS[TUNED_SKILL]
    held_out = distinct_items(skill, split, eval_size, random.Random(f"evaluation {split}"))

    def train(seed: int, wrong: float) -> list[Example]:
        draw = random.Random(f"train {seed}")
        items = distinct_items(skill, "train", train_size, draw)
        return with_wrong_answers([render(skill, item, NEW_FORMAT) for item in items], wrong, draw)

    return Task(
        description=f"skill {TUNED_SKILL!r} in a new prompt format ({NEW_FORMAT!r}), {train_size} examples",
        train=train,
        in_domain=[render(skill, item, NEW_FORMAT) for item in held_out],
        # The same items in each wording, so that the spread is one of wordings, not of items.
        variations=[
            [render(skill, item, variation) for item in held_out[: (eval_size + 1) // 2]]
            for variation in PROMPT_VARIATIONS
        ],
        metric=EXACT,
        retention=old_skills(split, (eval_size + 1) // 2),
        retention_metric=EXACT,
    )


def old_skills(split: Split, count: int) -> dict[str, list[Example]]:
    """The skills that are not fine-tuned, in their own formats."""
    rng = random.Random(f"retention {split}")
    return {
        name: mixed_format_examples(skill, split, count, rng) for name, skill in SKILLS.items() if name != TUNED_SKILL
    }


def pairs_task(
    data: Path, train_size: int, eval_size: int, exact_match: bool, retention_file: Path | None, embedded: bool
) -> Task:
    """The user's own prompt/response pairs.

    Retention is the accuracy on the old skills if the embedded model is tuned and no text is given, otherwise the
    perplexity of a general text.
    """
    train_pairs, held_out = _train_and_held_out(data, eval_size)
    metric = EXACT if exact_match else TOKEN_ACCURACY

    def ask(pairs: list[Example], template: str) -> list[Example]:
        return [Example(template.replace("{prompt}", p.prompt), p.response) for p in pairs]

    def train(seed: int, wrong: float) -> list[Example]:
        draw = random.Random(f"train {seed}")
        chosen = draw.sample(train_pairs, min(train_size, len(train_pairs)))
        return with_wrong_answers(ask(chosen, PAIR_TEMPLATES[0]), wrong, draw)

    use_skills = embedded and retention_file is None
    text = retention_file or DEFAULT_TEXT
    return Task(
        description=f"{data}: {min(train_size, len(train_pairs))} training pairs, {len(held_out)} held out",
        train=train,
        in_domain=ask(held_out, PAIR_TEMPLATES[0]),
        variations=[ask(held_out, template) for template in PAIR_TEMPLATES],
        metric=metric,
        retention=old_skills("test", 100) if use_skills else {text.name: text_chunks(text)},
        retention_metric=EXACT if use_skills else PERPLEXITY,
        retention_name="old skills" if use_skills else "general text",
        retention_ends=use_skills,
    )


def _train_and_held_out(data: Path, eval_size: int) -> tuple[list[Example], list[Example]]:
    """A folder's train and test file; a single file is split at random, the same way each time."""
    if data.is_dir() and (train_file := _split_file(data, "train")):
        if test_file := _split_file(data, "test"):
            held_out = read_pairs(test_file)
            return read_pairs(train_file), random.Random(0).sample(held_out, min(eval_size, len(held_out)))
        data = train_file
    pairs = list(dict.fromkeys(read_pairs(data)))  # a duplicate must not be on both sides
    if len(pairs) < 4:
        raise DataError(f"--data {data}: {len(pairs)} different row(s); at least 4 are needed to hold some out")
    random.Random(0).shuffle(pairs)
    held_out = min(eval_size, len(pairs) // 4)
    return pairs[held_out:], pairs[:held_out]


def _split_file(folder: Path, split: str) -> Path | None:
    return next((f for end in ("jsonl", "jsonl.gz") if (f := folder / f"{split}.{end}").is_file()), None)


def text_chunks(path: Path, size: int = 400, most: int = 64) -> list[Example]:
    """A text file in pieces of about `size` characters, as responses without a prompt."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--retention-file {path}: cannot be read as UTF-8 text ({error})") from error
    chunks = [text[start : start + size].strip() for start in range(0, len(text), size)]
    chunks = [chunk for chunk in chunks if len(chunk) > 1]
    if not chunks:
        raise DataError(f"--retention-file {path}: the file holds no text")
    return [Example("", chunk) for chunk in chunks[:most]]
