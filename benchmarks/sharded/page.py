"""The part of docs/scaling.md on FSDP2, from collectives.json: what shapes predict, and what was counted."""

from __future__ import annotations

from typing import Any

from sharded.bytes import GATHERED, STEPS

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce")
SHOWN = 2  # cases whose figures are listed; the others' differences are

RULE = """## Under FSDP2: predicted and counted

FSDP2 gathers the weights of a unit before use and frees them after it, so traffic follows from shapes
(`benchmarks/sharded/bytes.py`). Every block is a unit. Per step and GPU, with B the bytes of the blocks' weights in the
dtype of the all-gathers, R those of the root (embeddings, last norm, LM head), G those of the trained weights' gradients,
and G' the part of G that the hidden states depend on:

| step | all-gathers | reduce-scatters |
|---|---|---|"""

DETAILS = """
* The root stays gathered from its forward to the end of the next backward, which is FSDP2's default. With
  `reshard_after_forward=True` for the root as well, it is gathered {freed} times.
* In pass 2 the final norm and the LM head get no gradient: G' is G without them. With LoRA tuning both are the same.
* A retained step gathers in the forward, the ascent backward, the second forward, and for either pass in the joint
  backward; the first block once less where embeddings are frozen, unless blocks are checkpointed.
* Tensors are split along their first dimension, and padded where the number of ranks does not divide it. B, R and G are
  the padded sizes: LoRA matrices with 8 rows take 64 on 64 ranks.
* `auxiliary="weights"` adds one all-reduce, of four bytes per trained tensor.
* `strength` adds one all-reduce of eleven numbers to every step, from which all ranks get the same lambda. Counted here with
  `lam` given, in the middle of training.
* Bytes are those of whole tensors. Of N ranks, each sends and receives (N - 1) / N of them.
* Operations: SFT's, the blocks' forward and backward once more, and the head's forward. Here no block is
  reused, and pass 2 runs the loss function to its end.
"""


def section(result: dict[str, Any]) -> str:
    """The rule, how it was checked, and what it says of a model that was not run."""
    return "\n".join([*rule(), *checked(result), *forecasts(result["forecasts"])]) + "\n"


def rule() -> list[str]:
    """What `predicted_traffic` computes, in letters."""
    labels = {"sft": "SFT", "released": 'LfU, `strategy="released"`', "retained": 'LfU, `strategy="retained"`'}
    reduced = {"sft": "G", "released": "G + G'", "retained": "G"}
    rows = [
        f"| {labels[kind]} | {blocks} B + {'' if kept == 1 else f'{kept} '}R | {reduced[kind]} |"
        for kind, (blocks, kept, _) in GATHERED.items()
    ]
    freed = ", ".join(str(times) for _, _, times in GATHERED.values())
    return [RULE, *rows, DETAILS.format(freed=freed)]


def checked(result: dict[str, Any]) -> list[str]:
    """Predicted and counted figures of the small model."""
    about, cases = result["surroundings"], result["cases"]
    first = cases[0]["case"]
    lines = [
        "### Checked",
        "",
        f"`python -m sharded` records every collective of one step on {result['ranks']} processes (gloo, CPU): "
        f"a Llama of {cases[0]['sizes']['blocks']} blocks (`{first['model']}`), {first['batch']} x {first['tokens']} tokens on "
        f"each. Operations are counted in the sharded step as well. {about['hardware']}, torch {about['torch']}, "
        f"transformers {about['transformers']}, {about['date']}, commit {about['commit']} (`collectives.json`).",
        "",
        "| model | step | all-gathers: predicted | counted | reduce-scatters: predicted | counted | operations, of SFT's: predicted | counted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in cases[:SHOWN]:
        for step, found in entry["counted"].items():
            cells = [entry["case"]["title"], STEPS[step]]
            for kind in COLLECTIVES[:2]:
                cells += [amount(figures[kind]) for figures in (entry["predicted"][step], found)]
            cells += [ratio(entry[source], step) for source in ("predicted", "counted")]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *summary(cases), ""]


def amount(traffic: dict[str, int]) -> str:
    """Number and megabytes."""
    return f"{traffic['number']}, {traffic['bytes'] / 1e6:.2f} MB"


