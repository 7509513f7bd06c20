"""Fills the tables of docs/kernel.md from the result files, so that no number is typed by hand.

In benchmarks/: python -m kernel.page
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from gpu import page as gpu

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "kernel.md"
RESULTS = ROOT / "benchmarks" / "results"
EAGER = ("eager", "eager float32", "stacked", "foreach")

Row = dict[str, str]


def write_page() -> None:
    """Bring the tables up to date."""
    PAGE.write_text(filled(PAGE.read_text()))


def filled(page: str) -> str:
    """The page with the table of each name between `<!-- name -->` and `<!-- /name -->`."""
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = page.split(start)
        page = before + start + make() + end + rest.split(end)[1]
    return page


def cpu() -> str:
    """The twin against the best of plain torch, the stack of all layers, and torch.compile."""
    rows = _read("kernel_cpu.csv")
    about = rows[0]
    lines = [
        f"{_about(about)}; {about['rounds']} rounds, forward and backward.",
        "",
        "| layers x tokens x hidden | dtype | selected | twin, ms | best eager | stacked | compiled |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, found in _cases(rows, "both").items():
        twin = found["twin"]
        base = float(twin["median_us"])
        best = min((found[name] for name in EAGER), key=lambda r: float(r["median_us"]))
        cells = [f"{_ratio(best, base)} ({best['provider']})"]
        cells += [_ratio(found[name], base) for name in ("stacked", "compiled")]
        spread = f"{base / 1e3:.2f} ({float(twin['p20_us']) / 1e3:.2f} to {float(twin['p80_us']) / 1e3:.2f})"
        lines.append("| " + " | ".join([*case, spread, *cells]) + " |")
    return "\n".join([*lines, "", *_summary(rows), ""])


def _summary(rows: list[Row]) -> list[str]:
    """In how many rows the twin is slower than the best opponent, by how much at most."""
    lines = []
    for mode in ("both", "forward", "backward"):
        passes = "forward and backward" if mode == "both" else f"{mode} alone"
        cases = _cases(rows, mode)
        losses = {}
        for case, found in cases.items():
            best = min((found[other] for other in (*EAGER, "compiled")), key=lambda r: float(r["median_us"]))
            ratio = float(found["twin"]["median_us"]) / float(best["median_us"])
            if ratio > 1:
                losses[f"{case[0]} {case[1]}, {best['provider']}"] = ratio
        worst = max(losses, key=lambda k: losses[k], default="")
        text = f"at most {losses[worst]:.2f} times its time ({worst})" if losses else "never slower"
        lines.append(f"* {passes}: slower than the best opponent in {len(losses)} of {len(cases)} rows; {text}.")
    return lines


def host() -> str:
    """Host time of a call."""
    rows = _read("kernel_host.csv")
    about = rows[0]
    lines = [
        f"{about['layers']} layers, {_about(about)}; microseconds, least (median).",
        "",
        "| call | forward | forward and backward |",
        "|---|---|---|",
    ]
    for name in dict.fromkeys(row["call"] for row in rows):
        own = {row["mode"]: row for row in rows if row["call"] == name}
        cells = [f"{float(own[m]['least_us']):.0f} ({float(own[m]['median_us']):.0f})" for m in ("forward", "both")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join([*lines, ""])


TABLES: dict[str, Any] = {"cpu": cpu, "host": host, "gpu": gpu.kernel}


def _about(row: Row) -> str:
    return f"{row['device']}, torch {row['torch']}, {row['date']}, commit {row['commit']}"


def _read(name: str) -> list[Row]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def _cases(rows: list[Row], mode: str) -> dict[tuple[str, str, str], dict[str, Row]]:
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row["mode"] == mode:
            case = (f"{row['layers']}x{row['tokens']}x{row['hidden']}", row["dtype"], row["selected"])
            cases.setdefault(case, {})[row["provider"]] = row
    return cases


def _ratio(row: Row, base: float) -> str:
    return f"{float(row['median_us']) / base:.2f}"


if __name__ == "__main__":
    write_page()
