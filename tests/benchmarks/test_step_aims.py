"""Which aims are met is what the results say."""

from __future__ import annotations

from typing import Any

from step.aims import ON_CPU, aims


def result(ratio: float, *, floor: float = 1.9, peak: float = 100.0, outside: float = 0.005) -> dict[str, Any]:
    rows = [{"key": "sft", "peak_mb": 100.0}]
    rows += [
        {"key": key, "ratio": ratio, "peak_mb": peak, "outside_of_passes": outside}
        for key in ("steering", "lora", "weights")
    ]
    return {"floor": floor, "rows": rows}


def rows_of(page: str, about: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(f"| {about} |")]


def test_what_reaches_an_aim_is_bold_and_what_misses_it_is_not() -> None:
    files = {file: result(aim + 0.004) for file, aim in ON_CPU.values()}
    page = aims(files)
    for about, (_, aim) in ON_CPU.items():
        ratio, peak, outside = rows_of(page, about)
        assert ratio.endswith(f"| 1.90 | **{aim:.2f}** | **{aim:.2f}** | **{aim:.2f}** |")
        assert peak.endswith("| **1.00** | **1.00** | **1.00** |")
        assert outside.endswith("| **0.5 %** | **0.5 %** | **0.5 %** |")
    worse = aims({file: result(aim + 0.01, peak=120.0, outside=0.02) for file, aim in ON_CPU.values()})
    assert not any("**" in row for about in ON_CPU for row in rows_of(worse, about))
