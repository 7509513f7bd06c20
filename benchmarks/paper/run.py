"""Reproduces tables of the paper: `python -m paper.run 1 --model llama-3.1-8b` in benchmarks/.

Weights come from the hub or from a folder. Finished runs are kept and not repeated. One device, or several by
`torchrun --nproc-per-node 4 -m paper.run 1 --model llama-3.1-8b --switch float32_adapters=false checkpointing=exact`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from demo.skills import Example
from evidence.corpus import DATA
from methods import self_distilled
from transformers import AutoTokenizer

from paper import evaluate, needs, store
from paper.attack import Attack, attack_data, before_and_after
from paper.data import MissingData, encoded, last_number, training_examples
from paper.report import cell, page, reduced
from paper.settings import INSTRUCT, MODELS, PROTOCOLS, Model, Protocol, switched
from paper.tables import GROUPS, TABLES, Row, Table, with_sft_grid
from paper.tasks import checked
from paper.train import Place, adapted, finetune, place, settings_of

ROOT = Path(__file__).resolve().parents[2]
_HAVE_STRENGTH = ("lfu", "lfu-steering", "logit-kl", "sam")  # rows whose alpha and lambda may be the model's


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="paper.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", nargs="+", choices=[*TABLES, *GROUPS], help="which ones")
    parser.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or any hub name or folder")
    parser.add_argument("--weights", help="folder of the model's weights, instead of the hub")
    parser.add_argument("--instruct", action="store_true", help="other models: alpha, lambda of instruct ones")
    parser.add_argument("--protocol", default="published", choices=PROTOCOLS)
    parser.add_argument("--switch", nargs="*", default=[], metavar="NAME=VALUE", help="single fields of the protocol")
    parser.add_argument("--sft-grid", action="store_true", help="SFT at three learning rates and three seeds as well")
    parser.add_argument("--train", nargs="*", help="training sets instead of the table's: names or .jsonl files")
    parser.add_argument("--tasks", default="hub", choices=("hub", "local"), help="where all data come from")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of --tasks local, and of Table 4's files")
    parser.add_argument("--only-tasks", nargs="*", help="some of the eleven")
    parser.add_argument("--only-rows", nargs="*", help="only rows of these methods, as the tables name them")
    parser.add_argument("--limit", type=int, help="most questions a task")
    parser.add_argument("--longest", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--examples", type=int, help="most training examples")
    parser.add_argument("--steps", type=int, help="most optimizer steps")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "paper" / "rows.jsonl")
    parser.add_argument("--needs-only", action="store_true", help="say what it takes, and stop")
    args = parser.parse_args(argv)
    args.folder = args.data if args.tasks == "local" else None
    args.tables = list(dict.fromkeys(key for name in args.tables for key in GROUPS.get(name, (name,))))
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing of the tables, and prints them."""
    args = parse(argv)
    where = place()
    try:
        protocol, names = switched(PROTOCOLS[args.protocol], args.switch), checked(args.only_tasks)
        known = MODELS.get(args.model, Model("", Path(args.model).name, **(INSTRUCT if args.instruct else {})))
        tokenizer = AutoTokenizer.from_pretrained(args.weights or (known.hub if known.name else args.model))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ask = evaluate.Questions(names, args.folder, args.limit, longest=args.longest)
    session = Session(args, where, protocol, known, tokenizer, ask)
    for key in args.tables:
        for data in args.train or TABLES[key].data:
            session.table(key, data)
    if where.processes > 1:
        torch.distributed.destroy_process_group()
    return 0


