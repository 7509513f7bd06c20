"""The demo's command line: what can be chosen, and what is rejected."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch

from demo.methods import DEFAULT_METHODS, METHODS, Method, with_chosen_settings
from demo.task import TRAIN_SIZE
from demo.train import Recipe


class UsageError(ValueError):
    """An option that cannot work; the message names it and the cure."""


def parse_arguments(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m demo"
    )
    _add_data_options(parser.add_argument_group("what to fine-tune"))
    _add_tuning_options(parser.add_argument_group("how to fine-tune"))
    _add_machine_options(parser.add_argument_group("where to run"))
    return parser.parse_args(argv)


def _add_data_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", help="folder or hub name of a causal LM (default: the embedded model)")
    data = "JSONL file, may be .gz, with prompt/response, question/answer or instruction[/input]/output"
    data += "; or a folder with such a train and test file (default: generated skills)"
    add("--data", type=Path, help=data)
    add("--retention-file", type=Path, help="text whose perplexity shows forgetting (with --data)")
    add("--exact-match", action="store_true", help="score --data by exact match, not by token accuracy")
    add("--train-size", type=int, default=TRAIN_SIZE, help=f"number of training examples (default: {TRAIN_SIZE})")
    add("--eval-size", type=int, help="number of held-out examples (default: 200, with --data 64)")
    noise = "shares of wrong answers, one table each (default: 0 0.3, with --data 0)"
    add("--label-noise", type=float, nargs="+", metavar="SHARE", help=noise)


def _add_tuning_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    default = " ".join(DEFAULT_METHODS)
    methods = f"any of {', '.join(METHODS)} (default: {default})"
    add("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help=methods)
    values = "for all LfU methods, or for one of them (lfu-lora=0.1)"
    add("--alpha", nargs="+", metavar="[METHOD=]VALUE", help=f"size of the perturbation, {values}")
    add("--lam", nargs="+", metavar="[METHOD=]VALUE", help=f"weight of the consistency term, {values}")
    add("--tuning", choices=("lora", "full"), default="lora", help="tune LoRA adapters (PEFT) or every weight")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"training steps (default: {Recipe.steps})")
    length.add_argument("--epochs", type=float, help="passes over the training examples, instead of --steps")
    add("--batch-size", type=int, default=8, help="examples per step (default: 8)")
    add("--lr", type=float, help="peak learning rate (default: 2e-3, for full tuning 2e-4)")
    add("--max-length", type=int, default=256, help="longest example in tokens (default: 256)")
    add("--seeds", type=int, default=3, help="number of seeds (default: 3)")


def _add_machine_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model (default: float32)")
    add("--threads", type=int, help="CPU threads (default: 1 for the generated skills, else torch's choice)")
    add("--timing-rounds", type=int, default=15, help="timed steps per method (default: 15)")
    add("--out", type=Path, default=Path("runs/demo"), help="folder for the results (default: runs/demo)")


def check(args: argparse.Namespace) -> None:
    """Rejects values that cannot work, before anything is loaded."""
    _check_numbers(args)
    if args.model and not args.data:
        raise UsageError(
            "--model without --data: only the embedded model knows the generated skills; "
            "give a JSONL file of prompt/response pairs, e.g. --data pairs.jsonl"
        )
    for option in ("retention_file", "exact_match"):
        if getattr(args, option) and not args.data:
            raise UsageError(f"{_flag(option)} is for your own pairs; add --data pairs.jsonl")
    try:  # now rather than after the training
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {args.out}: cannot be made ({error.strerror}); give another folder") from error


def _check_numbers(args: argparse.Namespace) -> None:
    positive = ["train_size", "eval_size", "steps", "epochs", "batch_size", "lr", "seeds", "threads", "timing_rounds"]
    for option in positive:
        value = getattr(args, option)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{_flag(option)} {value}: must be a number greater than 0")
    if args.max_length < 8:
        raise UsageError(f"--max-length {args.max_length}: must be at least 8 tokens")
    for share in args.label_noise or []:
        if not 0 <= share <= 1:
            raise UsageError(f"--label-noise {share}: must be a share of the answers, from 0 to 1")


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def chosen_methods(args: argparse.Namespace) -> list[Method]:
    """The methods with alpha and lambda: given ones, else the sweep's (embedded model), else the paper's."""
    keys = args.methods or DEFAULT_METHODS
    methods = {key: METHODS[key] for key in dict.fromkeys(keys)}
    if args.model is None:
        methods = {key: with_chosen_settings(method) for key, method in methods.items()}
    for option in ("alpha", "lam"):
        for key, value in _values_per_method(option, getattr(args, option) or [], methods).items():
            methods[key] = replace(methods[key], **{option: value})
    return list(methods.values())


def _values_per_method(option: str, entries: list[str], methods: dict[str, Method]) -> dict[str, float]:
    regularized = [key for key, method in methods.items() if method.auxiliary]
    values: dict[str, float] = {}
    for entry in entries:
        key, _, text = entry.rpartition("=")
        if key and key not in regularized:
            known = ", ".join(regularized) or "none"
            raise UsageError(f"--{option} {entry}: {key!r} is no LfU method of this run; there is {known}")
        try:
            value = float(text)
        except ValueError:
            raise UsageError(f"--{option} {entry}: {text!r} is no number; write 0.1 or lfu-lora=0.1") from None
        if not 0 <= value < math.inf:
            raise UsageError(f"--{option} {entry}: must be a finite number, 0 or greater")
        values |= dict.fromkeys([key] if key else regularized, value)
    return values


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    """How to fine-tune, after the defaults that depend on the data and on what is tuned."""
    steps = args.steps or Recipe.steps
    if args.epochs:
        steps = max(1, round(args.epochs * args.train_size / args.batch_size))
    lr = args.lr or (Recipe.lr if args.tuning == "lora" else Recipe.lr / 10)
    return Recipe(steps, args.batch_size, lr, args.tuning, args.max_length)


def chosen_label_noise(args: argparse.Namespace) -> list[float]:
    """The regimes, each a share of wrong answers."""
    return list(dict.fromkeys(args.label_noise or ([0.0] if args.data else [0.0, 0.3])))


def chosen_threads(args: argparse.Namespace) -> int | None:
    """The number of CPU threads, None for torch's choice.

    The generated skills' batches are so small that a second thread gains 10 % on an idle machine and loses far more
    on a busy one.
    """
    return args.threads or (None if args.data else 1)


def chosen_device(name: str) -> torch.device:
    """The device to run on."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: cannot be used ({reason}); try --device cpu") from error
    return device
