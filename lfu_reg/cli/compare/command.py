"""`lfu-reg compare`: the options, and what becomes of them."""

from __future__ import annotations

import importlib.util
import math
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import torch
import typer
from rich.console import Console

from lfu_reg.auxiliaries import AuxiliaryName
from lfu_reg.cli.compare.experiment import Experiment
from lfu_reg.cli.compare.loading import check_fits, load_model, weights_digest
from lfu_reg.cli.compare.plan import EXACT, ONE_BACKWARD, Grid, Setting, best_rate
from lfu_reg.cli.compare.plot import draw
from lfu_reg.cli.compare.prepared import Prepared, prepare
from lfu_reg.cli.compare.progress import Progress, in_words
from lfu_reg.cli.compare.show import show
from lfu_reg.cli.compare.store import Store
from lfu_reg.cli.errors import Unusable
from lfu_reg.cli.options import check_device, check_threads

STEPS = (EXACT, ONE_BACKWARD)
AUXILIARIES: tuple[str, ...] = get_args(AuxiliaryName)
STOPPED = 130  # exit code of what was interrupted


def compare(
    model: Annotated[str, typer.Argument(help="A folder from save_pretrained, or a model on the hub, OWNER/NAME.")],
    data: Annotated[
        Path, typer.Argument(help="Rows to learn from: .jsonl or .jsonl.gz with prompt/response, messages, and others.")
    ],
    keep: Annotated[
        list[Path] | None,
        typer.Option(help="Text, or .jsonl questions with answers, that must not be forgotten; may be given again."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results. What is there already is not done again.")] = Path(
        "runs/compare"
    ),
    steps: Annotated[int, typer.Option(help="Of a training.", min=1)] = Setting.steps,
    batch: Annotated[int, typer.Option(help="Rows of a step.", min=1)] = Setting.batch,
    tokens: Annotated[int, typer.Option(help="Of the longest row; longer ones are left out.", min=8)] = Setting.tokens,
    train: Annotated[int, typer.Option(help="Rows to train on, at most.", min=4)] = Setting.train,
    held_out: Annotated[int, typer.Option(help="Rows to score on, at most: a quarter if there are few.", min=2)] = (
        Setting.held_out
    ),
    rates: Annotated[str, typer.Option(help="Learning rates of SFT.")] = "3e-4,1e-3,3e-3",
    scales: Annotated[str, typer.Option(help="By which adapters are multiplied after training.")] = "0.25,0.5,0.75",
    strengths: Annotated[str, typer.Option(help="Of LfU.")] = "0.3,1,3",
    lfu_rates: Annotated[str, typer.Option(help="Learning rates of LfU. 'best': the one that suits SFT.")] = "best",
    lfu_steps: Annotated[str, typer.Option(help="How LfU's step is taken: exact, one-backward, or both.")] = EXACT,
    auxiliary: Annotated[str, typer.Option(help=f"LfU's: {', '.join(AUXILIARIES)}.")] = Setting.auxiliary,
    seeds: Annotated[int, typer.Option(help="Of every setting, the same for all.", min=1)] = Grid.seeds,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")] = Setting.dtype,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = Setting.device,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
) -> None:
    """Whether LfU adds anything on your model and rows beyond SFT's learning rate and a scaled adapter."""
    for needed in ("matplotlib", "scipy"):
        if importlib.util.find_spec(needed) is None:
            raise Unusable(f"compare needs {needed}, which is not installed: pip install 'lfu_reg[compare]'")
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console = Console(**plain)
    console = console if console.is_terminal else Console(width=160, **plain)
    check_device(device)
    if threads is not None:
        check_threads(threads)
        torch.set_num_threads(threads)
    _check_word("--dtype", dtype, ("float32", "bfloat16"))
    _check_word("--auxiliary", auxiliary, AUXILIARIES)
    chosen_steps = tuple(dict.fromkeys(lfu_steps.split(",")))
    for step in chosen_steps:
        _check_word("--lfu-steps", step, STEPS)
    grid = Grid(
        numbers("--rates", rates),
        () if lfu_rates == "best" else numbers("--lfu-rates", lfu_rates),
        numbers("--strengths", strengths),
        chosen_steps,
        seeds,
    )
    chosen_scales = (*(scale for scale in numbers("--scales", scales) if scale != 1), 1.0) if scales else (1.0,)
    if chosen_scales[-1] != max(chosen_scales):
        raise Unusable(f"--scales {scales}: allowed are numbers between 0 and 1.")
    files = tuple(keep or ())
    if len({file.name for file in files}) < len(files):
        raise Unusable("--keep: two of the files have the same name, by which they are told apart. Rename one.")
    setting = Setting(
        model,
        data,
        files,
        train,
        held_out,
        steps,
        batch,
        tokens,
        chosen_scales,
        cast(AuxiliaryName, auxiliary),
        dtype,
        device,
    )
    _run(setting, grid, out, console)


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Positive numbers from a comma-separated list, rising.

    Raises:
        Unusable: for anything else.
    """
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError:
        values = [math.nan]
    if not all(0 < value < math.inf for value in values):
        raise Unusable(f"{option} {text}: give numbers greater than 0 with commas between them, such as 1e-3,3e-3.")
    return tuple(values)


def _check_word(option: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise Unusable(f"{option} {given}: allowed are {', '.join(allowed)}.")


def _run(setting: Setting, grid: Grid, out: Path, console: Console) -> None:
    """Prepare, train what is not there yet, and report; after Ctrl-C, what is there."""
    # PEFT asks transformers 5 about checkpointing by an old name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    with console.status("Reading and checking", spinner="line"):
        prepared = prepare(setting)
        check_fits(setting)
        store = Store(out, setting, prepared.digest, weights_digest(setting.model))
    for line in _opening(setting, prepared):
        console.print(line, soft_wrap=True)
    pending = store.pending([*grid.sft(), *grid.lfu(best_rate(store.rows) or grid.rates[0])])
    console.print(f"{len(pending)} trainings to do, {len(store.rows)} done already; everything goes to {out}")
    started, stopped = time.perf_counter(), False
    try:
        with Progress(console, pending, setting.steps, len(setting.scales)) as progress:
            model = load_model(setting.model, setting.dtype, setting.device)
            experiment = Experiment(model, prepared, setting, store, progress)
            experiment.base()
            experiment.all(grid)
    except KeyboardInterrupt:
        stopped = True
    if store.base is not None:
        summary = show(store.rows, store.base, prepared.questions, console)
        store.write_summary(summary)
        draw(store.rows, store.base["point"], out / "curves.png")
        console.print(f"Took {in_words(time.perf_counter() - started).removeprefix('about ')}.")
        console.print(f"\nPicture: {out / 'curves.png'}; rows: {out / 'runs.jsonl'}; adapters: {out / 'adapters'}")
        console.print(f"One page of it all: lfu-reg report {out}", soft_wrap=True)
    if stopped:
        console.print(f"Stopped. {len(store.rows)} trainings are kept in {out}; the same command goes on from there.")
        raise typer.Exit(STOPPED)


def _opening(setting: Setting, prepared: Prepared) -> list[str]:
    """What is about to happen."""
    kept = ", ".join(f"{part.name} ({len(part.sequences)} {part.unit})" for part in prepared.kept)
    return [
        f"{setting.model} on {setting.data}: {len(prepared.train)} rows to train on, {len(prepared.held_out)} held "
        f"out; {setting.steps} steps of {setting.batch}; LoRA rank 8, {setting.dtype}, {setting.device}",
        f"To be kept: {kept or 'what the base model answers to the held-out prompts (KL); --keep FILE adds your own'}",
        *(f"Note: {note}" for note in prepared.notes),
    ]