def ratio(steps: dict[str, Any], step: str) -> str:
    """Operations relative to SFT's."""
    flops = steps[step]["flops"]
    return "" if flops is None else f"{flops / steps['sft']['flops']:.3f}"


def summary(cases: list[dict[str, Any]]) -> list[str]:
    """How far all predictions are off, those that the table leaves out as well."""
    pairs = [(c["predicted"][step], found) for c in cases for step, found in c["counted"].items()]
    exact = sum(all(p[kind] == found[kind] for kind in COLLECTIVES) for p, found in pairs)
    off = max(abs(p[kind]["bytes"] / found[kind]["bytes"] - 1) for p, found in pairs for kind in COLLECTIVES[:2])
    flops: dict[str, list[float]] = {}
    for c in cases:
        for step, found in c["counted"].items():
            if c["predicted"][step]["flops"] is not None:
                flops.setdefault(step, []).append(found["flops"] / c["predicted"][step]["flops"] - 1)
    listed = ", ".join(f"{100 * max(found, key=abs):+.1f} % for {STEPS[step]}" for step, found in flops.items())
    others = "; ".join(c["case"]["title"] for c in cases[SHOWN:])
    return [
        f"Also counted: {others}. Of all {len(pairs)} steps, {exact} have the predicted number of all-gathers, "
        f"reduce-scatters and all-reduces with the predicted bytes; the largest difference in bytes is {100 * off:.1f} %. "
        f"Counted operations differ from predicted ones by at most {listed}; those of retained steps are not predicted."
    ]


def forecasts(large: list[dict[str, Any]]) -> list[str]:
    """The same function, asked about models that were not run."""
    first = large[0]["case"]
    lines = [
        f"### {first['model']}: a forecast",
        "",
        f"By the same function; {first['batch']} x {first['tokens']} tokens on each GPU, without checkpointing. No run of this "
        "size has been made.",
        "",
        "| tuning | GPUs | step | all-gathers | GB | reduce-scatters | GB | bytes, of SFT's | TFLOP | of SFT's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in large:
        for step in ("sft", "steering", "steering, retained"):
            of_step, of_sft = entry["predicted"][step], entry["predicted"]["sft"]
            label = "LfU, released" if step == "steering" else STEPS[step].replace(", steering", "")
            dtype = "" if entry["case"]["dtype"] == "float32" else f", frozen weights in {entry['case']['dtype']}"
            cells = [entry["case"]["title"] + dtype, str(entry["ranks"]), label]
            for kind in COLLECTIVES[:2]:
                cells += [str(of_step[kind]["number"]), f"{of_step[kind]['bytes'] / 1e9:.1f}"]
            cells.append(f"{moved(of_step) / moved(of_sft):.3f}")
            cells.append("" if of_step["flops"] is None else f"{of_step['flops'] / 1e12:.0f}")
            cells.append(ratio(entry["predicted"], step))
            lines.append("| " + " | ".join(cells) + " |")
    ratios = [
        f(e["predicted"])
        for e in large
        for f in (
            lambda steps: moved(steps["steering"]) / moved(steps["sft"]),
            lambda steps: steps["steering"]["flops"] / steps["sft"]["flops"],
        )
    ]
    kept = [moved(e["predicted"]["steering, retained"]) / moved(e["predicted"]["sft"]) for e in large]
    return [
        *lines,
        "",
        f"Bytes and operations of the default strategy are {min(ratios):.2f} to {max(ratios):.2f} times SFT's, so a step should "
        "take about twice as long whichever of them binds, and however far they overlap; no time under FSDP2 has been measured. The retained graph moves "
        f"{min(kept):.2f} to {max(kept):.2f} times the bytes. Not part of the forecast: latency, the optimizer, memory, what "
        "a network makes of many ranks, and whether NCCL and CUDA streams change a count that was taken with gloo.",
    ]


def moved(of_step: dict[str, Any]) -> int:
    """Bytes of all collectives of a step."""
    return sum(int(of_step[kind]["bytes"]) for kind in COLLECTIVES)
