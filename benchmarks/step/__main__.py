"""Measures the published figures of a step's cost, each as one `lfu-reg overhead` with the methods of others.py added.

    python -m step cpu_lora            # in benchmarks/; writes results/step_cpu_lora.json
    python -m step --list              # the options of each

On one CPU thread processor time is measured. docs/cost.md is rendered from the files by page.py. On a GPU it is
`python -m gpu` that measures.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from unittest.mock import patch

from lfu_reg.cli.app import app
from lfu_reg.cli.published import PROCEDURES
from step.others import OTHERS

RESULTS = Path(__file__).resolve().parents[1] / "results"
LFU = "sft,steering,lora,weights,steering-lam,steering-late,lora-late,steering-one,lora-one,weights-one"
COMPARED = "retained,literal-steering,authors-lora,sam"
COMMANDS = {
    "cpu_lora": "small --batch 8 --tokens 128 --rounds 8 --methods all --time-budget 1.5",
    "authors_cpu_lora": "small --batch 8 --tokens 128 --rounds 8 --methods sft,authors-lora,authors-steering",
    "cpu_full": f"small --tuning full --batch 8 --tokens 128 --rounds 8 --methods {LFU},{COMPARED}",
    "cpu_qwen3-0.6b": f"qwen3-0.6b --batch 2 --tokens 64 --rounds 6 --methods {LFU}",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(COMMANDS))
    parser.add_argument("--list", action="store_true", help="print the options of each case")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(arguments)
    unknown = [case for case in options.cases if case not in COMMANDS]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; allowed are {', '.join(COMMANDS)}")
    if options.list or not options.cases:
        for case, options_of_case in COMMANDS.items():
            print(f"{case}: overhead {options_of_case}")
    else:
        for case in options.cases:
            overhead(case, options.out)


def overhead(case: str, folder: Path) -> None:
    """Measure one case and write `step_CASE.json` into the folder."""
    arguments = [*shlex.split(COMMANDS[case]), "--json", str(folder / f"step_{case}.json")]
    with patch.dict(PROCEDURES, OTHERS):
        app(["overhead", *arguments], standalone_mode=False)


if __name__ == "__main__":
    main()
