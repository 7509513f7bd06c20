"""What a step may cost at most, and what it does: the section of docs/cost.md that says which aims are met."""

from __future__ import annotations

from typing import Any

KEYS = {"steering": "steering", "lora": "LoRA", "weights": "weights"}
ON_CPU = {
    "small Llama, LoRA tuning": ("step_cpu_lora.json", 1.90),
    "small Llama, full tuning": ("step_cpu_full.json", 1.90),
    "qwen3-0.6b, a small model with a large vocabulary, LoRA tuning": ("step_cpu_qwen3-0.6b.json", 1.75),
}
PEAK, OUTSIDE = 1.10, 1  # the last in percent

TEXT = """## Aims of development

Ratios to SFT of exact steps on all layers; in bold what reaches the aim.

"""
MISSED = """
LoRA deltas on all layers, and the weights themselves, act from the first block on. So an exact step has no block to
reuse and goes through all of them twice: it cannot be below the floor of its run, nor can it reach an aim that is. What
it costs above the floor are the products of the deltas, the ascent, the distance, and the step's own calls (tables of
phases above). To come below: a later first layer (`layers="late"`, exact for its own objective), or an estimate
(`batch_fraction`, `every`).

Calls outside of the passes take milliseconds of Python that grow with the number of modules and not with their size
(walks over the modules and the autograd graph): under 1 % where a step takes a second or more.
"""


def aims(steps: dict[str, dict[str, Any]]) -> str:
    """The section.

    Args:
        steps: results of `lfu-reg overhead` by the name of their file.
    """
    ratios, others = [], []
    for about, (file, aim) in ON_CPU.items():
        result = steps[file]
        sft, rows = _row(result, "sft"), [_row(result, key) for key in KEYS]
        ratios.append([about, f"{aim:.2f}", f"{result['floor']:.2f}", *(_bold(row["ratio"], aim) for row in rows)])
        others.append(
            [
                about,
                "peak memory / SFT's",
                f"{PEAK:.2f}",
                *(_bold(row["peak_mb"] / sft["peak_mb"], PEAK) for row in rows),
            ]
        )
        outside = [about, "outside of the passes", f"{OUTSIDE} %"]
        others.append(
            [*outside, *(_bold(100 * row["outside_of_passes"], OUTSIDE, digits=1, unit=" %") for row in rows)]
        )
    tables = _table(["setting", "aim", "floor"], ratios), _table(["setting", "what", "aim"], others)
    return TEXT + "\n".join(tables) + MISSED


def _table(titles: list[str], rows: list[list[str]]) -> str:
    titles = [*titles, *KEYS.values()]
    return "".join(f"{line}\n" for line in [_line(titles), "|---" * len(titles) + "|", *map(_line, rows)])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _row(result: dict[str, Any], key: str) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in result["rows"] if row["key"] == key)
    return found


def _bold(value: float, most: float, *, digits: int = 2, unit: str = "") -> str:
    shown = f"{value:.{digits}f}"
    return f"**{shown}{unit}**" if float(shown) <= round(most, digits) else f"{shown}{unit}"
