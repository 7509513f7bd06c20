"""Loads a causal language model and its tokenizer, from a folder or by its hub name."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

EMBEDDED_MODEL = Path(__file__).parent / "model"


class ModelError(ValueError):
    """The model cannot be used; the message says why and what to do."""


def load_model(name: str, device: torch.device, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads model and tokenizer.

    Args:
        name: A folder written by `save_pretrained`, or the name of a model on the hub.
        device: Where the weights go.
        dtype: What the weights are converted to.

    Raises:
        ModelError: There is no such model, it cannot be downloaded, or it is not a causal language model.
    """
    _check_folder(name)
    transformers_logging.disable_progress_bar()  # one for reading a file is too much; downloads have their own
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name)
    except Exception as error:  # whatever the hub client, the file formats or the model's own code raise
        raise ModelError(_why_not(name, error)) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"--model {name}: its tokenizer has no end token; set tokenizer.eos_token and save it again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.use_cache = False  # training needs no key/value cache
    return model.to(device=device, dtype=dtype), tokenizer


def _check_folder(name: str) -> None:
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"--model {name}: the folder has no config.json; give one written by model.save_pretrained(folder) "
            "and tokenizer.save_pretrained(folder)"
        )
    if not folder.exists() and (folder.is_absolute() or name.startswith(("./", "../")) or name.count("/") > 1):
        raise ModelError(f"--model {name}: no such folder; give an existing one or the name of a hub model")


def _why_not(name: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if Path(name).is_dir():
        cure = "check that the folder holds a causal language model and its tokenizer, both from save_pretrained"
    else:
        cure = (
            "it is no folder here, so it was looked up on the Hugging Face hub: check the spelling "
            "(owner/name) and the network, log in if the model is gated, or give a local folder"
        )
    return f"--model {name}: cannot be loaded ({reason}); {cure}"
