"""What the figure shows, from the result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from evidence.control import at_equal_rate, sft_at
from evidence.paired import estimate
from evidence.store import Rows
from study.analysis import Judged
from study.cells import chosen
from study.tasks import HEADLINE

SFT, OTHER, LFU = "sft", "other", "lfu"
COST = {
    "sft": "SFT",
    "steering-late": "LfU steering, last third of layers",
    "lora-late": "LfU LoRA, last third of layers",
    "steering": "LfU steering",
    "lora": "LfU LoRA",
}

COMPARISON, TASK = "compare-text", "gsm8k-64"
# Beside SFT at their own learning rate: two flavours of LfU, what the direction does, and the strongest other method.
KEPT = {
    "LfU steering": LFU,
    "LfU steering, random direction at its settings": OTHER,
    "LfU LoRA": LFU,
    "KL to base": OTHER,
}

STUDIED = {"SFT": SFT, "LfU steering": LFU, "LfU LoRA": LFU, "KL to base": OTHER}
ENOUGH_SEEDS = 5


@dataclass(frozen=True)
class Bar:
    """One line.

    Attributes:
        label: in front of it.
        value: its length.
        kind: which colour.
        half_width: of the 95 % interval of the difference to SFT; 0 where there is none.
        note: behind it.
    """

    label: str
    value: float
    kind: str
    half_width: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """Bars under a title, with what they are in small print, and what a reader has to know besides."""

    title: str
    subtitle: str
    bars: Sequence[Bar]
    caption: str = ""


def cost(step: Mapping[str, Any]) -> Panel:
    """Of a result of `lfu-reg overhead`."""
    ratio = {row["key"]: row["ratio"] for row in step["rows"]}
    bars = [Bar(label, ratio[key], SFT if key == "sft" else LFU) for key, label in COST.items()]
    return Panel("Cost: time of a step (SFT: 1)", "Small Llama, LoRA fine-tuning, one CPU thread", bars)


def benefit(evidence: Rows, study: Rows) -> Panel:
    """Of the study once it has enough seeds, and of the evidence before."""
    return studied(study) or kept(evidence)


def kept(rows: Rows) -> Panel:
    """What is kept of the base model, beside SFT at the same learning rate; last, SFT at the lowest one."""
    retention = at_equal_rate(rows, COMPARISON, "retention")
    learnt = at_equal_rate(rows, COMPARISON, "in_domain")
    lowest = min(row["lr"] for row in rows if row["experiment"] == COMPARISON and row["label"] == "SFT")
    bars: list[Bar] = []

    def sft(rate: float) -> tuple[float, float]:
        plain = sft_at(rows, TASK, rate, COMPARISON)
        means = [fmean(row[name] for row in plain) for name in ("retention", "in_domain")]
        bar = Bar(f"SFT, rate {rate:g}", means[0], SFT, note=_learns(means[1]))
        if bar not in bars:
            bars.append(bar)
        return means[0], means[1]

    for label, kind in KEPT.items():
        rate, difference = retention[TASK, label]
        before, right = sft(rate)
        gained = right + learnt[TASK, label][1].mean
        shown = label.removesuffix(" at its settings")
        bars.append(Bar(shown, before + difference.mean, kind, difference.half_width, _learns(gained)))
    sft(lowest)
    return Panel(
        "Benefit: what is kept of what the model could do",
        "2.2 M parameters, 64 examples of GSM8K, 5 seeds; learns: share of tokens right",
        bars,
        "The methods below an SFT bar have its learning rate; lines are 95 % intervals of the difference to it.",
    )


def _learns(share: float) -> str:
    return f"learns {share:.2f}"


def studied(rows: Rows) -> Panel | None:
    """What is forgotten, of the study's headline: SFT as tuned and scaled, LfU and a KL penalty as tuned."""
    if "SFT" not in chosen(rows, HEADLINE):
        return None
    judged = Judged.of(rows, HEADLINE)
    found = {label: judged.tuned(label) for label in STUDIED}
    by_seed = {label: {row["seed"]: row for row in cell} for label, cell in found.items()}
    seeds = sorted(set.intersection(*map(set, by_seed.values())))
    if len(seeds) < ENOUGH_SEEDS:
        return None
    cells = {label: [cell[seed] for seed in seeds] for label, cell in by_seed.items()}
    plain, bars = judged.places(cells["SFT"]), []
    wanted = [("SFT", 1.0), ("SFT", 0.5), *((label, 1.0) for label in STUDIED if label != "SFT")]
    for label, scale in wanted:
        places = judged.places(cells[label], scale)
        against = estimate([a - b for (_, a), (_, b) in zip(places, plain, strict=True)])
        name = label if scale == 1 else f"{label}, adapter x {scale:g}"
        loss, forgot = judged.means(cells[label], scale)
        half_width = 0.0 if places == plain else against.half_width
        bars.append(Bar(name, forgot, STUDIED[label], half_width, f"loss {loss:.2f}"))
    return Panel(
        "Benefit: what is forgotten, nats per token (less is better)",
        f"2.2 M parameters, 64 examples of GSM8K, {len(seeds)} seeds; loss: on new questions",
        bars,
        "Each method as tuned; lines are 95 % intervals of the difference to SFT.",
    )
