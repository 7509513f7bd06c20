"""Which runs, in which order: the most important first, seeds outermost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from demo.skills import Split
from evidence import store
from evidence.finetune import Spec
from evidence.grids import LRS, Entry
from evidence.run import missing
from evidence.store import Rows, spec_of
from methods import GRIDS

from lfu_reg.cli.compare.curves import place
from study.tasks import HEADLINE, LARGE, LARGE_OTHERS, OTHERS

RESULTS = store.RESULTS.with_name("study.jsonl")
TUNING_SEED, SEEDS, FEW = 100, 10, 3
SCALES, OWN_SCALES = (0.25, 0.5, 0.75, 1.0), (0.75, 1.0)
SFT_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
LARGE_RATES = (1e-3, 2e-3, 4e-3)
MAIN = ("LfU LoRA", "LfU steering", "KL to base")
LARGE_MORE_RATES = (5e-4, 4e-3)  # of SFT, on test data
ACCURACY = "135M accuracy"
LARGE_MAIN = ("LfU LoRA", "KL to base", "LfU steering")  # in the order of the runs
LARGE_RIVALS = ("L2-SP", "DFT", "EAFT", "TALR", "STM", "FLOW", "ASFT")


def _lfu(flavour: str) -> tuple[dict[str, object], ...]:
    return tuple({"flavour": flavour, "strength": strength} for strength in (0.3, 1.0, 3.0))


ENTRIES = {
    entry.label: entry
    for entry in (
        Entry("SFT", "sft"),
        Entry("LfU LoRA", "lfu", _lfu("lora")),
        Entry("LfU steering", "lfu", _lfu("steering")),
        Entry("KL to base", "kl-to-base", GRIDS["kl-to-base"]),
        Entry("L2-SP", "l2-sp", GRIDS["l2-sp"]),
        Entry("DFT", "dft"),
        Entry("EAFT", "eaft"),
        Entry("TALR", "talr"),
        Entry("STM", "stm", GRIDS["stm"]),
        Entry("FLOW", "flow", GRIDS["flow"]),
        Entry("ASFT", "asft", GRIDS["asft"]),
        Entry("steering-only", "steering-only"),
    )
}
FASTER = {"steering-only": 50}  # vectors want larger rates than adapters
CONTROLS = {"random direction": "extra-random-gradient", "opposite direction": "lfu-negative"}


def cells(label: str, *, middle: bool = True) -> list[Spec]:
    """Three rates of a method, at the middle strength, or at the other strengths."""
    rates = {rate * FASTER.get(label, 1): rate for rate in LRS}
    every = [replace(cell, lr=cell.lr * FASTER.get(label, 1)) for cell in ENTRIES[label].cells()]
    settings = list(dict.fromkeys(cell.settings for cell in every))
    return [cell for cell in every if cell.lr in rates and (cell.settings == settings[len(settings) // 2]) == middle]


def base(task: str, split: Split) -> Spec:
    """The base model, which is scored once a task and split."""
    return Spec("base", task, "base", "base model", split=split, lr=0.0)


def base_of_rows(rows: Rows, task: str, split: Split) -> dict[str, object]:
    """What the base model scored."""
    wanted = ("base", task, split)
    return next(row["points"][0] for row in rows if (row["experiment"], row["task"], row["split"]) == wanted)


def chosen(rows: Rows, task: str) -> dict[str, Spec]:
    """The cell of each method with the lowest domain loss + forgotten on validation data."""
    best: dict[str, tuple[float, Spec]] = {}
    for row in rows:
        if (row["experiment"], row["task"]) == ("tune", task):
            total = sum(place(row["points"][-1], base_of_rows(rows, task, "validation")))
            if row["label"] not in best or total < best[row["label"]][0]:
                best[row["label"]] = (total, spec_of(row))
    return {label: spec for label, (_, spec) in best.items()}


def tune(rows: Rows) -> list[Spec]:
    """Three rates a method on the headline's validation data."""
    specs = [
        replace(cell, experiment="tune", task=HEADLINE, split="validation", seed=TUNING_SEED)
        for label in ENTRIES
        for cell in cells(label)
    ]
    return [base(HEADLINE, "validation"), base(HEADLINE, "test"), *specs]


def headline(rows: Rows) -> list[Spec]:
    """Every method's cell, SFT's rates, LfU's and KL's strengths, and the controls; ten seeds for what is judged."""
    best = chosen(rows, HEADLINE)
    if set(best) < set(ENTRIES):
        return []
    specs = []
    for seed in range(SEEDS):
        at = {"experiment": "headline", "task": HEADLINE, "split": "test", "seed": seed}
        listed = [replace(best["SFT"], lr=rate) for rate in SFT_RATES]
        listed += [best[label] for label in MAIN]
        if seed < FEW:
            listed += [_control(best["LfU steering"], label) for label in CONTROLS]
            listed += [best[label] for label in ENTRIES if label not in (*MAIN, "SFT")]
            listed += [cell for label in MAIN for cell in cells(label, middle=False) if cell.lr == best[label].lr]
        specs += [replace(cell, **at) for cell in listed]
    return specs


def _control(cell: Spec, label: str) -> Spec:
    settings = {k: v for k, v in json.loads(cell.settings).items() if k != "flavour"}
    return replace(cell, method=CONTROLS[label], label=label, settings=json.dumps(settings, sort_keys=True))


