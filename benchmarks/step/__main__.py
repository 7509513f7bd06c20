"""Measures the published figures of a step's cost, each by one `lfu-reg overhead` command.

    python -m step cpu_lora            # in benchmarks/; writes results/step_cpu_lora.json
    python -m step --list              # the commands
    python -m step cuda_llama-3.1-8b_lora   # needs a GPU

On one CPU thread processor time is measured. docs/cost.md is rendered from the files by page.py.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from lfu_reg.cli.app import app

RESULTS = Path(__file__).resolve().parents[1] / "results"
LFU = "sft,steering,lora,weights,steering-late,lora-late"
OTHERS = "retained,literal-steering,authors-lora,sam"
GPU = "--device cuda --dtype bfloat16 --rounds 20 --methods all --time-budget 1.5"
COMMANDS = {
    "cpu_lora": "small --batch 8 --tokens 128 --rounds 8 --methods all --time-budget 1.5",
    "cpu_full": f"small --tuning full --batch 8 --tokens 128 --rounds 8 --methods {LFU},{OTHERS}",
    "cpu_qwen3-0.6b": f"qwen3-0.6b --batch 2 --tokens 64 --rounds 6 --methods {LFU}",
    "cuda_llama-3.1-8b_lora": f"llama-3.1-8b --batch 4 --tokens 512 {GPU}",
    "cuda_qwen3-8b_lora": f"qwen3-8b --batch 4 --tokens 512 {GPU}",
    "cuda_qwen3-0.6b_lora": f"qwen3-0.6b --batch 8 --tokens 512 {GPU}",
    "cuda_qwen3-0.6b_full": f"qwen3-0.6b --tuning full --batch 8 --tokens 512 {GPU}",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(COMMANDS))
    parser.add_argument("--cuda", action="store_true", help="all cases that need a GPU")
    parser.add_argument("--list", action="store_true", help="print the commands")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(arguments)
    unknown = [case for case in options.cases if case not in COMMANDS]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; allowed are {', '.join(COMMANDS)}")
    chosen = [case for case in COMMANDS if case.startswith("cuda")] if options.cuda else options.cases
    if options.list or not chosen:
        for command in map(command_of, COMMANDS):
            print(command)
    else:
        for case in chosen:
            app([*shlex.split(command_of(case, options.out))[1:]], standalone_mode=False)


def command_of(case: str, folder: Path = Path("benchmarks/results")) -> str:
    """What a case runs."""
    return f"lfu-reg overhead {COMMANDS[case]} --json {shlex.quote(str(folder / f'step_{case}.json'))}"


if __name__ == "__main__":
    main()
