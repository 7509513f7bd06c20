"""What the result files say: the summary of a run, and the parts of pages that need a GPU.

`python -m gpu.page` in benchmarks/ writes the summary of results/gpu/ anew, from files of several runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu.stages import FAILURES, STAGES
from gpu.verdicts import Results, part, table, verdicts

FOLDER = Path(__file__).resolve().parents[1] / "results" / "gpu"
NONE_YET = "No GPU yet.\n"
EAGER = ("eager", "eager float32", "stacked", "foreach")


def results(folder: Path = FOLDER) -> Results:
    """The stages of which there is a file, by name."""
    files = {stage.name: folder / f"{stage.name}.json" for stage in (FAILURES, *STAGES)}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def summary(folder: Path) -> str:
    """Verdicts, and what became of every part."""
    found = results(folder)
    lines = [*dict.fromkeys(f"{about(content)}." for content in found.values()), ""]
    if any(content["rehearsal"] for content in found.values()):
        lines = ["A rehearsal on a CPU: no figure of it means anything.", ""]
    lines += [table(verdicts(found)), "| stage | part | state | seconds | |", "|---|---|---|---|---|"]
    for name, content in found.items():
        for title, entry in content["parts"].items():
            said = entry.get("error") or entry.get("why") or " ".join(entry.get("warnings", []))
            last = said.strip().splitlines()[-1][:200].replace("|", "/") if said.strip() else ""
            lines.append(f"| {name} | {title} | {entry['state']} | {entry.get('seconds', '')} | {last} |")
    return "\n".join([*lines, ""])


def about(content: dict[str, Any]) -> str:
    """Where a stage ran."""
    s = content["surroundings"]
    names = ("torch", "triton", "cuda", "transformers", "peft", "python")
    versions = ", ".join(f"{name} {s[name]}" for name in names if s.get(name))
    return f"{s.get('hardware', 'unknown')}, {versions}, {s.get('date', '')}, commit {s.get('commit', 'unknown')}"


def kernel(folder: Path = FOLDER) -> str:
    """The tables of docs/kernel.md."""
    found = results(folder)
    parts = [p for name in ("headline", "shapes") if (p := part(found, "kernel", name)) is not None]
    if not parts:
        return NONE_YET
    cases: dict[tuple[Any, ...], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in (row for entry in parts for row in entry["rows"] if row["mode"] != "none"):
        case = (f"{row['layers']}x{row['tokens']}x{row['hidden']}", row["dtype"], row["selected"])
        cases.setdefault(case, {})[row["provider"], row["mode"]] = row
    lines = [
        f"{about(found['kernel'])}. A copy moves {parts[0]['copy_bytes_per_second'] / 1e12:.2f} TB/s. Times are the "
        "device's, in microseconds, the launches hidden; opponents as ratios to the kernel, forward and backward.",
        "",
        "| layers, tokens, hidden | dtype | share | forward | of copy | backward | of copy | best eager | compiled |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, rows in cases.items():
        if ("triton", "both") not in rows:
            continue
        cells = [
            cell
            for mode in ("forward", "backward")
            for cell in (f"{rows['triton', mode]['median_us']:.0f}", str(rows["triton", mode].get("share_of_copy", "")))
        ]
        lines.append(
            "| " + " | ".join([*map(str, case), *cells, _best(rows, EAGER), _best(rows, ("compiled",))]) + " |"
        )
    if (cost := part(found, "kernel", "launch cost")) is not None:
        listed = ", ".join(f"{name} {us:.0f}" for name, us in cost["host_us"].items())
        lines += ["", f"Microseconds of the host for {cost['layers']} tiny layers: {listed}."]
    if (tiles := part(found, "kernel", "tile sizes")) is not None:
        shipped, *others = tiles["settings"]
        fastest = min(others, key=lambda t: t["forward_us"] + t["backward_us"])
        lines += ["", f"Tiles as shipped: {_tile(shipped)}. The fastest tried: {_tile(fastest)}."]
    return "\n".join([*lines, ""])


def readme(folder: Path = FOLDER) -> str:
    """The README's sentence."""
    found = results(folder)
    result = part(found, "step", "interleaved", "exact")
    if result is None:
        return "No GPU yet ([what one is to measure](docs/gpu.md)).\n"
    ratio = {row["key"]: f"{row['ratio']:.2f}x" for row in result["rows"]}
    return (
        f"On a GPU ({found['step']['surroundings']['hardware']}, the shape of Llama-3.1-8B, LoRA fine-tuning, 4 x 512 "
        f"tokens, bfloat16): **{ratio['steering']}**,\n**{ratio['lora']}** and **{ratio['weights']}**, where two "
        f"passes through all blocks are {result['floor']:.2f}x ([all of it](docs/gpu.md)).\n"
    )


def _best(rows: dict[tuple[str, str], dict[str, Any]], names: Iterable[str]) -> str:
    """The fastest of the providers that ran."""
    base = rows["triton", "both"]["median_us"]
    ran = {name: rows[name, "both"]["median_us"] / base for name in names if (name, "both") in rows}
    if not ran:
        return ""
    best = min(ran, key=lambda name: ran[name])
    return f"{ran[best]:.2f} ({best})"


def _tile(t: dict[str, Any]) -> str:
    return (
        f"{t['TILE']} elements, {t['WARPS']} warps, {t['SHARE_FORWARD']} and {t['SHARE_BACKWARD']} tiles a program, "
        f"{t['forward_us']:.0f} + {t['backward_us']:.0f} us"
    )


if __name__ == "__main__":
    (FOLDER / "summary.md").write_text(summary(FOLDER))
