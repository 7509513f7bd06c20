"""The demo: fine-tune a small language model with and without LfU, and compare.

    make demo
    make demo ARGS="--data folder/with/train/and/test"
    make demo ARGS="--model path/or/hub-name --data pairs.jsonl"

Without make: `python -m demo` in benchmarks/.

By default a small model that ships with the project (benchmarks/demo/model, trained by pretrain.py) is
fine-tuned on a few examples of one of its skills in a new prompt format, with correct and with partly wrong
answers. The table shows what each method costs, what it gains in the new format, and what the model forgets.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# Without these the profiler that measures memory announces itself, and what it does not know, on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

try:
    import peft
    import torch
    import transformers
    from rich.console import Console
    from transformers import PreTrainedModel

    import lfu_reg
    from demo.data import DataError, encode
    from demo.load import EMBEDDED_MODEL, ModelError, load_model
    from demo.methods import BASELINE
    from demo.options import (
        UsageError,
        check,
        chosen_device,
        chosen_label_noise,
        chosen_methods,
        chosen_recipe,
        chosen_threads,
        parse_arguments,
    )
    from demo.report import paired_differences, print_tables, summarize, write_json, write_plot
    from demo.run import Experiment
    from demo.task import Task, pairs_task, skills_task
    from demo.train import Recipe
except ImportError as error:
    raise SystemExit(
        f"The demo cannot be started: {error}.\n"
        "Run `make demo`, or install what it needs into your environment: pip install -e '.[bench]'"
    ) from error


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the demo and returns what it wrote to results.json."""
    command = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv, __doc__ or "")
    try:
        check(args)
        return run(args, command)
    except (UsageError, DataError, ModelError) as error:
        raise SystemExit(f"demo: error: {error}") from error


def run(args: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """Loads, measures, trains and reports."""
    started = time.perf_counter()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if threads := chosen_threads(args):
        torch.set_num_threads(threads)
    device = chosen_device(args.device)
    console.print(downloads(args), markup=False)
    methods = chosen_methods(args)
    task = chosen_task(args)
    model, tokenizer = load_model(args.model or str(EMBEDDED_MODEL), device, getattr(torch, args.dtype))
    seeds = list(range(args.seeds))
    recipe = within_positions(chosen_recipe(args), model)
    experiment = Experiment(model, tokenizer, task, methods, recipe, seeds, chosen_label_noise(args))

    for line in opening(experiment, device):
        console.print(line, markup=False)
    results = describe(experiment, args, command, device)
    results["before"] = asdict(experiment.before())
    results["cost"] = {key: asdict(cost) for key, cost in experiment.costs(args.timing_rounds).items()}
    results["runs"] = list(experiment.runs())
    results["summary"] = summarize(results["runs"])
    results["minus_sft"] = paired_differences(results["runs"], BASELINE)
    results["notes"] = notes(experiment, device)
    results["seconds"] = round(time.perf_counter() - started, 1)
    print_tables(results, console)
    report_files(results, args.out, console)
    return results


def downloads(args: argparse.Namespace) -> str:
    """What this run fetches from the network."""
    if args.model is None:
        return "Downloads: nothing beyond the Python packages; the model ships with the project."
    if Path(args.model).is_dir():
        return "Downloads: nothing; the model is read from its folder."
    return f"Downloads: {args.model} from the Hugging Face hub, unless it is in the local cache."


def chosen_task(args: argparse.Namespace) -> Task:
    """The generated skills, or the user's pairs."""
    if args.data is None:
        return skills_task(args.train_size, args.eval_size or 200)
    return pairs_task(
        args.data,
        train_size=args.train_size,
        eval_size=args.eval_size or 64,
        exact_match=args.exact_match,
        retention_file=args.retention_file,
        embedded=args.model is None,
    )


def within_positions(recipe: Recipe, model: PreTrainedModel) -> Recipe:
    """No longer examples than the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None) or recipe.max_length
    return replace(recipe, max_length=min(recipe.max_length, positions))


def opening(experiment: Experiment, device: torch.device) -> list[str]:
    """What is about to happen."""
    recipe, parameters = experiment.recipe, sum(p.numel() for p in experiment.model.parameters())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    return [
        f"Model: {parameters / 1e6:.2f} M parameters on {where}",
        f"Task: {experiment.task.description}",
        f"Tuning: {recipe.tuning}, {recipe.steps} steps of {recipe.batch_size}, learning rate {recipe.lr:g}, "
        f"at most {recipe.max_length} tokens each, {len(experiment.seeds)} seed(s)",
        *(
            "  {}: alpha {alpha:g}, lambda {lam:g}".format(method.label, **method.settings())
            for method in experiment.methods
            if method.auxiliary
        ),
        *cut_examples(experiment),
        "Measuring time and memory of a step, then training:",
    ]


def cut_examples(experiment: Experiment) -> list[str]:
    """A warning if examples are longer than allowed."""
    longest = experiment.recipe.max_length
    examples = [*experiment.task.train(experiment.seeds[0], 0.0), *experiment.task.in_domain]
    lengths = [len(encode(experiment.tokenizer, example, sys.maxsize)["input_ids"]) for example in examples]
    cut = sum(length > longest for length in lengths)
    if not cut:
        return []
    return [f"Note: {cut} of {len(examples)} examples have more than {longest} tokens and are cut; see --max-length"]


def notes(experiment: Experiment, device: torch.device) -> list[str]:
    """How to read the table."""
    task, allocator = experiment.task, "CUDA" if device.type == "cuda" else "CPU"
    lower = "" if task.retention_metric.higher_is_better else f" ({task.retention_metric.name}: lower is better)"
    return [
        "step, × SFT: medians over steps of all methods in turn, on one batch, apart from training",
        f"memory: most that a step allocates above weights and optimizer state ({allocator} allocator)",
        f"in-domain: held-out questions in the trained format, {len(task.in_domain)} of them",
        f"{task.retention_name}: {', '.join(task.retention)}{lower}",
        f"prompt variations: mean over {len(task.variations)} wordings; spread: their standard deviation,",
        "  which also falls where the accuracy does",
    ]


def describe(
    experiment: Experiment, args: argparse.Namespace, command: list[str], device: torch.device
) -> dict[str, Any]:
    """What has to be known to repeat the run, and how its numbers are to be read."""
    task = experiment.task
    return {
        "command": shlex.join(["python", "-m", "demo", *command]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "description": task.description,
        "environment": {
            "python": platform.python_version(),
            "lfu_reg": lfu_reg.__version__,
            **{module.__name__: module.__version__ for module in (torch, transformers, peft)},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "threads": torch.get_num_threads(),
        },
        "settings": {
            "model": args.model or "embedded",
            "data": str(args.data) if args.data else "generated skills",
            "seeds": experiment.seeds,
            "label_noise": experiment.label_noise,
            "train_size": args.train_size,
            **asdict(experiment.recipe),
        },
        "methods": {method.key: {"label": method.label, **method.settings()} for method in experiment.methods},
        "metric_names": {
            "in_domain": task.metric.name,
            "retention": task.retention_metric.name,
            "retention_of": task.retention_name,
        },
    }


def report_files(results: dict[str, Any], out: Path, console: Console) -> None:
    """Writes JSON and PNG and tells where."""
    json_file, plot_file = out / "results.json", out / "results.png"
    write_json(results, json_file)
    write_plot(results, plot_file)
    console.print(f"\nAll numbers: {json_file}\nPlot:        {plot_file}", soft_wrap=True, markup=False)
    console.print(f"Took {results['seconds']:.0f} s.", markup=False)


if __name__ == "__main__":
    main()
