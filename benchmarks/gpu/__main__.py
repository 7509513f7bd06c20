"""Every figure from a GPU, in one go: `python -m gpu --minutes 25 --out FOLDER` in benchmarks/.

Stages run in order of worth, each in processes of its own with its own limits; a result file is there as soon as a part
has ended, and `summary.md` has the verdicts. `--rehearse` goes through all of it on a CPU, at the smallest sizes, and
through every way to fail.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu.record import OK, SKIPPED, Record
from gpu.runner import run_stage
from gpu.stages import FAILURES, STAGES, Stage

MODEL = Path(__file__).resolve().parents[1] / "demo" / "model"


def main(arguments: list[str] | None = None) -> int:
    """Run the stages, and say what came of them."""
    parser = argparse.ArgumentParser(
        prog="gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--minutes", type=float, default=25, help="for everything together")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result files")
    parser.add_argument("--stages", default=",".join(names), help="some of them, with commas, in the order to be run")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M (python -m paper.smollm2 FOLDER)")
    parser.add_argument("--commit", default="", help="what the checkout is, where it has no history")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at the smallest sizes")
    options = parser.parse_args(arguments)
    chosen = options.stages.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--stages: unknown {', '.join(unknown)}; allowed are {', '.join(names)}")
    until = time.monotonic() + 60 * options.minutes
    stages = [stage for name in chosen for stage in STAGES if stage.name == name]
    with tempfile.TemporaryDirectory() as scratch:
        given = ["--commit", options.commit]
        environment = {}
        model = options.model
        if options.rehearse:
            from gpu.rehearsal import write_data

            given.append("--rehearse")
            stages.insert(0, FAILURES)
            environment = {"LFU_DATA": str(write_data(Path(scratch))), "OMP_NUM_THREADS": "1"}
            model = model or MODEL
        if model is not None:
            given += ["--model", str(model.resolve())]

        def run(stage: Stage) -> Record:
            return run_stage(stage, options.out.resolve() / f"{stage.name}.json", until, given, environment)

        # One after the other on a GPU. In a rehearsal there is nothing that two stages could take from each other.
        with ThreadPoolExecutor(2 if options.rehearse else 1) as pool:
            records = []
            for stage, record in zip(stages, pool.map(run, stages), strict=True):
                print(f"{stage.name}: {stage.about}", flush=True)
                for name, part in record.parts.items():
                    print(f"  {name}: {part['state']}, {part.get('seconds', 0):g} s", flush=True)
                records.append(record)
                summarise(options.out)
    print((options.out / "summary.md").read_text(), flush=True)
    return 0 if all(went_well(record) for record in records) else 1


def summarise(folder: Path) -> None:
    """Write summary.md; a mistake in it must not end the run."""
    try:
        from gpu.page import summary

        text = summary(folder)
    except Exception as error:
        text = f"No summary: {type(error).__name__}: {error}\n"
    (folder / "summary.md").write_text(text)


def went_well(record: Record) -> bool:
    """Whether every part ended as it should."""
    if record.content["stage"] == FAILURES.name:
        from gpu.rehearsal import EXPECTED

        return {name: part["state"] for name, part in record.parts.items()} == EXPECTED
    return all(part["state"] in (OK, SKIPPED) for part in record.parts.values())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: files are complete, and children follow
    sys.exit(main())
