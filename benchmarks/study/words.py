"""The study in sentences, and where its numbers come from."""

from __future__ import annotations

from textwrap import fill

from evidence import store
from evidence.paired import Estimate
from evidence.store import Rows

from study.analysis import Judged
from study.cells import MAIN, STAGES, chosen
from study.tables import gap, name_of, shown
from study.tasks import HEADLINE, LARGE, LARGE_OTHERS, OTHERS


def _against(found: Estimate | None) -> str:
    """`0.012 ± 0.008 nats less`, where the interval has no zero in it."""
    if found is None:
        return "has not run"
    words = "less" if found.mean > 0 else "more"
    certain = found.count > 1 and abs(found.mean) > found.half_width
    interval = f" ± {found.half_width:.3f}" if found.count > 1 else ""
    seeds = f"{found.count} seed{'s' * (found.count > 1)}"
    return f"{abs(found.mean):.3f}{interval} nats {words} ({seeds}{'' if certain else ', may be chance'})"


def _regime(rows: Rows, task: str) -> tuple[float, float]:
    """What SFT gains in the domain at the rate that tuning chose, and what it forgets."""
    judged = Judged.of(rows, task)
    loss, forgot = judged.means(judged.tuned("SFT"))
    return judged.means([{"points": [judged.start]}], 0.0)[0] - loss, forgot


def short(rows: Rows) -> str:
    """One sentence."""
    small = Judged.of(rows, HEADLINE)
    lora, steering = (gap(small, small.first(label)) for label in MAIN[:2])
    rates = gap(small, small.first("LfU steering"), by_scale=False)
    return (
        "at equal loss in the domain (64 examples of GSM8K, 2.2 M parameters) LfU with steering vectors forgets "
        f"{_against(rates)} than SFT at other learning rates, and {_against(steering)} than SFT whose adapter may also be "
        f"scaled after training, which costs nothing; with LoRA {_against(lora)}."
    )


def readme(rows: Rows) -> str:
    """A few lines."""
    small, large = Judged.of(rows, HEADLINE), Judged.of(rows, LARGE)
    big, kl = gap(large, large.tuned("LfU LoRA")), gap(small, small.first("KL to base"))
    sentence = short(rows)
    words = (
        f"{sentence[0].upper()}{sentence[1:]} A KL penalty to the base model forgets {_against(kl)} than that. On "
        f"SmolLM2-135M (64 examples of SVAMP) LfU with LoRA forgets {_against(big)}, where tuned SFT forgets "
        f"{_regime(rows, LARGE)[1]:.3f} in all. [The study, when to use LfU and when something cheaper](docs/evidence.md)."
    )
    return fill(words, 150, break_long_words=False, break_on_hyphens=False)


def regimes(rows: Rows) -> str:
    """How much SFT forgets where it is at its best."""
    lines = []
    for task in (HEADLINE, LARGE):
        gained, lost = _regime(rows, task)
        rate = chosen(rows, task)["SFT"].lr
        lines.append(
            f"* {name_of(task)}: at rate {rate:g} it gains {gained:.3f} nats in the domain and forgets {lost:.3f}."
        )
    return "\n".join(lines)


def others(rows: Rows) -> str:
    """The gaps on the other tasks, as far as they were reached."""
    lines = []
    for task in (*LARGE_OTHERS, *OTHERS):
        if any(row["task"] == task and row["experiment"].endswith("others") for row in rows):
            judged = Judged.of(rows, task)
            found = {label: gap(judged, judged.first(label)) for label in MAIN}
            gaps = ", ".join(f"{label} {shown(value)}" for label, value in found.items() if value)
            lines.append(f"* {name_of(task)}: {gaps or 'not a whole seed'}")
    return "\n".join(lines or ["None was reached."])


def provenance(rows: Rows) -> str:
    """Where the numbers come from, and what was planned and not reached."""
    done = {store.spec_of(row).key() for row in rows}
    planned = {name: stage(rows) for name, stage in STAGES.items()}
    counts = ", ".join(
        f"{name} {sum(s.key() in done for s in specs)} of {len(specs)}" for name, specs in planned.items()
    )
    commits = ", ".join(dict.fromkeys(row["benchmarks"] for row in rows))
    commands = "; ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))
    hours = sum(row["seconds"] for row in rows) / 3600
    first = rows[0]
    return (
        f"{len(rows)} runs in `benchmarks/results/study.jsonl`, {hours:.1f} core-hours. Planned runs that were reached: {counts} "
        f"(of the other tasks, only those whose rates were tuned are planned yet).\n\nCommits {commits}; {commands}; torch {first['torch']}, "
        f"transformers {first['transformers']}, peft {first['peft']}, python {first['python']}, {first['hardware']}. Every row has all of these, "
        "its task, method, settings, rate, seed and split, and the scores at every scale; `python -m study` carries out what is missing."
    )
