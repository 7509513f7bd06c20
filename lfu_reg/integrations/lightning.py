"""LfU in Lightning: a callback, and `training_step` stays as it is.

    L.Trainer(callbacks=[LfUCallback(auxiliary="steering")]).fit(module, loader)

With automatic optimization the callback regularizes what `training_step` returns. With manual optimization it is
called in place of the loss: `self.manual_backward(self.lfu(self, batch, sft_loss))`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from lfu_reg.diagnostics import LfUWarning
from lfu_reg.integrations.settings import checked_settings
from lfu_reg.model.patching import patched
from lfu_reg.regularizer import LfURegularizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("lfu_reg.integrations.lightning needs lightning 2: pip install 'lfu_reg[lightning]'") from error

NOT_CALLED = (
    "LfU had no effect on this batch: with manual optimization the training step itself has to call it. Keep the "
    "callback as self.lfu, return [self.lfu] from configure_callbacks(), and write loss = self.lfu(self, batch, "
    "sft_loss_fn) before self.manual_backward(loss)."
)


NO_STATE = (
    "The checkpoint {} holds no state of LfUCallback: it was saved without LfU. Steps are counted from 0, so schedules "
    "of alpha and lam start anew."
)


class _Skipped(Exception):
    """`training_step` returned None: Lightning leaves this batch out."""


class LfUCallback(Callback):
    """Regularizes the training steps of a LightningModule.

    It is attached while `fit` runs. Validation, test and prediction are left alone. Its step count is in Lightning's
    checkpoints. Metrics are logged as `lfu/...` wherever the logger's interval says so, without averaging.

    Args:
        module: name of the submodule to attach to, for example "model"; "" is the LightningModule itself. Needed for
            distance="logit_kl", which compares the outputs of that module.
        settings: settings of `LfURegularizer` (auxiliary, layers, alpha, lam, ...). The step number that schedules get
            counts batches.

    Attributes:
        regularizer: attached while `fit` runs, else None.

    Raises:
        TypeError: for settings that LfURegularizer does not have.
    """

    def __init__(self, module: str = "", **settings: Any) -> None:
        super().__init__()
        self.regularizer: LfURegularizer | None = None
        self._module = module
        self._settings = checked_settings(settings, "LfUCallback")
        self._saved: Mapping[str, Any] | None = None  # what a fit starts from, and what the last one came to
        self._ended: Mapping[str, Any] | None = None
        self._undo: Callable[[], None] | None = None
        self._pl_module: LightningModule | None = None
        self._called = False

    def __call__(self, model: nn.Module, batch: Any, sft_loss_fn: Callable[[Any, Any], Tensor], **call: Any) -> Tensor:
        """The regularized loss, for manual optimization; arguments as those of `LfURegularizer`.

        Outside of `fit` it is the plain loss.

        Raises:
            RuntimeError: with automatic optimization, where the callback regularizes the whole training step.
        """
        if self.regularizer is None:
            return sft_loss_fn(model, batch)
        if self._undo is not None:
            raise RuntimeError(
                "With automatic optimization LfUCallback regularizes what training_step returns: return the plain loss "
                "there, and do not call the callback as well."
            )
        self._called = True
        with self._logged_once(self.regularizer):
            loss = self.regularizer(model, batch, sft_loss_fn, **call)
        self._log()
        return loss

    # ------------------------------------------------------------------ Lightning's hooks

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach."""
        self._remove()
        try:
            attached = pl_module.get_submodule(self._module)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(
                f"LfUCallback(module={self._module!r}): {type(pl_module).__name__} has no such submodule. It has "
                f"{names}."
            ) from None
        self.regularizer = LfURegularizer(attached, **self._settings)
        self._pl_module = pl_module
        if trainer.global_step and self._saved is None:  # the fit before goes on
            self._saved = self._ended
        if self._saved is not None:
            self.regularizer.load_state_dict(self._saved)
        if pl_module.automatic_optimization:
            self._wrap(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if a run goes on from a checkpoint that knows nothing of the regularizer."""
        if trainer.ckpt_path is not None and self._saved is None:
            warnings.warn(NO_STATE.format(trainer.ckpt_path), LfUWarning, stacklevel=2)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say so if manual optimization forgot to call."""
        if self._undo is None and not self._called:
            warnings.warn(NOT_CALLED, LfUWarning, stacklevel=2)
        self._called = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove."""
        self._remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """The regularizer's step count and seed."""
        saved = (self._saved or self._ended) if self.regularizer is None else self.regularizer.state_dict()
        return dict(saved or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._saved = dict(state_dict) or None
        if self.regularizer is not None and self._saved is not None:
            self.regularizer.load_state_dict(self._saved)

    # ------------------------------------------------------------------ automatic optimization

    def _wrap(self, trainer: Trainer) -> None:
        # Around the strategy's training_step, which holds precision contexts and the DDP wrapper; nothing is hung on
        # the user's module.
        strategy: Any = trainer.strategy
        plain_step = strategy.training_step

        def regularized_step(batch: Any, *rest: Any, **named: Any) -> Any:
            return self._step(strategy.model, batch, lambda batch: plain_step(batch, *rest, **named))

        strategy.training_step = regularized_step
        self._undo = lambda: vars(strategy).pop("training_step", None)

    def _step(self, model: nn.Module, batch: Any, plain_step: Callable[[Any], Any]) -> Any:
        """`training_step`, with l_SFT + lam * l_cons in place of the loss that it returned."""
        if self.regularizer is None:
            raise RuntimeError("LfUCallback was removed from this fit.")
        returned: list[Any] = []

        def sft_loss(_: Any, batch: Any) -> Tensor:
            output = plain_step(batch)
            if output is None:
                raise _Skipped
            returned.append(output)
            loss: Tensor = output["loss"] if isinstance(output, Mapping) else output
            return loss

        try:
            with self._logged_once(self.regularizer):
                loss = self.regularizer(model, batch, sft_loss)
        except _Skipped:
            return None
        self._log()
        return {**returned[0], "loss": loss} if isinstance(returned[0], Mapping) else loss

    def _logged_once(self, regularizer: LfURegularizer) -> AbstractContextManager[None]:
        """What the loss logs when it runs again is dropped."""
        module: Any = self._pl_module

        def once(log: Callable[..., None]) -> Callable[..., None]:
            return lambda *args, **kwargs: None if regularizer.is_second_pass else log(*args, **kwargs)

        return patched([(vars(module), name, once(getattr(module, name))) for name in ("log", "log_dict")])

    def _log(self) -> None:
        if self.regularizer is None or self._pl_module is None:
            return
        metrics = self.regularizer.metrics
        shown = {name: value for name, value in metrics.items() if name != "loss" and not name.startswith("distance/")}
        self._pl_module.log_dict({f"lfu/{name}": value for name, value in shown.items() if value is not None})

    def _remove(self) -> None:
        if self._undo is not None:
            self._undo()
        if self.regularizer is not None:
            self._saved, self._ended = None, self.regularizer.state_dict()
            self.regularizer.remove()
        self.regularizer = self._undo = self._pl_module = None
        self._called = False
