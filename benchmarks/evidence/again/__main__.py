"""Repeats the comparisons behind docs/evidence-data.md with fresh seeds.

`make evidence-again`, or `python -m evidence.again` in benchmarks/. Nothing is tuned again: hyperparameters are those
that the published rows chose. agreement.py says when a comparison counts as found again. The exit code is 1 if a claim
flips. What was run already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from evidence import run, store
from evidence.again import show
from evidence.again.agreement import compared
from evidence.again.duration import processor_seconds
from evidence.again.plan import DEFAULT, OPTIONAL, asked, left_out, obstacle, planned, refused_seeds
from evidence.pretrain import CACHE
from evidence.verdicts import claims

HYPOTHESES = sorted({claim.hypothesis for claim in claims()})


def arguments(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(prog="evidence.again", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7], help="not among the published ones")
    parser.add_argument("--hypotheses", nargs="+", choices=HYPOTHESES, default=HYPOTHESES, metavar="LETTER")
    parser.add_argument("--methods", nargs="+", default=[], metavar="LABEL", help="others, compared with SFT by score")
    parser.add_argument("--full", action="store_true", help="full fine-tuning as well (compare-full)")
    parser.add_argument("--published", type=Path, default=store.RESULTS, help="rows to compare with")
    parser.add_argument(
        "--out", type=Path, default=CACHE / "evidence-again.jsonl", help="file for the rows of the runs"
    )
    parser.add_argument("--json", type=Path, help="write the comparisons to this file")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run, and how long it takes")
    return parser, parser.parse_args(argv)


def _refuse(parser: argparse.ArgumentParser, args: argparse.Namespace, published: store.Rows) -> None:
    if args.out.resolve() == args.published.resolve():
        parser.error(f"--out {args.out} holds the published rows; give another file")
    if stale := refused_seeds(published, args.seeds):
        parser.error(f"seeds {stale} are published or were tuned on; give fresh ones, such as 5 6 7")
    labels = sorted({row["label"] for row in published if row["experiment"].startswith("compare-")})
    if unknown := [label for label in args.methods if label not in labels]:
        parser.error(f"no published comparison has {unknown}; there are {', '.join(labels)}")


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing, compares, and returns the exit code."""
    parser, args = arguments(argv)
    console = Console()
    published = store.rows(args.published)
    _refuse(parser, args, published)
    listed = asked(args.hypotheses, args.methods)
    wanted = [*DEFAULT, *(OPTIONAL if args.full else ())]
    obstacles = {name: reason for name in wanted if (reason := obstacle(name, published))}
    possible = [name for name in wanted if name not in obstacles]
    skipped = [*left_out(published, listed, possible), *obstacles.values()]
    for line in skipped:
        console.print(f"left out: {line}", style="yellow", markup=False)
    specs = planned(published, listed, possible, args.seeds)
    if not specs:
        parser.error(f"nothing to repeat: {args.published} has none of these comparisons")

    todo = run.missing(specs, store.rows(args.out))
    seconds = processor_seconds(todo, published)
    minutes = "an unknown time" if math.isnan(seconds) else f"{seconds / 60 / args.workers:.1f} minutes"
    console.print(f"{len(specs)} runs, of which {len(specs) - len(todo)} are in {args.out} already", markup=False)
    console.print(f"{len(todo)} runs to go: about {minutes} with {args.workers} workers on as many idle cores")
    if args.dry_run:
        return 0
    if todo:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        run.carry_out(todo, args.workers, "again", args.out)

    keys = {spec.key() for spec in specs}
    again = [row for row in store.rows(args.out) if store.spec_of(row).key() in keys]
    repeated = compared(published, again, listed)
    console.print(show.table(repeated))
    console.print(show.summary(repeated))
    if args.json:
        report: dict[str, Any] = {
            "published": str(args.published),
            "rows": str(args.out),
            "seeds": args.seeds,
            "commits": sorted({row["commit"] for row in again}),
            "left_out": skipped,
            "agree": sum(part.agrees for part in repeated),
            "flip": sum(part.flips for part in repeated),
            "comparisons": [show.plain(part) for part in repeated],
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(part.flips for part in repeated))


if __name__ == "__main__":
    sys.exit(main())
