"""The model with its weights, and its tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lfu_reg.cli.compare.plan import Setting
from lfu_reg.cli.configs import build
from lfu_reg.cli.errors import Unusable
from lfu_reg.cli.memory import available_bytes
from lfu_reg.cli.presets import PRESETS


def check_name(name: str) -> Any:
    """The configuration of a causal language model with weights.

    Raises:
        Unusable: where there is none under that name.
    """
    if name in PRESETS:
        raise Unusable(
            f"MODEL {name}: a preset has random weights, and what was never learnt cannot be forgotten. Give a folder "
            "written by save_pretrained, or a model on the hub, OWNER/NAME."
        )
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise Unusable(f"MODEL {name}: the folder has no config.json. Give one written by save_pretrained.")
    if not folder.exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise Unusable(f"MODEL {name}: there is no such folder. Give one, or a model on the hub, OWNER/NAME.")
    from transformers import AutoConfig

    with _explained(name, "configuration"):
        config = AutoConfig.from_pretrained(name)
    if getattr(config, "is_encoder_decoder", False):
        raise Unusable(f"MODEL {name}: an encoder with a decoder. Allowed are models that continue text (causal ones).")
    return config


def weights_digest(name: str) -> str:
    """Of a folder's weights, byte by byte, as it may be trained further under the same name; a hub's are its name."""
    files = sorted(file for ending in ("safetensors", "bin") for file in Path(name).glob(f"*.{ending}"))
    digest = hashlib.blake2b(digest_size=6)
    for file in files:
        with file.open("rb") as content:
            while part := content.read(1 << 24):
                digest.update(part)
    return digest.hexdigest() if files else name


def check_fits(setting: Setting) -> None:
    """Raise, before anything is allocated, if the weights and the logits of a step are more than there is memory."""
    config = check_name(setting.model)
    with _explained(setting.model, "layers"):
        weights = sum(p.numel() for p in build(config, setting.dtype, "meta").parameters())
    logits = 3 * setting.batch * setting.tokens * config.get_text_config().vocab_size * 4  # with gradient and softmax
    needed = weights * getattr(torch, setting.dtype).itemsize + logits
    available = available_bytes(setting.device)
    if available is not None and needed > available:
        raise Unusable(
            f"{setting.model} with {setting.batch} rows of {setting.tokens} tokens needs more than {needed / 1e9:.1f} "
            f"GB on {setting.device}, and {available / 1e9:.1f} GB are free. Give a smaller --batch or --tokens, "
            "--dtype bfloat16, or a smaller model."
        )


def load_tokenizer(name: str) -> Any:
    """The tokenizer, with a padding token."""
    from transformers import AutoTokenizer

    with _explained(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise Unusable(f"MODEL {name}: its tokenizer has no end token. Set tokenizer.eos_token, and save it again.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, dtype: str, device: str) -> Any:
    """The causal language model in evaluation mode, without a key/value cache."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one for reading a file is too much; downloads have their own
    with _explained(name, "weights"):
        model: Any = AutoModelForCausalLM.from_pretrained(name)
    model.config.use_cache = False
    return model.to(device, getattr(torch, dtype)).eval()


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """Whatever the hub's client, file formats or the model's own code raise, in one line."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        where = (
            "Check that the folder holds a causal language model and its tokenizer, both from save_pretrained"
            if Path(name).is_dir()
            else "Check the name, OWNER/NAME, and the network; log in if the model is gated, or give a local folder"
        )
        raise Unusable(f"MODEL {name}: its {what} cannot be loaded ({reason}). {where}.") from error
