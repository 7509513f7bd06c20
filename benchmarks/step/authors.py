"""The section of docs/cost.md on the procedures of the published code, beside the paper's own figures."""

from __future__ import annotations

from paper.published import published

FILE = "step_authors_cpu_lora.json"
TABLE_3 = ("3", "Llama-3.1-8B", "GSM8K")
TEXT = """## The authors' procedures

[As their code has them](paper.md#two-readings), with LoRA tuning. Both take a direction from another batch, which has
this one's shape here; the steering procedure is not Eq. 5. The paper's Table 3 has {lora:.2f} times SFT's time for LoRA
and {steering:.2f} for steering (Llama-3.1-8B, a GPU).

"""


def about(shown: str) -> str:
    """The section.

    Args:
        shown: tables of what was measured.
    """
    times = {method: figures["ms_per_step"] for (method, _), figures in published()[TABLE_3].items()}
    lora, steering = (times[f"LfU {kind}"] / times["SFT"] for kind in ("LoRA", "RepS"))
    return TEXT.format(lora=lora, steering=steering) + f"#{shown}"
