"""Lightning: the callback regularizes what training_step returns, and nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning")

import lightning.pytorch as L
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lfu_reg import LfURegularizer, LfUWarning
from lfu_reg.integrations.lightning import LfUCallback
from lfu_reg.step.attached_model import is_attached
from tests.support.cases import plain_loss, seeded, token_batch
from tests.support.compare import assert_same_gradients, gradients_of, mismatch
from tests.support.loops import FIXED, STEERING, assert_of_strength_one, descended, values
from tests.support.plain_models import TinyLM
from tests.support.refusals import says
from tests.support.snapshots import Snapshot, differing

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*num_workers.*"),
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]

BATCHES = [token_batch(seed) for seed in range(4)]


class Module(L.LightningModule):
    """The user's module; it knows nothing of LfU."""

    def __init__(self, dropout: float = 0.0, returns: str = "tensor", lr: float = 1.0) -> None:
        super().__init__()
        self.model = seeded(lambda: TinyLM(dropout=dropout))
        self.returns, self.lr = returns, lr
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = plain_loss(self.model, batch)
        self.log("own", loss.detach())
        self.losses.append(float(loss.detach()))
        if self.returns == "none":
            return None
        return loss if self.returns == "tensor" else {"loss": loss, "extra": batch_idx}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not self.model.training
        self.log("val_loss", plain_loss(self.model, batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class ManualModule(Module):
    """Calls the callback in its training step."""

    def __init__(self, lfu: LfUCallback, *, calls: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lfu, self.calls = lfu, calls

    def configure_callbacks(self) -> list[L.Callback]:
        return [self.lfu]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = self.lfu(self, batch, self.sft_loss) if self.calls else self.sft_loss(self, batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def sft_loss(self, module: Any, batch: Any) -> Tensor:
        return plain_loss(self.model, batch)


def fit(
    where: Path,
    module: L.LightningModule,
    *callbacks: L.Callback,
    data: Any = BATCHES[:1],
    ckpt: Any = None,
    **options: Any,
) -> L.Trainer:
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "log_every_n_steps": 1, **options}
    trainer = L.Trainer(
        default_root_dir=where,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=ckpt)
    return trainer


def by_hand(module: L.LightningModule, batches: Any, lfu: Mapping[str, Any]) -> dict[str, Any]:
    with LfURegularizer(module, **lfu) as reg:
        for batch in batches:
            (reg(module, dict(batch), lambda m, b: plain_loss(m.model, b)) / len(batches)).backward()
    return gradients_of(module)


@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_one_step_is_the_regularizers(returns: str, tmp_path: Path) -> None:
    module = Module(returns=returns)
    before = values(module)
    trainer = fit(tmp_path, module, LfUCallback(**STEERING))
    assert_same_gradients(descended(before, module), by_hand(Module(), BATCHES[:1], STEERING), 1e-9)
    assert trainer.callback_metrics["lfu/consistency_loss"] > 0


def test_how_strong_it_is_is_logged(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Module(lr=0.01), LfUCallback())
    assert_of_strength_one(trainer.callback_metrics)


@pytest.mark.parametrize("lfu", [STEERING, {**FIXED, "module": "model"}])
def test_accumulation(lfu: dict[str, Any], tmp_path: Path) -> None:
    module = Module()
    before = values(module)
    fit(tmp_path, module, LfUCallback(**lfu), data=BATCHES, accumulate_grad_batches=4)
    settings = {name: value for name, value in lfu.items() if name != "module"}
    want = by_hand(Module(), BATCHES, settings)
    assert_same_gradients(descended(before, module), want, 1e-9)
    assert mismatch(by_hand(Module(), BATCHES, {**settings, "lam": 0.0}), want)[0] > 1e-6


def test_manual_optimization(tmp_path: Path) -> None:
    module = ManualModule(LfUCallback(**STEERING))
    before = values(module)
    trainer = fit(tmp_path, module)
    assert_same_gradients(descended(before, module), by_hand(Module(), BATCHES[:1], STEERING), 1e-9)
    assert trainer.callback_metrics["lfu/consistency_loss"] > 0
    assert not is_attached(module)
    plain = module.lfu(module, BATCHES[0], module.sft_loss)  # outside of fit
    assert torch.equal(plain, module.sft_loss(module, BATCHES[0]))


class Logging(ManualModule):
    """Logs in its loss function."""

    def sft_loss(self, module: Any, batch: Any) -> Tensor:
        loss = super().sft_loss(module, batch)
        self.log("own", loss.detach(), on_step=False, on_epoch=True, batch_size=1)
        self.log_dict({"too": loss.detach()}, on_step=False, on_epoch=True, batch_size=1)
        return loss


def test_manual_optimization_logs_the_loss_and_not_the_perturbed_one(tmp_path: Path) -> None:
    module = Logging(LfUCallback(auxiliary="steering", alpha=0.05, lam=0.1, ascent_steps=2))
    module.lr = 0.0
    logged = fit(tmp_path, module, data=BATCHES).callback_metrics
    plain = sum(float(plain_loss(Module().model, batch).detach()) for batch in BATCHES) / len(BATCHES)
    assert float(logged["own"]) == float(logged["too"]) == pytest.approx(plain, rel=1e-6)
    assert "log" not in vars(module)


def test_every_fit_starts_anew(tmp_path: Path) -> None:
    """With the same callback, as in cross-validation; what the same Trainer goes on with goes on."""
    steps: list[int] = []
    callback = LfUCallback(auxiliary="steering", alpha=0.05, lam=lambda step: steps.append(step) or 0.1)
    for _ in range(2):
        trainer = fit(tmp_path, Module(lr=0.01), callback, data=BATCHES[:2])
    assert steps == [0, 1, 0, 1]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, DataLoader(BATCHES[:2], batch_size=None))
    assert steps == [0, 1, 0, 1, 2, 3]
    assert callback.state_dict()["step"] == 4
    callback.load_state_dict({"step": 7, "seed": 1})
    fit(tmp_path, Module(lr=0.01), callback)
    assert steps[-1] == 7


def test_manual_optimization_that_does_not_call_is_told(tmp_path: Path) -> None:
    with pytest.warns(LfUWarning, match=says("manual optimization", "configure_callbacks", "self.lfu(")):
        fit(tmp_path, ManualModule(LfUCallback(**STEERING), calls=False))


def test_calling_it_twice_is_refused(tmp_path: Path) -> None:
    module = ManualModule(LfUCallback(**STEERING))
    module.automatic_optimization = True
    with pytest.raises(RuntimeError, match=says("automatic optimization", "plain loss")):
        fit(tmp_path, module)
    assert not is_attached(module)


def test_bfloat16(tmp_path: Path) -> None:
    module = Module().float()
    before = values(module)
    fit(tmp_path, module, LfUCallback(**STEERING), precision="bf16-mixed")
    reference = Module().float()
    with LfURegularizer(reference, **STEERING) as reg, torch.autocast("cpu", torch.bfloat16):
        loss = reg(reference, dict(BATCHES[0]), lambda m, b: plain_loss(m.model, b))
    loss.backward()
    assert_same_gradients(descended(before, module), gradients_of(reference), 1e-5)


def test_validation_and_own_logs_are_untouched(tmp_path: Path) -> None:
    logs = {}
    for name, callbacks in {"plain": [], "lfu": [LfUCallback(**STEERING, ascent_steps=2)]}.items():
        module = Module(lr=0.0)
        trainer = L.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_epochs=1,
            logger=CSVLogger(tmp_path, name=name),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            callbacks=callbacks,
        )
        loader = DataLoader(BATCHES, batch_size=None)
        trainer.fit(module, loader, loader)
        logs[name] = {k: v for k, v in trainer.logged_metrics.items() if k in ("own", "val_loss")}
        assert ("lfu/sft_loss" in trainer.logged_metrics) == (name == "lfu")
        assert not any("lfu" in k and "val" in k for k in trainer.logged_metrics)
    assert logs["plain"] == logs["lfu"] != {}


@pytest.mark.parametrize("module", ["", "model"])
def test_what_the_module_collects_counts_once(module: str, tmp_path: Path) -> None:
    """Also where the regularizer sits on a part of it."""
    ours = Module()
    fit(tmp_path, ours, LfUCallback(module, **FIXED), data=BATCHES[:2])
    assert len(ours.losses) == 2


def test_skipped_batches(tmp_path: Path) -> None:
    module = Module(returns="none")
    before = values(module)
    fit(tmp_path, module, LfUCallback(**STEERING))
    assert not differing(before, values(module))
    assert len(module.losses) == 1


def test_resuming_is_exact(tmp_path: Path) -> None:
    lfu = {"auxiliary": "lora", "alpha": 0.05, "lam": lambda step: 0.5 / (1 + step)}

    def run(epochs: int, ckpt: Any = None, callbacks: Any = None) -> tuple[Module, L.Trainer]:
        module = Module(dropout=0.0, lr=0.05)
        callbacks = [LfUCallback(**lfu)] if callbacks is None else callbacks
        return module, fit(tmp_path, module, *callbacks, data=BATCHES, max_epochs=epochs, ckpt=ckpt)

    whole, _ = run(2)
    _, half = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(2, tmp_path / "half.ckpt")
    assert not differing(values(resumed), values(whole))

    _, plain = run(1, callbacks=[])
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(LfUWarning, match=says("plain.ckpt", "counted from 0")):
        run(2, tmp_path / "plain.ckpt")


def test_nothing_is_left(tmp_path: Path) -> None:
    module = Module(lr=0.0)
    before = Snapshot.of(module)
    trainer = fit(tmp_path, module, LfUCallback(**STEERING))
    after = Snapshot.of(module)
    assert after.hooks == before.hooks
    assert after.flags == before.flags
    assert "training_step" not in vars(module)
    assert "training_step" not in vars(trainer.strategy)


def test_nothing_is_left_after_an_exception(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise KeyError("a callback's own error")

    module, lfu = Module(), LfUCallback(**STEERING)
    with pytest.raises(KeyError, match="own error"):
        fit(tmp_path, module, lfu, Fails())
    assert lfu.regularizer is None
    assert not is_attached(module)


def test_settings_are_checked_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=says("'lamda'", "lam,")):
        LfUCallback(lamda=1)
    with pytest.raises(ValueError, match=says("no such submodule", "model")):
        fit(tmp_path, Module(), LfUCallback(module="network"))


def test_logits_of_a_submodule(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Module(), LfUCallback("model", distance="logit_kl", auxiliary="steering", alpha=0.01))
    assert trainer.callback_metrics["lfu/consistency_loss"] > 0
