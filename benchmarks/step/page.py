"""Renders docs/cost.md, docs/scaling.md and the README's figures from the result files: no number is typed by hand.

`python -m step.page` in benchmarks/.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

from gpu import page as gpu
from gpu.verdicts import part, table, verdicts
from sharded import page as sharded_page

from step import authors
from step.aims import aims

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

COST = """# What it costs

{summary}

To measure your own model, `lfu-reg overhead MODEL` runs SFT, LfU and other methods side by side and recommends settings for a budget
([the command](cli.md)).

## How to read the tables

One training step is a forward and a backward pass. All methods run interleaved in one process; a ratio is taken in
every round, and the table has its median and quartiles. On one CPU thread time is processor time. The *floor* is one plus
the blocks' share of SFT's forward and backward: what it takes to go through all blocks twice. Exact steps below it are those
that [reuse blocks](how-it-works.md#what-both-passes-share): steering runs the first block once, and with `layers="late"`
only the last third of the blocks runs twice. The measured share itself moves by a few hundredths between runs on a shared
machine. *Literal* is the paper's text as it reads, with three forwards; the authors' procedures are those of their code. On CPU, memory
is the peak of the bytes that autograd keeps for backward passes.

<!-- Written by `python -m step.page` in benchmarks/; do not edit. -->
"""

ON_A_GPU = """## On a GPU

The shape of Llama-3.1-8B, by [one command](gpu.md), which also holds the figures against the thresholds.

"""

ESTIMATORS = """## Below the floor: estimates

A cheaper step estimates the gradient of the consistency term. *Cost* is the part of pass 2 and its backward that is left.
*Bias* is how far the mean of the estimates is from the exact gradient, relative to it; *noise* is how much of that the
number of draws explains; *spread* is the root mean square distance of one estimate from their mean; *cosine* is that of
one estimate with the exact gradient, on average. Only `batch_fraction`, `every` and `layers` are options of the library.
The ratio to SFT is a calculation, for steering on the small Llama above (`step_cpu_lora.json`): the measured ratio minus
the time of what is left out of pass 2.

Measured by `python -m step.estimators` (`estimators.csv`) on the demo's small trained model, full tuning.
"""

READING = """
* `batch_fraction` and `every` have no bias by construction (what is measured for the former is up to 1.8 times what the number
  of draws explains on average; a few samples with large gradients dominate it), and a spread that grows as the cost falls: that is the price of a step below the floor. At the same cost
  `batch_fraction` spreads less than `every`, and both keep more of the exact direction than the other estimates without bias.
* A random depth or prefix of pass 2, with weights that make up for what is left out, has no bias either, but spreads more at
  a higher cost than half of the samples. Neither is an option of the library.
* Fixed parts (the first layers, the first half of the positions) are other objectives, not estimates: their bias is of the
  size of the gradient. The options `layers="early"` and `"late"` also perturb these layers only; both are exact for their own
  objective, and `"late"` keeps more of the direction of the whole one than the estimates without bias do at its cost. In a
  causal model a prefix is exact for its own tokens, but it holds few response tokens or none.
* The ascent direction of the step before saves next to nothing, as its taps are a small part of the clean backward, and what
  it gives has little to do with the exact gradient here. One direction for all micro-batches of an accumulated step was
  tried once for each theta_aux, with very different outcomes. The clean pass cannot be shared: it is the SFT pass itself.
"""

SCALING = """# How the cost grows

A step's time over the size of the batch and of the model: small Llamas with LoRA tuning on one CPU thread, processor time, one size
changed at a time. The exponent is the slope of log(time) over log(size): 1 is proportional, 0 is no effect.

<!-- Written by `python -m step.page` in benchmarks/ from what `python -m step.scaling` and `python -m sharded` measured; do not edit. -->

![Time per step over each size](scaling.png)
"""


def main() -> None:
    """Write the pages."""
    steps = {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("step_cpu_*.json"))}
    small = steps["step_cpu_lora.json"]
    parts = [COST.format(summary=summary(small)), *(section(result, name) for name, result in steps.items())]
    if (RESULTS / authors.FILE).exists():
        parts.append(authors.about(section(json.loads((RESULTS / authors.FILE).read_text()), authors.FILE)))
    if (RESULTS / "estimators.csv").exists():
        parts.append(estimators(small))
    parts += [aims(steps), on_a_gpu(gpu.results())]
    (ROOT / "docs" / "cost.md").write_text("\n".join(parts))
    scaling_file = RESULTS / "scaling.json"
    if scaling_file.exists():
        page = [scaling(json.loads(scaling_file.read_text()), steps)]
        sharded = RESULTS / "collectives.json"
        if sharded.exists():
            page.append(sharded_page.section(json.loads(sharded.read_text())))
        (ROOT / "docs" / "scaling.md").write_text("\n\n".join(page))
        (ROOT / "docs" / "scaling.png").write_bytes((RESULTS / "scaling.png").read_bytes())
    readme = ROOT / "README.md"
    figures = readme_figures(steps["step_cpu_lora.json"])
    readme.write_text(
        re.sub(r"(<!-- cost -->\n).*?(<!-- /cost -->)", rf"\1{figures}\2", readme.read_text(), flags=re.S)
    )


def on_a_gpu(results: dict[str, dict[str, Any]]) -> str:
    """Thresholds and tables, once there are files of `python -m gpu`."""
    result = part(results, "step", "interleaved", "exact")
    if result is None:
        return ON_A_GPU + gpu.NONE_YET
    return "\n".join([ON_A_GPU + table(verdicts(results)), "#" + section(result, "gpu/step.json")])


def summary(result: dict[str, Any]) -> str:
    """The answer in one table."""
    rows = {row["key"]: row for row in result["rows"]}
    sft = rows["sft"]
    named = {"steering": "all layers", "lora": "all layers", "weights": "all layers"}
    named |= {f"{key}-late": "the last third" for key in ("steering", "lora")}
    lines = [
        "A step takes about twice as long as plain fine-tuning, with exact gradients, and less where only later layers are "
        f"regularized. Measured on a Llama with {result['model']['layers']} layers, LoRA tuning, one CPU thread.",
        "",
        "| `auxiliary` | layers | time of a step | peak memory |",
        "|---|---|---|---|",
    ]
    for key, layers in named.items():
        row = rows[key]
        auxiliary = key.removesuffix("-late")
        lines.append(
            f'| `"{auxiliary}"` | {layers} | {row["ratio"]:.2f} x SFT | {row["peak_mb"] / sft["peak_mb"]:.2f} x SFT |'
        )
    return "\n".join(lines)


def section(result: dict[str, Any], source: str) -> str:
    """The tables of one result file of `lfu-reg overhead`."""
    s, model, about = result["setting"], result["model"], result["surroundings"]
    threads = f", {s['threads']} thread(s)" if s["device"] == "cpu" else ""
    lines = [
        f"## {s['model']}, {s['tuning']} tuning, {s['device']}, {s['dtype']}",
        "",
        f"{model['layers']} layers, {model['parameters'] / 1e6:.1f} M parameters, {model['trainable'] / 1e6:.2f} M of them "
        f"trained; {s['batch']} x {s['tokens']} tokens; {s['rounds']} rounds{threads}, {result['clock']}. "
        f"{about['hardware']}, torch {about['torch']}, transformers {about['transformers']}, {about['date']}, commit "
        f"{about['commit']} (`{source}`).",
        "",
        f"The floor is **{result['floor']:.2f}**: the blocks take {result['blocks_share']:.3f} of SFT's time"
        + counted_share(result)
        + ".",
        "",
        "| method | ms | ratio to SFT | quartiles | of the floor | tokens/s | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['method']} | {row['ms']:.0f} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} "
            f"| {row['over_floor']:.3f} | {row['tokens_per_second']:.0f} | {row['peak_mb']:.0f} |"
        )
    if result["at_full_depth"]:
        full = result["at_full_depth"]
        listed = ", ".join(f"{key} {ratio:.2f}" for key, ratio in full["ratios"].items())
        lines += ["", f"Extrapolated to all {full['layers']} layers: floor {full['floor']:.2f}, {listed}."]
    return "\n".join([*lines, "", *phases(result), *advice(result)])


def counted_share(result: dict[str, Any]) -> str:
    """By counted operations."""
    share = (result["counted"] or {}).get("blocks_share")
    return "" if share is None else f" (and {share:.3f} of its operations)"


def phases(result: dict[str, Any]) -> list[str]:
    """Where the time goes."""
    rows = [row for row in result["rows"] if row["phases_ms"]]
    if not rows:
        return []
    lines = [
        "| phase, ms | " + " | ".join(row["method"] for row in rows) + " |",
        "|---|" + "---|" * len(rows),
        *(
            f"| {name} | " + " | ".join(f"{row['phases_ms'][name]:.1f}" for row in rows) + " |"
            for name in rows[0]["phases_ms"]
        ),
        "| outside of the passes | " + " | ".join(f"{100 * row['outside_of_passes']:.1f} %" for row in rows) + " |",
    ]
    return [*lines, ""]


def advice(result: dict[str, Any]) -> list[str]:
    """Options within the budget."""
    if not result["advice"] or not result["advice"]["options"]:
        return []
    return [
        f"Within {result['setting']['time_budget']:g} times SFT's time:",
        "",
        "| setting | predicted | measured | gradient |",
        "|---|---|---|---|",
        *(
            f"| `{o['code']}` | {o['predicted_ratio']:.2f} | {o['ratio']:.2f} | {o['effect']} |"
            for o in result["advice"]["options"]
        ),
        "",
    ]


def estimators(small: dict[str, Any]) -> str:
    """The table of estimators.csv."""
    row = next(row for row in small["rows"] if row["key"] == "steering")
    sft = next(row for row in small["rows"] if row["key"] == "sft")
    pass_2 = sum(row["phases_ms"][name] for name in ("perturbed forward", "distance", "perturbed backward")) / sft["ms"]
    lines = [
        ESTIMATORS,
        "| theta_aux | estimate | cost | ratio | bias | noise | spread | cosine | draws |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for e in csv.DictReader((RESULTS / "estimators.csv").open()):
        ratio = row["ratio"] - (1 - float(e["cost"])) * pass_2
        if e["estimator"].startswith("every"):
            ratio = 1 + float(e["cost"]) * (row["ratio"] - 1)
        figures = " | ".join(f"{float(e[key]):.2f}" for key in ("bias", "noise", "spread", "cosine"))
        lines.append(
            f"| {e['auxiliary']} | {e['estimator']} | {float(e['cost']):.2f} | {ratio:.2f} | {figures} | {e['draws']} |"
        )
    return "\n".join([*lines, READING])


def compared(step: dict[str, Any]) -> str:
    """Counted and measured ratios of a result of `lfu-reg overhead`."""
    rows, counted = {row["key"]: row for row in step["rows"]}, step["counted"]["steps"]
    cells = " | ".join(
        f"{counted[key]['flops'] / counted['sft']['flops']:.2f} | {rows[key]['ratio']:.2f}"
        for key in ("steering", "lora")
    )
    about = f"{step['setting']['model']}, {step['model']['layers']} layers, {step['setting']['tuning']}"
    return f"| {about} | {cells} | {rows['sft']['ms']:.0f} |"


def scaling(result: dict[str, Any], steps: dict[str, Any]) -> str:
    """The page on scaling."""
    about = result["surroundings"]
    lines = [
        SCALING,
        f"Base: {', '.join(f'{key} {value}' for key, value in result['base'].items())}; {result['rounds']} rounds. "
        f"{about['hardware']}, torch {about['torch']}, {about['date']}, commit {about['commit']}.",
        "",
        "| size | SFT | LfU steering | LfU LoRA |",
        "|---|---|---|---|",
        *(
            f"| {axis} | {e['sft']:.2f} | {e['steering']:.2f} | {e['lora']:.2f} |"
            for axis, e in result["exponents"].items()
        ),
        "",
        "## Is the ratio that of counted operations?",
        "",
        "| size | steering: counted | measured | LoRA: counted | measured |",
        "|---|---|---|---|---|",
    ]
    errors: dict[str, list[float]] = {"steering": [], "lora": []}
    for p in result["points"]:
        cells = " | ".join(f"{p['counted_ratio'][key]:.2f} | {p['ratio'][key]:.2f}" for key in errors)
        lines.append(f"| {p['axis']} {p['value']} | {cells} |")
        for key, found in errors.items():
            found.append(p["ratio"][key] / p["counted_ratio"][key] - 1)
    mean = {key: sum(found) / len(found) for key, found in errors.items()}
    largest = {key: max(found, key=abs) for key, found in errors.items()}
    lines += [
        "",
        f"Measured is {100 * mean['steering']:+.0f} % of counted on average for steering (at most "
        f"{100 * largest['steering']:+.0f} %) and {100 * mean['lora']:+.0f} % for LoRA ({100 * largest['lora']:+.0f} %). "
        "These are steps of milliseconds. In the larger ones of [what it costs](cost.md):",
        "",
        "| model | steering: counted | measured | LoRA: counted | measured | SFT ms |",
        "|---|---|---|---|---|---|",
        *(compared(step) for step in steps.values()),
        "",
        "So counted operations forecast steps that take long enough, and are too low for tiny ones, where work that does not "
        "grow with the matrices has a larger part.",
        "",
        "## Larger models, counted",
        "",
        "One sample, LoRA tuning, bfloat16. *Saved* is what autograd keeps for SFT's backward without checkpointing.",
        "",
        "| model | tokens | weights GB | trained, MB of gradients | blocks' share | SFT TFLOP | steering | LoRA | saved GB |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {m['model']} | {m['tokens']} | {m['parameter_gb']:.1f} | {m['gradient_mb']:.0f} | {m['blocks_share']:.3f} "
            f"| {m['sft_tflop']:.1f} | {m['ratio']['steering']:.2f} | {m['ratio']['lora']:.2f} "
            f"| {m['saved_gb']:.1f} |"
            for m in result["large"]
        ),
    ]
    return "\n".join(lines)


def readme_figures(result: dict[str, Any]) -> str:
    """The README's table."""
    ratio = {row["key"]: f"{row['ratio']:.2f}" for row in result["rows"]}
    shown = [f"{name}{end}" for name in ("steering", "lora", "weights") for end in ("", "-one", "-late")]
    widest = max(
        max(abs(q - row["ratio"]) for q in row["ratio_quartiles"]) for row in result["rows"] if row["key"] in shown
    )
    s = result["setting"]
    lines = ["| time of a step, in SFT's | steering | LoRA | weights |", "|---|---|---|---|"]
    for label, end in (("exact", ""), ('exact, `layers="late"`', "-late"), ('`strategy="one-backward"`', "-one")):
        cells = [ratio.get(f"{name}{end}", "") for name in ("steering", "lora", "weights")]
        if not any(cells):
            continue
        lines.append(f"| {label} | {' | '.join(cells)} |")
    as_written = (ratio["literal-steering"], ratio["literal-lora"], "")
    lines.append(f"| the paper's text read literally | {' | '.join(as_written)} |")
    return "\n".join(lines) + (
        f"\n\nProcessor time on one CPU thread: a Llama with {result['model']['layers']} layers and hidden size 256, "
        f"LoRA fine-tuning, {s['batch']} x {s['tokens']} tokens,\n{s['dtype']}, medians of {s['rounds']} interleaved "
        f"rounds (quartiles are up to {widest:.2f} away). Two passes through all blocks would be "
        f"{result['floor']:.2f}\n([all figures](docs/cost.md), `python -m step cpu_lora` in `benchmarks/`). "
        + gpu.readme()
    )


if __name__ == "__main__":
    main()
