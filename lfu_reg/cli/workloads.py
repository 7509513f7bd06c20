"""What is measured: a model, a batch and the loss function of an ordinary training loop."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lfu_reg.cli.configs import build, depth_of, load_config
from lfu_reg.cli.errors import Unusable

Batch = Mapping[str, Tensor]
LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Setting:
    """What the user asked for.

    Attributes:
        model: preset, local folder, hub name, or "file.py:function" that returns (model, batch, sft_loss_fn).
        tuning: "lora" (PEFT, rank 8, all linear maps) or "full".
        dtype: of the weights, by torch's name.
        batch: samples in a batch.
        tokens: tokens in a sample.
        checkpointing: activation checkpointing, the non-reentrant one.
        compile: torch.compile of the whole model.
        device: torch's name.
        layers: truncate the model to so many layers; None keeps all.
        vocab: replace the vocabulary's size; None keeps it.
        seed: of weights and tokens.
    """

    model: str = "tiny"
    tuning: str = "lora"
    dtype: str = "float32"
    batch: int = 4
    tokens: int = 128
    checkpointing: bool = False
    compile: bool = False
    device: str = "cpu"
    layers: int | None = None
    vocab: int | None = None
    seed: int = 0

    @property
    def is_own(self) -> bool:
        """Whether the model is made by a function of the user's."""
        return ":" in self.model and not Path(self.model).exists()


@dataclass(frozen=True)
class Workload:
    """A model to be trained.

    Attributes:
        model: in training mode on its device.
        batch: one batch.
        sft_loss: callable of (model, batch).
        full_depth: layers of the model before it was truncated; None if it was not.
    """

    model: nn.Module
    batch: Any
    sft_loss: LossFunction
    full_depth: int | None = None


def make_workload(setting: Setting) -> Workload:
    """Build what `setting` describes.

    Raises:
        Unusable: for a model that cannot be found, built or trained.
    """
    torch.manual_seed(setting.seed)
    if setting.is_own:
        return _own_workload(setting)
    config = load_config(setting.model)
    depth = depth_of(config)
    model = build(config, setting.dtype, setting.device, layers=setting.layers, vocab=setting.vocab)
    if setting.tuning == "lora":
        model = with_adapter(model, setting.device)
    if setting.checkpointing:
        model.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    batch = make_batch(model, setting)
    truncated = setting.layers is not None and depth is not None and setting.layers < depth
    return Workload(model.train(), batch, language_model_loss, depth if truncated else None)


def with_adapter(model: nn.Module, device: str, rank: int = 8) -> nn.Module:
    """PEFT's LoRA on all linear maps of the blocks, as in the paper: rank 8, scaled by 16 / rank."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise Unusable("--tuning lora needs peft: pip install 'lfu_reg[cli]', or use --tuning full.") from error
    adapter = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear")
    with torch.device(device):
        adapted: nn.Module = get_peft_model(model, adapter)
    return adapted


def make_batch(model: nn.Module, setting: Setting) -> dict[str, Tensor]:
    """Random tokens, all of which are labels."""
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and setting.tokens > positions:
        raise Unusable(f"--tokens {setting.tokens}: {setting.model} has {positions} positions; give at most that.")
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (setting.batch, setting.tokens), device=setting.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def language_model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that transformers computes from labels."""
    loss: Tensor = model(**batch).loss
    return loss


def _own_workload(setting: Setting) -> Workload:
    where, _, name = setting.model.rpartition(":")
    made = getattr(_module(where, setting.model), name, None)
    if not callable(made):
        raise Unusable(f"MODEL {setting.model}: {where} has no function {name!r}.")
    parts = made()
    if not (isinstance(parts, tuple) and len(parts) == 3 and isinstance(parts[0], nn.Module) and callable(parts[2])):
        raise Unusable(f"MODEL {setting.model}: the function has to return (model, batch, sft_loss_fn).")
    model, batch, sft_loss = parts
    return Workload(model.to(setting.device).train(), on_device(batch, setting.device), sft_loss)


def _module(where: str, given: str) -> ModuleType:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except (ImportError, OSError, SyntaxError) as error:
        raise Unusable(
            f"MODEL {given}: {where} cannot be imported ({error}). Give file.py:function or package.module:function."
        ) from error
    return module


def on_device(value: Any, device: str) -> Any:
    """`value` with the tensors of a mapping, list or tuple moved."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: on_device(entry, device) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        moved = [on_device(entry, device) for entry in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a mapping, list or tuple, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(entry)


def samples_in(batch: Any) -> int:
    """The length of the first tensor that has one."""
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.dim()), 1)
