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
OVER_FLOOR, PEAK, OUTSIDE = 1.03, 1.10, 0.01

TEXT = """## What we aim for, and where we are

Ratios to SFT of exact steps on all layers; in bold what reaches the aim.

"""
MISSED = """
LoRA deltas on all layers, and the weights themselves, act from the first block on. So an exact step has no prefix to
share and goes through all blocks twice: it cannot be below the floor of its run, nor can it reach an aim that is. What
it costs above the floor are the products of the deltas, the ascent, the distance, and the step's own calls (tables of
phases below). To come below: a later first layer (`layers="late"`, exact for its own objective), or an estimate
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
    lines = [
        TEXT + "| setting | aim | floor | " + " | ".join(KEYS.values()) + " |",
        "|---|---|---|" + "---|" * len(KEYS),
    ]
    for about, (file, most) in ON_CPU.items():
        cells = " | ".join(_bold(row["ratio"], most) for row in _rows(steps[file]))
        lines.append(f"| {about} | {most:.2f} | {steps[file]['floor']:.2f} | {cells} |")
    about, file = ON_GPU
    gpu = steps.get(file)
    cells = " | ".join(_bold(row["ratio"], OVER_FLOOR * gpu["floor"]) if gpu else "not measured" for row in _rows(gpu))
    floor = f"{gpu['floor']:.2f}" if gpu else "not measured"
    lines.append(f"| {about} | {OVER_FLOOR:.2f} x floor | {floor} | {cells} |")
    lines += [
        "",
        "| setting | | aim | " + " | ".join(KEYS.values()) + " |",
        "|---|---|---|" + "---|" * len(KEYS),
    ]
    for about, file in [*((about, file) for about, (file, _) in ON_CPU.items()), ON_GPU]:
        result = steps.get(file)
        sft = _row(result, "sft")["peak_mb"] if result else 1.0
        for what, most, value in (
            ("peak memory / SFT's", f"{PEAK:.2f}", lambda row, sft=sft: _bold(row["peak_mb"] / sft, PEAK)),
            (
                "outside of the passes",
                f"{100 * OUTSIDE:.0f} %",
                lambda row: _bold(100 * row["outside_of_passes"], 100 * OUTSIDE, digits=1, unit=" %"),
            ),
        ):
            cells = " | ".join(value(row) if result else "not measured" for row in _rows(result))
            lines.append(f"| {about} | {what} | {most} | {cells} |")
    return "\n".join([*lines, MISSED])


def _rows(result: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [_row(result, key) if result else {} for key in KEYS]


def _row(result: dict[str, Any] | None, key: str) -> dict[str, Any]:
    assert result is not None
    found: dict[str, Any] = next(row for row in result["rows"] if row["key"] == key)
    return found


def _bold(value: float, most: float, *, digits: int = 2, unit: str = "") -> str:
    shown = f"{value:.{digits}f}"
    return f"**{shown}{unit}**" if float(shown) <= round(most, digits) else f"{shown}{unit}"
