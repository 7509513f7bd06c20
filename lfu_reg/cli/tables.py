"""Results as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from lfu_reg.cli.phases import BETWEEN, PASSES
from lfu_reg.cli.repeats import merged


def show_overhead(result: dict[str, Any], console: Console) -> None:
    """Everything that `measure` found."""
    model, setting, floor = result["model"], result["setting"], result["floor"]
    made = (
        "batch of its own"
        if model["own"]
        else f"{setting['tuning']}, {setting['batch']} x {setting['tokens']} tokens, {setting['dtype']}"
    )
    console.print(
        f"{setting['model']}: {model['layers']} layers, {_count(model['parameters'])} parameters, "
        f"{_count(model['trainable'])} trained; {made}; {setting['device']} ({result['surroundings']['hardware']}); "
        f"{result['clock']}"
    )
    table = _table(
        "One training step", "method", "ms", "ratio to SFT", "quartiles", "of the floor", "tokens/s", "peak MB"
    )
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        table.add_row(
            row["method"],
            f"{row['ms']:.1f}",
            f"{row['ratio']:.2f}",
            f"{low:.2f} .. {high:.2f}",
            f"{row['over_floor']:.3f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['peak_mb']:.1f}",
        )
    console.print(table)
    counted = (result["counted"] or {}).get("blocks_share")
    console.print(
        f"The floor is {floor:.3f}, for two passes through all blocks, which take {result['blocks_share']:.3f} of "
        "SFT's forward and backward. Steering runs the first block once; layers='late' runs two thirds of them once."
        + ("" if counted is None else f" By counted operations: {1 + counted:.3f}.")
    )
    _show_phases(result, console)
    if result["at_full_depth"] is not None:
        full = result["at_full_depth"]
        listed = ", ".join(f"{key} {ratio:.2f}" for key, ratio in full["ratios"].items())
        console.print(f"Estimated for all {full['layers']} layers: floor {full['floor']:.3f}, {listed}.")
    _show_advice(result, console)


def _show_phases(result: dict[str, Any], console: Console) -> None:
    rows = [row for row in result["rows"] if row["phases_ms"]]
    if not rows:
        return
    table = _table("Where the time goes, ms", "phase", *(row["method"] for row in rows))
    for name in (*PASSES, *BETWEEN):
        table.add_row(name, *(f"{row['phases_ms'][name]:.2f}" for row in rows))
    table.add_row("outside of the passes", *(f"{100 * row['outside_of_passes']:.1f} %" for row in rows))
    console.print(table)


def _show_advice(result: dict[str, Any], console: Console) -> None:
    advice, setting = result["advice"], result["setting"]
    if advice is None:
        return
    budgets = [
        *([f"{setting['time_budget']:g} times SFT's time"] if setting["time_budget"] else []),
        *([f"{setting['memory_budget'] / 1e9:g} GB"] if setting["memory_budget"] else []),
    ]
    if advice["over_memory_budget"]:
        console.print(f"Over the memory budget: {', '.join(advice['over_memory_budget'])}.")
    if not advice["options"]:
        console.print(f"Nothing measured is within {' and '.join(budgets)}; combine every=k with batch_fraction.")
        return
    depth = result["model"]["layers"]
    full = (result["at_full_depth"] or {"layers": depth})["layers"]
    model = f"a model of {depth} layers" if full == depth else f"{depth} of the model's {full} layers alone"
    title = f"Predicted within {' and '.join(budgets)}, for {model}; {setting['rounds']} rounds of each"
    table = _table(title, "setting", "layers", "predicted", "measured", "quartiles", "peak MB", "gradient")
    for option in advice["options"]:
        low, high = option["ratio_quartiles"]
        table.add_row(
            option["code"],
            f"{option['layers']} of {depth}",
            f"{option['predicted_ratio']:.2f}",
            f"{option['ratio']:.2f}",
            f"{low:.2f} .. {high:.2f}",
            f"{option['peak_mb']:.1f}",
            option["effect"],
        )
    console.print(table)


def show_inspection(result: dict[str, Any], console: Console, auxiliary: str) -> None:
    """Everything that `inspect` found."""
    model = result["model"]
    console.print(
        f"{model['name']} ({model['class']}): {_count(model['parameters'])} parameters, "
        f"{_count(model['trainable'])} trained, hidden size {model['hidden']}"
    )
    table = _table("Hooked layers", "layer", "number", "class", "parameters of each")
    kinds = {layer["name"]: (layer["class"], layer["parameters"]) for layer in result["layers"]}
    for name, (kind, parameters), number in merged(kinds):
        table.add_row(name, f"x{number}", kind, _count(parameters))
    console.print(table)
    if auxiliary == "lora":
        table = _table("Linear maps that get LoRA deltas", "map", "number", "in", "out", "A and B of each")
        sizes = {entry["name"]: (entry["in"], entry["out"], entry["parameters"]) for entry in result["linears"]}
        for name, (n_in, n_out, parameters), number in merged(sizes):
            table.add_row(name, f"x{number}", str(n_in), str(n_out), _count(parameters))
        console.print(table)
    table = _table("Components", "auxiliary", "parameters", "MB in a step")
    for key, entry in result["auxiliaries"].items():
        if entry["parameters"] is not None:
            table.add_row(key, _count(entry["parameters"]), f"{entry['mb']:.2f}")
    console.print(table)
    if result["clean_states_mb"] is not None:
        console.print(f"Clean hidden states kept between the passes: {result['clean_states_mb']:.2f} MB.")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        left = number == 0 or column in ("class", "gradient")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    return table


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
