"""From a name to a model of transformers with random weights, at the size asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lfu_reg.cli.errors import Unusable
from lfu_reg.cli.presets import PRESETS

# Names under which configurations keep the number of layers of a stack.
DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def load_config(name: str) -> Any:
    """The configuration of a preset, a local folder or a model on the hub; the weights are not fetched.

    Raises:
        Unusable: if there is none of that name; the message lists the presets. A name that is nearly a preset's is
            refused before the hub is asked.
    """
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise Unusable("Models by name need transformers: pip install 'lfu_reg[cli]'.") from error
    if name in PRESETS:
        kind, settings = PRESETS[name]
        return AutoConfig.for_model(kind, **settings)
    if (preset := nearest_preset(name)) is not None:
        raise Unusable(
            f"MODEL {name!r} is no preset; did you mean {preset!r}? Presets are {', '.join(PRESETS)}. A model on the "
            "hub is named with its owner, OWNER/NAME; of a folder, give the path."
        )
    try:
        return AutoConfig.from_pretrained(name, local_files_only=Path(name).is_dir())
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Unusable(
            f"MODEL {name!r} is no preset ({', '.join(PRESETS)}), no folder with a config.json, no file.py:function, "
            f"and no model that the hub or its local cache gives: {reason}"
        ) from error


def nearest_preset(name: str) -> str | None:
    """The preset that a name is a slip of; None for folders, hub names with an owner, and names unlike any preset."""
    if "/" in name or Path(name).is_dir():
        return None
    return next(iter(get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.8)), None)


def depth_of(config: Any) -> int | None:
    """Layers of the (deepest) stack, if the configuration says so."""
    text = config.get_text_config()
    return max((d for key in DEPTHS if isinstance(d := getattr(text, key, None), int)), default=None)


def build(config: Any, dtype: str, device: str, *, layers: int | None = None, vocab: int | None = None) -> nn.Module:
    """A model with a language-model head, hence with a loss.

    Args:
        config: of transformers; it is changed to the sizes asked for.
        dtype: of the weights.
        device: where they are made.
        layers: depth of the truncated model; None keeps all.
        vocab: size of the vocabulary; None keeps it.

    Raises:
        Unusable: for a configuration of a model without a loss, or one that cannot be truncated so.
    """
    if layers is not None:
        truncate(config, layers)
    if vocab is not None:
        config.get_text_config().vocab_size = vocab
    config.use_cache = False
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0  # generation settings, which a bare configuration lacks
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", getattr(torch, dtype))
    import_module("torch._dynamo")  # transformers does, too, but torch 2.6 cannot import it while "meta" is the device
    for kind in _kinds(config):
        with torch.device(device), _default_dtype(getattr(torch, dtype)):
            try:
                model: nn.Module = kind.from_config(config)
            except ValueError as error:
                if "Unrecognized configuration class" in str(error):
                    continue
                raise Unusable(f"The model cannot be built from its configuration: {error}") from error
        return model
    raise Unusable(
        f"A {type(config).__name__} has no language-model head, hence no loss to regularize. Give a causal, masked or "
        "sequence-to-sequence language model, or file.py:function that returns (model, batch, sft_loss_fn)."
    )


def truncate(config: Any, layers: int) -> None:
    """Make the configuration one of fewer layers.

    Raises:
        Unusable: if it has not so many.
    """
    depth = depth_of(config)
    if depth is None:
        raise Unusable(f"--layers {layers}: a {type(config).__name__} does not say how many layers it has.")
    if not 1 <= layers <= depth:
        raise Unusable(f"--layers {layers}: the model has {depth} layers; allowed are 1 to {depth}.")
    text = config.get_text_config()
    for key in DEPTHS:
        if isinstance(getattr(text, key, None), int):
            setattr(text, key, min(layers, getattr(text, key)))
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:layers]


def _kinds(config: Any) -> Iterator[Any]:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    if getattr(config, "is_encoder_decoder", False):
        yield AutoModelForSeq2SeqLM
    if any("MaskedLM" in name for name in config.architectures or ()):
        yield AutoModelForMaskedLM
    yield from (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForMaskedLM)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