def others(rows: Rows) -> list[Spec]:
    """The main methods on the other tasks, their rates tuned there; a task at a time."""
    specs = []
    best = chosen(rows, HEADLINE)
    if set(best) < set(ENTRIES):
        return []
    for task in OTHERS:
        specs += [base(task, "validation"), base(task, "test")]
        specs += [
            replace(best[label], experiment="tune", task=task, split="validation", seed=TUNING_SEED, lr=rate)
            for label in MAIN
            for rate in LRS
        ]
        own = chosen(rows, task)
        if set(own) != set(MAIN):
            break
        for seed in range(FEW):
            listed = [*(replace(best["SFT"], lr=rate) for rate in LRS), *(own[label] for label in MAIN)]
            specs += [replace(cell, experiment="others", task=task, split="test", seed=seed) for cell in listed]
    return specs


def large(rows: Rows) -> list[Spec]:
    """135 M: the regime first, then seeds of SFT's rates, LfU at strength 1 and KL to base."""
    specs = [base(LARGE, "validation"), base(LARGE, "test")]
    sft = replace(cells("SFT")[0], task=LARGE)
    specs += [replace(sft, experiment="tune", split="validation", seed=TUNING_SEED, lr=rate) for rate in LARGE_RATES]
    if sum((row["experiment"], row["task"]) == ("tune", LARGE) for row in rows) < len(LARGE_RATES):
        return specs
    rate = chosen(rows, LARGE)["SFT"].lr
    for seed in range(SEEDS):
        listed = [
            *(replace(sft, lr=each) for each in _neighbours(rate)),
            *(replace(cells(m)[0], lr=rate) for m in LARGE_MAIN),
        ]
        specs += [replace(cell, experiment="135M", task=LARGE, split="test", seed=seed) for cell in listed]
    return specs


def large_tuned(rows: Rows) -> list[Spec]:
    """135 M: a rate for every method by SFT's rule and budget, then seeds; what `large` ran is not run again."""
    specs = [
        replace(cell, experiment="tune", task=LARGE, split="validation", seed=TUNING_SEED, lr=rate)
        for label in (*LARGE_MAIN, *LARGE_RIVALS)
        for cell, rate in zip(cells(label), LARGE_RATES, strict=True)
    ]
    if missing(specs, rows):
        return specs
    best = chosen(rows, LARGE)
    for seed in range(SEEDS):
        labels = (*LARGE_MAIN, *LARGE_RIVALS) if seed < FEW else LARGE_MAIN
        specs += [replace(best[label], experiment="135M", split="test", seed=seed) for label in labels]
    return specs


def large_rates(rows: Rows) -> list[Spec]:
    """135 M: two more rates of SFT, so that its curve has four, as on the small model."""
    sft = replace(cells("SFT")[0], experiment="135M", task=LARGE, split="test")
    return [replace(sft, lr=rate, seed=seed) for seed in range(SEEDS) for rate in LARGE_MORE_RATES]


def large_strengths(rows: Rows) -> list[Spec]:
    """135 M: the other strengths of the main methods, each at the rate that was chosen at its middle one."""
    best = chosen(rows, LARGE)
    grid = {label: dict.fromkeys(cell.settings for cell in cells(label, middle=False)) for label in LARGE_MAIN}
    return [
        replace(best[label], experiment="135M", split="test", seed=seed, settings=settings)
        for seed in range(FEW)
        for label in LARGE_MAIN
        for settings in grid[label]
    ]


def large_accuracy(rows: Rows) -> list[Spec]:
    """135 M: SFT and the main methods at their rates once more, and PIQA and WinoGrande."""
    best = chosen(rows, LARGE)
    start = replace(base(LARGE, "test"), experiment=ACCURACY)
    return [start] + [
        replace(best[label], experiment=ACCURACY, split="test", seed=seed)
        for seed in range(FEW)
        for label in ("SFT", *LARGE_MAIN)
    ]


def large_others(rows: Rows) -> list[Spec]:
    """135 M: SFT and the main methods on other tasks, their rates tuned there; a task at a time."""
    specs: list[Spec] = []
    for task in LARGE_OTHERS:
        specs += [base(task, "validation"), base(task, "test")]
        tuning = [
            replace(cells(label)[0], experiment="tune", task=task, split="validation", seed=TUNING_SEED, lr=rate)
            for rate in LARGE_RATES
            for label in ("SFT", *LARGE_MAIN)
        ]
        specs += tuning
        if missing(tuning, rows):
            continue
        own = chosen(rows, task)
        for seed in range(FEW):
            listed = [*(replace(own["SFT"], lr=rate) for rate in LARGE_RATES), *(own[label] for label in LARGE_MAIN)]
            specs += [replace(cell, experiment="135M others", split="test", seed=seed) for cell in listed]
    return specs


def _neighbours(rate: float) -> tuple[float, float]:
    """A rate of the large model and the next higher one, or the next lower one if there is none."""
    place = min(LARGE_RATES.index(rate), len(LARGE_RATES) - 2)
    return LARGE_RATES[place], LARGE_RATES[place + 1]


STAGES: dict[str, Callable[[Rows], list[Spec]]] = {
    "tune": tune,
    "headline": headline,
    "large": large,
    "large-tuned": large_tuned,
    "large-rates": large_rates,
    "large-accuracy": large_accuracy,
    "large-strengths": large_strengths,
    "large-others": large_others,
    "others": others,
}


def scales(spec: Spec) -> tuple[float, ...]:
    """At which the adapter is scored, after training."""
    if spec.method == "sft" and spec.experiment != "tune":
        return (1.0,) if spec.experiment == ACCURACY else SCALES[1:] if "135M" in spec.experiment else SCALES
    return OWN_SCALES if spec.experiment in ("headline", "others") and spec.label in MAIN else (1.0,)
