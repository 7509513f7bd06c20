"""LfU in transformers' Trainer and everything derived from it (TRL): one mixin, on top of `compute_loss`.

    class MyTrainer(LfUTrainerMixin, Trainer): ...

    MyTrainer(model, args, train_dataset=data, lfu={"auxiliary": "steering"}).train()

The regularizer is attached at the first training step, when PEFT, Accelerate and the Trainer have wrapped the model,
and removed when training ends, whatever ends it.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfu_reg.diagnostics import LfUWarning
from lfu_reg.integrations.averages import Averages
from lfu_reg.integrations.settings import checked_settings, try_on
from lfu_reg.model.tables import DEEPEST, NO_TABLES, collect, copied, put
from lfu_reg.regularizer import LfURegularizer
from lfu_reg.step.checks import NO_REPLICAS

STATE_FILE = "lfu_reg.json"

REENTRANT = (
    "gradient_checkpointing_kwargs={'use_reentrant': True}: reentrant checkpointing hides its inside from "
    "autograd.grad, so LfU cannot take gradients through it. Use {'use_reentrant': False}, or leave it out."
)


class LfUTrainerMixin:
    """Regularizes the training steps of a Trainer; evaluation and prediction are left alone.

    Put it before the Trainer class. `num_items_in_batch`, label smoothing, `compute_loss_func`, packing and masks are
    the Trainer's business as before: its own `compute_loss` is the SFT loss. Every batch of an accumulated step counts
    with the same weight in the consistency term, however the Trainer scales the SFT loss.

    Args:
        lfu: settings of `LfURegularizer` (auxiliary, layers, alpha, lam, ...), None for its defaults. The step number
            that schedules get counts batches, not optimizer steps.

    Attributes:
        lfu: the regularizer while it is attached, else None.

    Logs `lfu/sft_loss`, `lfu/consistency_loss` and `lfu/ascent_grad_norm`, averaged since the last logging over this
    process's batches, and the last `lfu/gradient_ratio`, `lfu/gradient_cosine`, `lfu/relative_distance`,
    `lfu/empty_steps`, `lfu/alpha` and `lfu/lam`. Checkpoints hold the regularizer's state in `lfu_reg.json`.

    Raises:
        TypeError, ValueError: on construction, for settings out of range, several GPUs in one process, and reentrant
            activation checkpointing.
    """

    lfu: LfURegularizer | None = None

    def __init__(self, *args: Any, lfu: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._lfu_settings = checked_settings(lfu, "lfu")
        self._lfu_averages = Averages()
        self._lfu_saved: dict[str, int] | None = None
        self._lfu_batches: int | None = None
        super().__init__(*args, **kwargs)
        this: Any = self
        if this.args.n_gpu > 1:
            raise ValueError(f"The Trainer sees {this.args.n_gpu} GPUs. {NO_REPLICAS}")
        _without_reentrant_checkpoints(this.args)
        try_on(this.model, self._lfu_settings)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The Trainer's loss, regularized in training mode."""
        trainer: Any = super()
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if not (model.training and torch.is_grad_enabled()):
            return trainer.compute_loss(model, inputs, **options)
        batches = self._lfu_divisor(num_items_in_batch)
        outputs: list[Any] = []

        def sft_loss(model: Any, inputs: Any) -> Tensor:
            if outputs:
                with self._lfu_uncounted():
                    result = trainer.compute_loss(model, inputs, **options)
            else:
                result = trainer.compute_loss(model, inputs, **options)
                outputs.append(result[1] if return_outputs else None)
            loss: Tensor = result[0] if return_outputs else result
            return loss * batches if batches > 1 else loss

        regularizer = self._lfu_attached()
        loss = regularizer(model, inputs, sft_loss)
        self._lfu_averages.add(regularizer.metrics)
        loss = loss / batches if batches > 1 else loss
        return (loss, outputs[0]) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of one optimizer step, which are counted: the last step of an epoch may have fewer."""
        trainer: Any = super()
        samples, items = trainer.get_batch_samples(*args, **kwargs)
        self._lfu_batches = len(samples)
        return samples, items

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the regularizer's figures where the training loss is logged."""
        if "loss" in logs:
            logs.update(self._lfu_averages.take())
        trainer: Any = super()
        trainer.log(logs, *args, **kwargs)

    def _lfu_divisor(self, num_items_in_batch: Tensor | int | None) -> int:
        """By how much the SFT loss is divided already, which l_cons is not.

        The Trainer divides what `compute_loss` returns by the number of accumulated batches, unless the loss is a sum
        over the items of all of them. Its rule is repeated here, as it is decided after `compute_loss`.
        """
        this: Any = self
        scaled = getattr(this, "loss_is_scaled_for_ga", None)  # since transformers 5.19
        if scaled is None:
            by_model = this.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or this.compute_loss_func is not None
        return (self._lfu_batches or this.args.gradient_accumulation_steps) if scaled else 1

    @contextmanager
    def _lfu_uncounted(self) -> Iterator[None]:
        """A repeated call logs nothing, and what it counts and collects in attributes of the Trainer is put back."""
        attributes: dict[str, Any] = vars(self)
        this: Any = self
        found = {id(attributes): (attributes, this)}
        for name, value in attributes.items():
            if not name.startswith(("lfu", "_lfu")):  # the regularizer keeps its own notes of the call
                collect(value, this, found, DEEPEST)
        before = [(table, copied(table)) for table, _ in found.values() if not isinstance(table, NO_TABLES)]
        metrics = copy.deepcopy(attributes.get("_metrics"))  # TRL's, however long its lists are
        attributes["log"] = lambda *args, **kwargs: None
        try:
            yield
        finally:
            for table, was in before:
                put(table, was)
            if metrics is not None:
                attributes["_metrics"] = metrics

    # ------------------------------------------------------------------ attaching and removing

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = super()
        self._lfu_removed()  # where compute_loss was called outside of a run: steps count from its start
        try:
            return trainer._inner_training_loop(*args, **kwargs)
        finally:
            self._lfu_removed()

    def _lfu_attached(self) -> LfURegularizer:
        if self.lfu is None:
            this: Any = self
            self.lfu = LfURegularizer(this.model, **self._lfu_settings)
            if self._lfu_saved is not None:
                self.lfu.load_state_dict(self._lfu_saved)
        return self.lfu

    def _lfu_removed(self) -> None:
        if self.lfu is not None:
            self.lfu.remove()
        self.lfu = self._lfu_saved = self._lfu_batches = None
        self._lfu_averages = Averages()

    # ------------------------------------------------------------------ checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        trainer: Any = super()
        trainer._save_optimizer_and_scheduler(output_dir)
        this: Any = self
        if self.lfu is not None and this.args.should_save:
            Path(output_dir, STATE_FILE).write_text(json.dumps(self.lfu.state_dict()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        trainer: Any = super()
        trainer._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint, STATE_FILE)
        if file.is_file():
            self._lfu_saved = json.loads(file.read_text())
            return
        warnings.warn(
            f"The checkpoint {checkpoint} holds no state of the regularizer ({STATE_FILE}): it was saved without LfU. "
            "Steps are counted from 0, so schedules of alpha and lam start anew.",
            LfUWarning,
            stacklevel=2,
        )


def _without_reentrant_checkpoints(args: Any) -> None:
    """Refuse them where they are asked for, and choose the other kind where nothing is."""
    if not args.gradient_checkpointing:
        return
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise ValueError(REENTRANT)
    if not hasattr(args, "activation_checkpointing_kwargs"):  # where it is missing, the default is reentrant
        args.gradient_checkpointing_kwargs = {**(args.gradient_checkpointing_kwargs or {}), "use_reentrant": False}