@dataclass
class Session:
    """What all tables of a command share."""

    args: argparse.Namespace
    where: Place
    protocol: Protocol
    known: Model
    tokenizer: Any
    ask: evaluate.Questions

    @property
    def source(self) -> str:
        """Where the weights are."""
        return str(self.args.weights or (self.known.hub if self.known.name else self.args.model))

    def table(self, key: str, data: str) -> None:
        """Runs what is missing of a table on one training set, and prints it."""
        table = self._chosen(TABLES[key])
        if not table.rows:
            return
        try:
            local = self.args.folder is not None
            attack = attack_data(self.args.data, self.protocol, spare=local) if table.measured == "attack" else None
            examples = attack.aligning if attack else training_examples(data, self.protocol, self.args.folder)
        except MissingData as error:
            self._say(f"Table {key} on {data}: left out. {error}")
            return
        examples = examples[: self.args.examples]
        self._say_needs(key, table, data, examples)
        if self.args.needs_only:
            return
        measured = [(row, self._row(row, table, data, examples, attack)) for row in table.rows]
        notes = [*([f"Data: {attack.name}."] if attack else []), *reduced(vars(self.args))]
        name = data if attack is None or attack.name == "BeaverTails" else attack.name
        self._say(page(key, table, self.known, name, measured, " ".join(notes)))

    def _chosen(self, table: Table) -> Table:
        table = with_sft_grid(table) if self.args.sft_grid else table
        wanted = [w.lower() for w in self.args.only_rows or ()]
        return replace(table, rows=tuple(r for r in table.rows if not wanted or r.label.lower() in wanted))

    def _say(self, text: str) -> None:
        if self.where.rank == 0:
            print(text, flush=True)

    def _say_needs(self, key: str, table: Table, data: str, examples: list[Example]) -> None:
        lengths = [len(encoded(self.tokenizer, e, self.protocol)["input_ids"]) for e in examples[:200]]
        said = needs.needs_of(
            self.source,
            list(table.rows),
            self.protocol,
            examples=len(examples),
            tokens=sum(lengths) // len(lengths),
            longest=max(lengths),
            processes=self.where.processes,
            flops=needs.measured_flops(self.where.device, self._dtype),
            steps=self.args.steps,
            # Attacks and similarities take little beside these.
            tasks={"tasks": self.ask.names, "variations": ["gsm8k"] * len(evaluate.VARIATIONS)}.get(table.measured, []),
            limit=self.ask.limit,
        )
        self._say(f"{key} on {data}: {table.what}, {len(table.rows)} rows. {said}")
        if self.where.device.type == "cuda" and not self.args.needs_only:
            free, _ = torch.cuda.mem_get_info(self.where.device)
            if said.memory > free:
                sys.exit(
                    f"This needs about {said.memory / 1e9:.0f} GB and {free / 1e9:.0f} GB are free on "
                    f"{self.where.device}. Use more processes (torchrun --nproc-per-node N), which shard the weights, "
                    "or a smaller model."
                )

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.args.dtype)
        return dtype

    def _row(
        self, row: Row, table: Table, data: str, examples: list[Example], attack: Attack | None
    ) -> dict[str, float]:
        protocol = row.protocol(self.protocol)
        run = {
            "model": self.known.name or self.known.hub,
            "data": data if attack is None else attack.name,
            "method": row.method,
            "settings": {**row.settings, **(settings_of(row, self.known) if row.method in _HAVE_STRENGTH else {})},
            "protocol": asdict(protocol),
            "measured": table.measured,
            "tasks": self.args.tasks,
            "names": self.ask.names if table.measured == "tasks" else [],
            "limit": self.args.limit,
            "longest": self.args.longest,
            "examples": len(examples),
            "steps": self.args.steps,
            "dtype": self.args.dtype,
        }
        found = store.find(store.records(self.args.out), run)
        if found is None:
            found = {"run": run, "label": row.label, **self._train(row, protocol, table, data, examples, attack)}
            if self.where.rank == 0:
                store.append(self.args.out, found)
                self._say(f"{time.strftime('%H:%M:%S')} {_line(found)}")
            if self.where.processes > 1:
                torch.distributed.barrier()  # the others would otherwise look for this run before it is written
        return {**found["scores"], **{k: found[k] for k in ("ms_per_step", "ms_sd") if k in found}}

    def _train(
        self, row: Row, protocol: Protocol, table: Table, data: str, examples: list[Example], attack: Attack | None
    ) -> dict[str, Any]:
        started = time.perf_counter()
        model = adapted(self.source, protocol, self.where, self._dtype)
        figures: dict[str, float] = {}
        texts = examples[: self.ask.limit or evaluate.TEXTS]
        if row.method == "sdft":
            with model.disable_adapter():
                examples, figures["rewritten"] = self_distilled(
                    model,
                    self.tokenizer,
                    examples,
                    final_answer=last_number if data == "gsm8k" else None,
                    max_new_tokens=self.args.longest,
                )
        if row.method != "vanilla":
            trained = finetune(model, self.tokenizer, examples, row, self.known, protocol, self.where, self.args.steps)
            figures.update(trained)
        training = time.perf_counter() - started
        model.eval()
        if attack is not None:
            scores = before_and_after(
                model, self.tokenizer, attack, protocol, self.where, limit=self.ask.limit, longest=self.ask.longest
            )
        elif table.measured == "tasks":
            scores = evaluate.eleven_tasks(model, self.tokenizer, self.ask)
        elif table.measured == "variations":
            scores = evaluate.prompt_variations(model, self.tokenizer, self.ask)
        else:
            scores = evaluate.similarity_under_noise(model, self.tokenizer, texts, protocol)
        return {
            **figures,
            "scores": scores,
            "training_seconds": training,
            "seconds": time.perf_counter() - started,
            "device": torch.cuda.get_device_name() if self.where.device.type == "cuda" else "cpu",
            "processes": self.where.processes,
            "torch": torch.__version__,
            "commit": _commit(),
            "date": time.strftime("%Y-%m-%d"),
        }


def _line(record: store.Record) -> str:
    """What a finished run says of itself."""
    trained = ""
    if "steps" in record:
        trained = f"{record['steps']} steps, loss {record['first_loss']:.3f} -> {record['final_loss']:.3f}, "
    scores = ", ".join(f"{name} {cell(value, None)}" for name, value in record["scores"].items())
    return f"{record['label']}: {trained}{record['seconds']:.0f} s; {scores}"


def _commit() -> str:
    ran = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return ran.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
