"""How a run is trained, and the two readings of that: the published code's and the text's.

Both share LoRA rank 8, scale 16/8, all linear maps; AdamW, learning rate 1e-4, cosine with 10 % warm-up; 3 epochs;
batches of 4, four times accumulated; bfloat16; seed 42. Nothing but the fields of `Protocol` tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints


@dataclass(frozen=True)
class Protocol:
    """How every run is trained; the defaults are the published code's.

    Attributes:
        name: of the reading, with what was switched.
        lr, warmup, epochs, batch_size, accumulate, rank, lora_alpha, seed: as usual.
        clip: largest gradient norm; 0 for no clipping.
        token_mean: whether the loss is the mean over all response tokens of an update, not of micro-batch means.
        keep_last: whether what is left of an epoch makes a smaller batch and update.
        max_length: most tokens an example.
        pad_to: lengths are padded to its multiples.
        newlines: whether two newlines follow the end token, as labels.
        input_section: whether an example's input gets a section of its own, not a line under the instruction.
        checkpointing: blocks are run again in the backward, to save memory: "unmoved" as in the published code, where
            pass 2 of LfU LoRA is run again with the weights already moved back; "exact", which changes no result; or
            "off".
        float32_adapters: whether adapters are float32 on a base of any dtype.
        direction: where the ascent's gradient comes from: another batch, drawn from a second loader that is shuffled on
            its own, or the batch itself.
        states: what l_cons compares: all of `output_hidden_states` (embeddings, blocks, the last one normed; 33 of 32
            layers), or the outputs of the blocks.
        lora: what LfU moves: the adapter that is trained, or LoRA matrices of its own that start at "no change".
        steering: LfU RepS: the published procedure, or Eq. 2 to 5 with steering vectors.
    """

    name: str = "published"
    lr: float = 1e-4
    warmup: float = 0.1
    epochs: int = 3
    batch_size: int = 4
    accumulate: int = 4
    rank: int = 8
    lora_alpha: int = 16
    seed: int = 42
    clip: float = 1.0
    token_mean: bool = True
    keep_last: bool = True
    max_length: int = 2048
    pad_to: int = 8
    newlines: bool = True
    input_section: bool = False
    checkpointing: Literal["unmoved", "exact", "off"] = "unmoved"
    float32_adapters: bool = True
    direction: Literal["second-loader", "own-batch"] = "second-loader"
    states: Literal["hidden-states", "blocks"] = "hidden-states"
    lora: Literal["adapter", "extra"] = "adapter"
    steering: Literal["as-published", "eq5"] = "as-published"


PROTOCOLS = {
    "published": Protocol(),
    "text": Protocol(
        name="text", checkpointing="exact", direction="own-batch", states="blocks", lora="extra", steering="eq5"
    ),
}


def switched(protocol: Protocol, switches: list[str]) -> Protocol:
    """The protocol with `name=value` switches, which its name then lists.

    Raises:
        ValueError: for a name or a value that there is not.
    """
    kinds = get_type_hints(Protocol)
    names = [field.name for field in fields(Protocol) if field.name != "name"]
    changes: dict[str, Any] = {}
    for switch in switches:
        name, _, text = switch.partition("=")
        if name not in names:
            raise ValueError(f"--switch {switch}: no such switch; there are {', '.join(names)}.")
        changes[name] = _value(switch, text, kinds[name])
    return replace(protocol, **changes, name=", ".join([protocol.name, *switches]))


def _value(switch: str, text: str, kind: Any) -> Any:
    allowed = ("true", "false") if kind is bool else get_args(kind)
    if allowed and text not in allowed:
        raise ValueError(f"--switch {switch}: allowed values are {', '.join(allowed)}.")
    if allowed:
        return text == "true" if kind is bool else text
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"--switch {switch}: the value has to be a number ({kind.__name__}).") from None


@dataclass(frozen=True)
class Model:
    """A model: its name in the paper (empty for others), where it is on the hub, and LoRA's alpha and lambda for it."""

    name: str
    hub: str
    alpha: float = 0.1
    lam: float = 5.0


INSTRUCT = {"alpha": 0.001, "lam": 500.0}
STEERING = {"alpha": 0.1, "lam": 0.1}  # the same for every model
MODELS: dict[str, Model] = {
    "llama-3.1-8b": Model("Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
    "llama-3.1-8b-instruct": Model("Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", **INSTRUCT),
    "llama-2-7b": Model("Llama-2-7B", "meta-llama/Llama-2-7b-hf"),
    "mistral-7b": Model("Mistral-7B-v0.3", "mistralai/Mistral-7B-v0.3"),
    "qwen3-8b": Model("Qwen3-8B", "Qwen/Qwen3-8B-Base"),
    "qwen3-4b": Model("Qwen3-4B", "Qwen/Qwen3-4B-Base"),
}
