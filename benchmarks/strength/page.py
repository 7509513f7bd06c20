"""Writes the tables of docs/choosing-a-strength.md from the result files: `python -m strength.page` in benchmarks/."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from evidence.paired import difference

from strength import store
from strength.sizes import AUXILIARIES, SIZES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "choosing-a-strength.md"
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)
K = TypeVar("K")
Rows = list[dict[str, str]]
MISSING = "not measured"


def main() -> None:
    """Write them."""
    PAGE.write_text(with_tables(PAGE.read_text()))


def with_tables(text: str, tables: Mapping[str, Callable[[], str]] | None = None) -> str:
    """The page with its tables made anew: those of this page unless others are given."""
    for name, make in (TABLES if tables is None else tables).items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"The page has no single place for the table {name!r}: {start.strip()} ... {end}")
        before, _, rest = text.partition(start)
        text = f"{before}{start}{make()}\n{end}{rest.partition(end)[2]}"
    return text


def rounding() -> str:
    """Cosine of the gradient in bfloat16 with float32's, a column a displacement."""
    rows = store.rows("rounding")
    columns = sorted({float(row["displacement"]) for row in rows})
    lines = []
    for size in SIZES:
        for auxiliary in AUXILIARIES:
            mine = [row for row in rows if row["size"] == size and row["auxiliary"] == auxiliary]
            for mode, title in (("bfloat16", "bfloat16"), ("autocast", "autocast")):
                if cells := {float(row["displacement"]): row for row in mine if row["mode"] == mode}:
                    shown = [_bold(cells[c]["cosine"], 0.98) if c in cells else "" for c in columns]
                    lines.append([size, auxiliary, title, *shown])
            if mine:
                linear = {float(row["displacement"]): f"{float(row['linear']):.3f}" for row in mine}
                lines.append([size, auxiliary, "float32", *(linear.get(c, "") for c in columns)])
    return table(["model", "auxiliary", "arithmetic", *(f"{c:g}" for c in columns)], lines)


def strengths() -> str:
    """Score over strengths, the best one in bold, with the alpha times lambda that it came to."""
    rows = store.rows("training")
    lines = []
    for size, task in dict.fromkeys((row["size"], row["task"]) for row in _by_size(rows)):
        mine = [row for row in rows if (row["size"], row["task"]) == (size, task)]
        groups: dict[tuple[str, float], Rows] = defaultdict(list)
        for row in mine:
            if row["setting"] == "strength":
                groups[row["auxiliary"], float(row["value"])].append(row)
        sft = [r for r in mine if r["setting"] == "lr" and float(r["value"]) == SIZES[size].recipe.lr]
        for auxiliary in AUXILIARIES:
            found = {0.0: sft} | {value: group for (a, value), group in groups.items() if a == auxiliary}
            found = _on_common_seeds(found)
            if len(found) < 2:  # runs of other plans alone
                continue
            means = {value: statistics.fmean(_score(r) for r in group) for value, group in found.items()}
            best = min(means, key=means.__getitem__)
            shown = [_marked(means.get(value), value == best) for value in (0.0, *STRENGTHS)]
            at_one = found.get(1.0, [])
            products = [_median(at_one, key) if at_one else "" for key in ("lam", "product")]
            lines.append([size, task, auxiliary, *shown, *products, f"{len(found[best])}"])
    titles = ["model", "task", "auxiliary", "0", *(f"{value:g}" for value in STRENGTHS)]
    return table([*titles, "lambda at 1", "alpha * lambda at 1", "seeds"], lines)


def fixed() -> str:
    """Score with the lambda that strength 1 came to held fixed, with a third and with three times of it."""
    groups: dict[tuple[str, str, str], Rows] = defaultdict(list)
    for row in _by_size(store.rows("training")):
        if row["seed"] == "0":
            groups[row["size"], row["task"], row["auxiliary"]].append(row)
    lines = []
    for setting, rows in groups.items():
        at_one = [_score(r) for r in rows if (r["setting"], r["value"]) == ("strength", "1")]
        lams = sorted((float(r["value"]), _score(r)) for r in rows if r["setting"].startswith("lam at"))
        if lams:
            lines.append([*setting, f"{at_one[0]:.3f}", *(f"{score:.3f} ({lam:.2g})" for lam, score in lams)])
    return table(["model", "task", "auxiliary", "strength 1", "lambda / 3", "lambda", "lambda * 3"], lines)


def losses() -> str:
    """Both losses of the 2.2 M model over strengths, beside SFT's learning rates."""
    rows = [row for row in store.rows("training") if row["size"] == "2.2M" and row["task"] == SIZES["2.2M"].task]
    groups: dict[tuple[str, str, float], Rows] = defaultdict(list)
    for row in rows:
        if row["setting"] in ("lr", "strength"):
            groups[row["auxiliary"], row["setting"], float(row["value"])].append(row)
    groups = _on_common_seeds(groups)
    order = ["", *AUXILIARIES]
    lines = []
    for (auxiliary, setting, value), group in sorted(groups.items(), key=lambda i: (order.index(i[0][0]), i[0][2])):
        name = f"SFT at {value:g}" if setting == "lr" else f"{auxiliary}, strength {value:g}"
        figures = [_mean(group, key) for key in ("domain", "kept", "train")]
        lines.append([name, *figures, f"{len(group)}"])
    return table(["", "task, held out", "WikiText", "training", "seeds"], lines)


