"""What the step costs: time of one training step (forward, backward) as a ratio to vanilla SFT, and memory.

    python benchmarks/step.py                    # the small Llama of the README's figure, one CPU thread
    python benchmarks/step.py --device cuda --hidden 4096 --layers 32 ...

All methods run interleaved in one process, round after round in a shuffled order; ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import opponents
from saved_bytes import SavedBytes

from lfu_reg import LfURegularizer

Batch = dict[str, Tensor]
RESULTS = Path(__file__).resolve().parent / "results"
BLOCKS = "blocks alone"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model, batch = make_model(options), make_batch(options)
    methods = make_methods(model, batch)
    seconds = interleaved({**methods, BLOCKS: blocks_methods(model, batch)}, options)
    share = summary(BLOCKS, seconds, 1.0)["ratio"]
    rows = [summary(name, seconds, 1 + share) for name in methods]
    for row in rows:
        row["peak_mb"] = peak_megabytes(methods[row["method"]], options)
    states = options.layers * options.batch * options.tokens * options.hidden
    result = {
        "setting": {**vars(options), "out": options.out.name},
        "blocks_share": share,
        "floor": round(1 + share, 3),
        "clean_states_mb": round(states * getattr(torch, options.dtype).itemsize / 1e6, 2),
        "rows": rows,
        **surroundings(),
    }
    show(result)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.out}")
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "layers": 8, "hidden": 256, "intermediate": 688, "heads": 8, "vocab": 4096,
        "batch": 8, "tokens": 128, "rounds": 40, "warmup": 3, "threads": 1,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    options.out = options.out or RESULTS / f"step_{options.device}_{options.tuning}.json"
    return options


def make_model(options: argparse.Namespace) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        vocab_size=options.vocab,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    if options.tuning == "lora":
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    return model.to(options.device, getattr(torch, options.dtype)).train()


def make_batch(options: argparse.Namespace) -> Batch:
    ids = torch.randint(0, options.vocab, (options.batch, options.tokens), device=options.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def sft_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def make_methods(model: nn.Module, batch: Batch) -> dict[str, Callable[[], None]]:
    """One training step (forward, backward, gradients dropped) per method."""

    def step(loss_of: Callable[[nn.Module, Batch], Tensor], own: nn.Module) -> Callable[[], None]:
        def run() -> None:
            loss_of(own, batch).backward()
            own.zero_grad(set_to_none=True)

        return run

    def lfu(auxiliary: str, **settings: Any) -> Callable[[], None]:
        own = shared_copy(model)
        reg = LfURegularizer(own, auxiliary, **settings)
        return step(lambda m, b: reg(m, b, sft_loss), own)

    def opponent(function: Callable[..., Tensor]) -> Callable[[], None]:
        return step(lambda m, b: function(m, b, sft_loss), shared_copy(model))

    return {
        "SFT": step(sft_loss, shared_copy(model)),
        "LfU steering": lfu("steering"),
        "LfU LoRA": lfu("lora"),
        "LfU weights": lfu("weights"),
        "LfU steering, graph retained": lfu("steering", strategy="retained"),
        "literal steering, 3 forwards": opponent(opponents.three_forwards),
        "literal LoRA, 3 forwards": opponent(opponents.three_forwards_lora),
        "authors' LoRA procedure": opponent(opponents.authors_lora),
    }


def shared_copy(model: nn.Module) -> nn.Module:
    """A module tree of its own, for its own hooks, around the same parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def blocks_methods(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """Forward and backward of the blocks alone: what no exact method can avoid doing a second time."""
    own = shared_copy(model)
    trunk = next(m for m in own.modules() if type(m).__name__ == "LlamaModel")
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    last = opponents.blocks_of(own)[-1]
    kept: list[Tensor] = []
    last.register_forward_hook(lambda m, a, out: kept.append(out))

    def run() -> None:
        trunk(**inputs)
        hidden = kept.pop()
        hidden.backward(torch.ones_like(hidden))
        own.zero_grad(set_to_none=True)

    return run


def interleaved(methods: dict[str, Callable[[], None]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every method in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    order = random.Random(0)
    # On one CPU thread the processor's time is the step's own, whatever else the machine is doing.
    clock = time.process_time if options.device == "cpu" and options.threads == 1 else time.perf_counter
    for number in tqdm(range(options.warmup + options.rounds), desc="rounds", leave=False):
        names = list(methods)
        order.shuffle(names)
        for name in names:
            synchronize(options.device)
            start = clock()
            methods[name]()
            synchronize(options.device)
            if number >= options.warmup:
                seconds[name].append(clock() - start)
    return seconds


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def summary(name: str, seconds: dict[str, list[float]], floor: float) -> dict[str, Any]:
    """Median time, and the ratio to SFT of the same round: median and quartiles."""
    ratios = [mine / sft for mine, sft in zip(seconds[name], seconds["SFT"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {
        "method": name,
        "ms": round(1e3 * median(seconds[name]), 2),
        "ratio": round(median(ratios), 3),
        "ratio_quartiles": [round(low, 3), round(high, 3)],
        "over_floor": round(median(ratios) / floor, 3),
    }


def peak_megabytes(run: Callable[[], None], options: argparse.Namespace) -> float:
    """Peak of one step: of the CUDA allocator, on CPU of the bytes saved for backward passes."""
    if options.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 2)
    with SavedBytes() as saved:
        run()
    return round(saved.peak / 1e6, 2)


def surroundings() -> dict[str, Any]:
    """What the figures depend on."""
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
    }


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"one training step, {result['setting']['tuning']} tuning, floor {result['floor']:.3f}")
    for column in ("method", "ms", "ratio to SFT", "quartiles", "of the floor", "peak MB"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        table.add_row(
            row["method"], f"{row['ms']:.1f}", f"{row['ratio']:.2f}", f"{low:.2f} .. {high:.2f}",
            f"{row['over_floor']:.3f}", f"{row['peak_mb']:.1f}",
        )  # fmt: skip
    Console(width=110).print(table)
    print(
        f"The blocks take {result['blocks_share']:.3f} of SFT's forward and backward, so 1 + that is the floor of any "
        f"exact step. Clean hidden states: {result['clean_states_mb']} MB."
    )


if __name__ == "__main__":
    main()
