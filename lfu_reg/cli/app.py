"""The commands, their options, and what becomes of errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

import lfu_reg
from lfu_reg.cli.compare.command import compare
from lfu_reg.cli.errors import Unusable
from lfu_reg.cli.flops import Counts, count
from lfu_reg.cli.inspection import inspect as inspect_model
from lfu_reg.cli.memory import available_bytes, check_memory
from lfu_reg.cli.methods import DEFAULT, chosen_keys, labels
from lfu_reg.cli.options import (
    check_device,
    check_left_to_the_function,
    check_threads,
    check_writable,
    parse_bytes,
    parse_layers,
)
from lfu_reg.cli.overhead import measure
from lfu_reg.cli.plan import Plan
from lfu_reg.cli.presets import PRESETS
from lfu_reg.cli.report.command import report
from lfu_reg.cli.tables import show_inspection, show_overhead
from lfu_reg.cli.workloads import Setting, make_workload

# Of click, of which newer versions of typer hold a copy.
UsageError: Any = typer.BadParameter.__base__


class OneLineErrors(TyperGroup):
    """The commands, whose errors are one line on stderr with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run what is on the command line."""
        try:
            return super().invoke(ctx)
        except (Unusable, UsageError) as error:
            message = str(error)
            if isinstance(error, UsageError):
                message = f"{error.format_message().rstrip('.')}. See: {(error.ctx or ctx).command_path} --help"
            Console(stderr=True).print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=OneLineErrors, no_args_is_help=True, add_completion=False)


def _print_version(given: bool) -> None:
    if given:
        typer.echo(f"lfu-reg {lfu_reg.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What LfU costs on a model, what it hooks there, and whether it helps."""


Model = Annotated[
    str,
    typer.Argument(
        help=f"One of {', '.join(PRESETS)}; a local folder or a hub name, of which only config.json is read (random "
        "weights cost the same); or file.py:function that returns (model, batch, sft_loss_fn)."
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]


class Tuning(str, Enum):
    """What is trained."""

    lora = "lora"
    full = "full"


class Dtype(str, Enum):
    """Of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class AuxiliaryName(str, Enum):
    """theta_aux."""

    lora = "lora"
    steering = "steering"
    weights = "weights"


@app.command()
def overhead(
    context: typer.Context,
    model: Model = "small",
    tuning: Annotated[
        Tuning, typer.Option(case_sensitive=False, help="PEFT's LoRA on all linear maps, or all weights.")
    ] = Tuning.lora,
    dtype: Annotated[Dtype, typer.Option(case_sensitive=False, help="Of the weights.")] = Dtype.float32,
    batch: Annotated[int, typer.Option(help="Samples in a batch.", min=1)] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens in a sample.", min=2)] = 128,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Activation checkpointing.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile of the model.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; with one, processor time is measured.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 10,
    methods: Annotated[str, typer.Option(help=f"'all', or some of {', '.join(labels())}.")] = ",".join(DEFAULT),
    layers: Annotated[int | None, typer.Option(help="Truncate the model to so many layers.")] = None,
    time_budget: Annotated[float | None, typer.Option(help="Recommend settings within this ratio to SFT.")] = None,
    memory_budget: Annotated[str | None, typer.Option(help="The same for memory: 40GB, 800MB.")] = None,
    json_file: Json = None,
) -> None:
    """Time and memory of one training step, SFT's and LfU's, and how far LfU's is from the floor."""
    console = _console()
    check_device(device)
    check_threads(threads)
    keys = chosen_keys(methods)
    if time_budget is not None and not (math.isfinite(time_budget) and time_budget > 1):
        raise Unusable(f"--time-budget {time_budget:g}: allowed are ratios above 1, what SFT costs.")
    memory = None if memory_budget is None else parse_bytes(memory_budget)
    check_writable(json_file)
    torch.set_num_threads(threads)
    setting = Setting(
        model=model,
        tuning=tuning.value,
        dtype=dtype.value,
        batch=batch,
        tokens=tokens,
        checkpointing=checkpointing,
        compile=compiled,
        device=device,
        layers=layers,
    )
    if setting.is_own:
        check_left_to_the_function(context, "tuning", "dtype", "batch", "tokens", "checkpointing", "layers")
    plan = Plan(keys, rounds=rounds, time_budget=time_budget, memory_budget=memory)
    with console.status("Counting operations and memory"):
        counts = _counts(setting)
    if counts is not None:
        check_memory(counts, device, available_bytes(device))
    workload = make_workload(setting)
    with _progress(console, plan.ticks) as tick:
        result = measure(setting, plan, workload, counts, tick)
    show_overhead(result, console)
    _write(result, json_file, console)


app.command()(compare)
app.command()(report)


@app.command()
def inspect(
    context: typer.Context,
    model: Model,
    layers: Annotated[str, typer.Option(help="As LfURegularizer takes it: all, early, 3, '[0, 1]', a regex.")] = "all",
    auxiliary: Annotated[
        AuxiliaryName, typer.Option(case_sensitive=False, help="Whose sites to list.")
    ] = AuxiliaryName.lora,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, a regular expression, or name endings with commas.")
    ] = "all-linear",
    rank: Annotated[int, typer.Option(help="Of LoRA's deltas.", min=1)] = 8,
    tuning: Annotated[Tuning, typer.Option(case_sensitive=False, help="What the user trains.")] = Tuning.full,
    dtype: Annotated[Dtype, typer.Option(case_sensitive=False, help="Of the weights.")] = Dtype.bfloat16,
    batch: Annotated[int, typer.Option(help="Samples, for the size of the hidden states.", min=1)] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens in a sample.", min=2)] = 512,
    json_file: Json = None,
) -> None:
    """The layers and linear maps that would be hooked, and what each auxiliary takes; allocates nothing."""
    console = _console()
    check_writable(json_file)
    setting = Setting(model=model, tuning=tuning.value, dtype=dtype.value, batch=batch, tokens=tokens)
    if setting.is_own:  # batch and tokens size the hidden states
        check_left_to_the_function(context, "tuning", "dtype")
    targets: Any = target_modules.split(",") if "," in target_modules else target_modules
    result = inspect_model(setting, parse_layers(layers), targets, rank)
    show_inspection(result, console, auxiliary.value)
    _write(result, json_file, console)


def _counts(setting: Setting) -> Counts | None:
    return None if setting.is_own else count(setting)


def _console() -> Console:
    plain: dict[str, Any] = {"markup": False, "emoji": False}  # in file.py:ok: is nothing to be drawn
    console = Console(**plain)
    return console if console.is_terminal else Console(width=120, **plain)  # tables keep their shape in files and pipes


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Any]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Interleaved steps", total=total)
        yield lambda: progress.advance(task)


def _write(result: dict[str, Any], file: Path | None, console: Console) -> None:
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"Written to {file}", soft_wrap=True)
