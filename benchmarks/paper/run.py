"""Reproduces a table of the paper: `python -m paper.run table1 --model llama-3.1-8b` in benchmarks/.

Weights come from the hub or from --weights FOLDER. Training runs on one device or, under torchrun, on several:
`torchrun --nproc-per-node 4 -m paper.run table1 --model llama-3.1-8b`. Finished rows are kept in the output folder and
not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from methods import self_distilled
from transformers import AutoTokenizer

from paper import evaluate, needs
from paper.attack import refusal_after, refusals
from paper.data import training_examples
from paper.report import page
from paper.settings import MODELS, TABLES, Model, Protocol, Row, Table
from paper.train import Place, adapted, finetune, place, settings_of

ROOT = Path(__file__).resolve().parents[2]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="paper.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", choices=TABLES, help="; ".join(f"{k}: {t.what}" for k, t in TABLES.items()))
    parser.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or any hub name or folder")
    parser.add_argument("--weights", help="folder of the model's weights, instead of the hub")
    parser.add_argument("--data", nargs="*", help="training sets instead of the table's: names or .jsonl files")
    parser.add_argument("--methods", nargs="*", help="only rows whose label contains one of these")
    parser.add_argument("--tasks", nargs="*", help="evaluation tasks instead of the table's")
    parser.add_argument("--local", action="store_true", help="evaluate on the files below $LFU_DATA, without the hub")
    parser.add_argument("--limit", type=int, help="most questions an evaluation task")
    parser.add_argument("--examples", type=int, help="most training examples")
    parser.add_argument("--steps", type=int, help="most optimizer steps")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "paper")
    parser.add_argument("--needs-only", action="store_true", help="say what it takes, and stop")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing of the table."""
    args = parse(argv)
    where = place()
    dtype = getattr(torch, args.dtype)
    known = MODELS.get(args.model, Model(args.model))
    source = args.weights or known.hub
    table, protocol = TABLES[args.table], Protocol()
    if args.data:
        table = replace(table, data=tuple(args.data))
    if args.methods:
        rows = tuple(r for r in table.rows if any(m.lower() in r.label.lower() for m in args.methods))
        table = replace(table, rows=rows)
        if not rows:
            sys.exit(f"--methods {' '.join(args.methods)}: no such row; there are "
                     f"{', '.join(r.label for r in TABLES[args.table].rows)}")  # fmt: skip
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        sets = {name: training_examples(name)[: args.examples] for name in table.data}
    except (OSError, RuntimeError) as error:
        sys.exit(str(error))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lengths = [len(tokenizer(e.prompt + e.response)["input_ids"]) for s in sets.values() for e in s[:200]]
    flops = needs.measured_flops(where.device, dtype)
    count = sum(len(s) for s in sets.values())
    said = needs.needs_of(source, table, protocol, count, sum(lengths) // len(lengths), where.processes, flops)
    if where.rank == 0:
        print(f"{args.table}, {args.model}: {table.what}. {said}", flush=True)
    if args.needs_only:
        return 0
    _check_memory(said.memory, where)
    for name, examples in sets.items():
        for row in table.rows:
            _row(args, table, row, name, examples, known, source, tokenizer, protocol, where, dtype)
    if where.rank == 0:
        print(page(args.out))
    if where.processes > 1:
        torch.distributed.destroy_process_group()
    return 0


def _check_memory(needed: int, where: Place) -> None:
    if where.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(where.device)
        if needed > free:
            sys.exit(
                f"This needs about {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are free on {where.device}. Use more "
                "processes (torchrun --nproc-per-node N), which shard the weights, or a smaller model."
            )


def _row(
    args: argparse.Namespace,
    table: Table,
    row: Row,
    data: str,
    examples: list[Any],
    known: Model,
    source: str,
    tokenizer: Any,
    protocol: Protocol,
    where: Place,
    dtype: torch.dtype,
) -> None:
    file = args.out / args.table / Path(args.model).name / f"{Path(data).stem}__{row.label.replace(' ', '_')}.json"
    if file.exists():
        return
    model = adapted(source, protocol, where, dtype)
    settings = settings_of(row, known, protocol)
    started = time.perf_counter()
    rewritten = None
    if row.method == "sdft":
        with model.disable_adapter():
            examples, rewritten = self_distilled(model, tokenizer, examples)
    if table.attack_steps:
        examples = [*examples, *refusals(100, seed=0)]
    figures = finetune(model, tokenizer, examples, row, settings, protocol, where, args.steps)
    seconds = time.perf_counter() - started
    model.eval()
    names = list(args.tasks or table.tasks)
    if names == ["variations"]:
        scores = evaluate.prompt_variations(model, tokenizer, limit=args.limit)
    elif names == ["refusal"]:
        scores = refusal_after(model, tokenizer, table.attack_steps, protocol, where)
    else:
        scores = evaluate.eleven_tasks(model, tokenizer, names, local=args.local, limit=args.limit)
    if where.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "table": args.table,
            "model": args.model,
            "data": data,
            "row": row.label,
            "settings": settings,
            "examples": len(examples),
            **({"rewritten": rewritten} if rewritten is not None else {}),
            **figures,
            "seconds": round(seconds, 1),
            "scores": scores,
            "limit": args.limit,
            "device": torch.cuda.get_device_name() if where.device.type == "cuda" else "cpu",
            "processes": where.processes,
            "torch": torch.__version__,
            "commit": _commit(),
            "date": time.strftime("%Y-%m-%d"),
        }
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        model.save_pretrained(file.with_suffix("")) if where.processes == 1 else None


def _commit() -> str:
    ran = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return ran.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
