"""What a step may cost at most, and what it does: the section of docs/cost.md that says which aims are met."""

from __future__ import annotations

from typing import Any

KEYS = {"steering": "steering", "lora": "LoRA", "weights": "weights"}
ON_CPU = {
    "small Llama, LoRA tuning": ("step_cpu_lora.json", 1.90),
    "small Llama, full tuning": ("step_cpu_full.json", 1.90),
    "qwen3-0.6b, a small model with a large vocabulary, LoRA tuning": ("step_cpu_qwen3-0.6b.json", 1.75),
}
ON_GPU = ("Llama-3.1-8B, LoRA tuning, bfloat16, 4 x 512 tokens, a GPU", "step_cuda_llama-3.1-8b_lora.json")
OVER_FLOOR, PEAK, OUTSIDE = 1.03, 1.10, 1  # the last in percent
MISSING = "not measured"

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
(walks over the modules and the autograd graph, a look at each adapter): under 1 % where a step takes a second or more.
On a GPU they overlap with kernels that are still running, which is yet to be measured.
"""


def aims(steps: dict[str, dict[str, Any]]) -> str:
    """The section.

    Args:
        steps: results of `lfu-reg overhead` by the name of their file.
    """
    ratios, others = [], []
    for about, (file, most) in {**ON_CPU, ON_GPU[0]: (ON_GPU[1], None)}.items():
        aim = f"{OVER_FLOOR:.2f} x floor" if most is None else f"{most:.2f}"
        peak = [about, "peak memory / SFT's", f"{PEAK:.2f}"]
        outside = [about, "outside of the passes", f"{OUTSIDE} %"]
        if (result := steps.get(file)) is None:
            ratios.append([about, aim, *[MISSING] * (1 + len(KEYS))])
            others += [[*what, *[MISSING] * len(KEYS)] for what in (peak, outside)]
            continue
        sft, rows = _row(result, "sft"), [_row(result, key) for key in KEYS]
        floor = result["floor"]
        ratios.append([about, aim, f"{floor:.2f}", *(_bold(row["ratio"], most or OVER_FLOOR * floor) for row in rows)])
        others.append([*peak, *(_bold(row["peak_mb"] / sft["peak_mb"], PEAK) for row in rows)])
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