def ratios() -> str:
    """The ratio that was measured at strength 1: the extremes of all settings of a model and a tuning."""
    lines = []
    rows = store.rows("ratio")
    for size in SIZES:
        for tuning in ("lora", "full"):
            for dtype in ("float32", "bfloat16"):
                mine = [r for r in rows if (r["size"], r["tuning"], r["dtype"]) == (size, tuning, dtype)]
                if mine:
                    low, high = min(float(r["low"]) for r in mine), max(float(r["high"]) for r in mine)
                    summed = [float(r["summed"]) for r in mine if r["micro_batches"] == "4"]
                    four = f"{min(summed):.2f} to {max(summed):.2f}" if summed else MISSING
                    lines.append([size, tuning, dtype, f"{len(mine)}", f"{low:.3f} to {high:.3f}", four])
    return table(["model", "tuning", "dtype", "settings", "each batch", "sum of four micro-batches"], lines)


def price() -> str:
    """Ratios to SFT's processor time."""
    lines = []
    for r in store.rows("price"):
        quartiles = f"{float(r['low']):.2f} to {float(r['high']):.2f}"
        ratio, peak = (f"{float(r[key]):.2f}" for key in ("ratio", "peak"))
        lines.append([r["tuning"], f"{r['batch']} x {r['tokens']}", r["method"], ratio, quartiles, peak])
    return table(["tuning", "batch", "method", "time / SFT's", "quartiles", "peak memory / SFT's"], lines)


def directions() -> str:
    """Cosines with the exact gradient, a row an auxiliary and setting."""
    rows = store.rows("directions")
    names = list(dict.fromkeys(r["direction"] for r in rows))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for r in rows:
        lines.setdefault((r["auxiliary"], r["batch"], r["step"]), {})[r["direction"]] = f"{float(r['cosine']):.2f}"
    return table(
        ["auxiliary", "batch", "step", *names],
        [[*setting, *(cells.get(name, "") for name in names)] for setting, cells in lines.items()],
    )


def one_backward() -> str:
    """Steps of one backward minus exact ones, paired by seed, with 95 % intervals."""
    rows = store.rows("training")
    lines = []
    for task in dict.fromkeys(r["task"] for r in rows):
        for auxiliary in AUXILIARIES:
            both = [
                {r["seed"]: r for r in rows
                 if (r["task"], r["auxiliary"], r["setting"], r["value"]) == (task, auxiliary, setting, "1")
                 and r["size"] != "135M"}
                for setting in ("one-backward", "strength")
            ]  # fmt: skip
            seeds = sorted(both[0].keys() & both[1].keys())
            if len(seeds) > 1:
                cells = []
                for key in ("domain", "kept"):
                    found = difference(*([float(part[s][key]) for s in seeds] for part in both))
                    cells.append(f"{found.mean:+.3f} ± {found.half_width:.3f}")
                lines.append([task, auxiliary, *cells, f"{len(seeds)}"])
    return table(["task", "auxiliary", "task loss", "kept loss", "seeds"], lines)


def pushes() -> str:
    """Losses at strength 1 of what pushes a model the wrong way, beside the exact step; one seed."""
    names = {
        "strength": "exact",
        "perturbed": 'stop_gradient="perturbed"',
        "one-backward, direction of every backward": "one backward, its direction from every backward (tried)",
    }
    rows = [r for r in store.rows("training") if (r["size"], r["task"], r["value"]) == ("2.2M", "gsm8k-64", "1")]
    lines = []
    for auxiliary in AUXILIARIES:
        for setting, name in names.items():
            group = [r for r in rows if (r["auxiliary"], r["setting"], r["seed"]) == (auxiliary, setting, "0")]
            if group:
                lines.append([auxiliary, name, _mean(group, "domain"), _mean(group, "kept")])
    return table(["auxiliary", "step", "task, held out", "WikiText"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "strengths": strengths,
    "fixed": fixed,
    "losses": losses,
    "ratios": ratios,
    "rounding": rounding,
    "price": price,
    "directions": directions,
    "one-backward": one_backward,
    "pushes": pushes,
}


def _by_size(rows: Rows) -> Rows:
    order = list(SIZES)
    return sorted(rows, key=lambda row: order.index(row["size"]))


def _on_common_seeds(groups: Mapping[K, Rows]) -> dict[K, Rows]:
    """The groups that have runs, each with those of the seeds that all of them have."""
    found = {key: rows for key, rows in groups.items() if rows}
    seeds = set.intersection(*({row["seed"] for row in rows} for rows in found.values())) if found else set()
    return {key: [row for row in rows if row["seed"] in seeds] for key, rows in found.items()}


def _score(row: dict[str, str]) -> float:
    return float(row["domain"]) + float(row["rise"])


def _marked(value: float | None, best: bool) -> str:
    return "" if value is None else f"**{value:.3f}**" if best else f"{value:.3f}"


def _mean(rows: Rows, key: str) -> str:
    return f"{statistics.fmean(float(row[key]) for row in rows):.3f}"


def _median(rows: Rows, key: str) -> str:
    return f"{statistics.median(float(row[key]) for row in rows):.2g}"


def _bold(value: str, least: float) -> str:
    shown = f"{float(value):.3f}"
    return f"**{shown}**" if float(value) >= least else shown


def table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown, without a line break at its end."""
    rows = [f"| {' | '.join(line)} |" for line in (titles, *lines)]
    return "\n".join([rows[0], "|---" * len(titles) + "|", *rows[1:]])


if __name__ == "__main__":
    main()
