"""transformers' Trainer: the right gradients however steps are accumulated, evaluation untouched, exact resuming."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from lfu_reg import LfURegularizer, LfUWarning
from lfu_reg.integrations.hf import LfUTrainer
from lfu_reg.integrations.trainer import LfUTrainerMixin
from lfu_reg.step.attached_model import is_attached
from tests.support.architectures import peft_llama
from tests.support.cases import seeded
from tests.support.compare import assert_same_gradients, gradients_of, mismatch
from tests.support.loops import (
    FIXED,
    STEERING,
    Fails,
    arguments,
    assert_of_strength_one,
    descended,
    tiny_llama,
    token_rows,
    values,
)
from tests.support.refusals import says
from tests.support.snapshots import Snapshot, differing

ROWS = token_rows()


def trained(
    where: Path, model: Any = None, data: Any = ROWS, lfu: Any = STEERING, setup: Any = None, **options: Any
) -> tuple[dict[str, Any], LfUTrainer]:
    """The gradients of one training run, as SGD steps of length one show them, and the trainer."""
    model = tiny_llama() if model is None else model
    keywords = {name: options.pop(name) for name in ("compute_loss_func", "data_collator") if name in options}
    trainer = LfUTrainer(model, arguments(where, **options), train_dataset=data, lfu=lfu, **keywords)
    if setup is not None:
        setup(trainer)
    before = values(model)
    trainer.train()
    return descended(before, model), trainer


def as_batch(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def summed_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("make", [tiny_llama, lambda: seeded(lambda: peft_llama(num_hidden_layers=2))])
def test_one_step_is_the_regularizers(make: Any, tmp_path: Path) -> None:
    four = ROWS[:4]
    got, trainer = trained(tmp_path, make(), four)
    model = make()
    with LfURegularizer(model, **STEERING) as reg:
        reg(model, as_batch(four), lambda m, b: m(**b).loss).backward()
    assert_same_gradients(got, gradients_of(model), 1e-6)  # the Trainer shuffles, the loss is in float32
    assert trainer.state.log_history[0]["lfu/consistency_loss"] == pytest.approx(
        float(reg.metrics["consistency_loss"]), rel=1e-6
    )


def _refuses_loss_kwargs(trainer: Any) -> None:
    trainer.model_accepts_loss_kwargs = False


ACCUMULATION = {
    "accepts": ({}, None),
    "refuses": ({}, _refuses_loss_kwargs),
    "loss function": ({"compute_loss_func": summed_loss}, _refuses_loss_kwargs),
    "label smoothing": ({"label_smoothing_factor": 0.1}, None),
}


@pytest.mark.parametrize(
    ("kind", "rows"), [*((kind, 4) for kind in ACCUMULATION), ("accepts", 2), ("loss function", 2)]
)
def test_accumulation_changes_nothing(kind: str, rows: int, tmp_path: Path) -> None:
    """The consistency term's gradient; that of two rows where four would make a step, at the end of an epoch, too."""
    options, setup = ACCUMULATION[kind]

    def consistency(batch_size: int) -> dict[str, Any]:
        steps = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        common = {"data": ROWS[:rows], "setup": setup, **steps, **options}
        (both, _), (sft, _) = (trained(tmp_path, lfu={**FIXED, "lam": lam}, **common) for lam in (FIXED["lam"], 0.0))
        return {name: both[name] - sft[name] for name in both}

    want = consistency(4)
    for batch_size in (1, 2):
        assert_same_gradients(consistency(batch_size), want, 1e-5)


def test_gradient_direction_is_each_batchs_own(tmp_path: Path) -> None:
    """With the ascent gradient, too, where all rows are the same, so that every batch has the same direction."""
    same = [ROWS[0]] * 4
    want, _ = trained(tmp_path, data=same)
    got, _ = trained(tmp_path, data=same, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same_gradients(got, want, 1e-5)


def test_flattened_batches(tmp_path: Path) -> None:
    """Rows of several lengths in one row without padding: position_ids start anew."""
    flat = {"data_collator": tf.DataCollatorWithFlattening()}
    got, _ = trained(tmp_path, data=ROWS[:4], lfu=FIXED, **flat)
    want, _ = trained(tmp_path, data=ROWS[:4], lfu=FIXED)
    plain = [trained(tmp_path, data=ROWS[:4], lfu={"lam": 0.0}, **how)[0] for how in ({}, flat)]
    if mismatch(*plain)[0] > 1e-4:
        pytest.skip("this transformers attends across flattened rows")
    # The collator ignores the first label of every row, which is a prompt's here: the masks are the same.
    assert_same_gradients(got, want, 1e-5)


def test_checkpointed_activations(tmp_path: Path) -> None:
    plain, _ = trained(tmp_path)
    checkpointed, _ = trained(tmp_path, gradient_checkpointing=True)
    assert_same_gradients(checkpointed, plain, 1e-12)


def test_bfloat16(tmp_path: Path) -> None:
    model = tiny_llama().float()
    got, trainer = trained(tmp_path, copy.deepcopy(model), ROWS[:4], bf16=True)
    with LfURegularizer(model, **STEERING) as reg:

        def loss(model: Any, batch: Any) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(**batch).loss

        reg(model, as_batch(ROWS[:4]), loss).backward()
    assert_same_gradients(got, gradients_of(model), 1e-3)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_outputs_are_returned_with_the_regularized_loss(tmp_path: Path) -> None:
    trainer = LfUTrainer(tiny_llama(), arguments(tmp_path), train_dataset=ROWS, lfu=FIXED)
    model, batch = trainer.model.train(), as_batch(ROWS[:4])
    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert torch.equal(outputs.logits, model(**batch).logits)
    want = outputs.loss + FIXED["lam"] * trainer.lfu.metrics["consistency_loss"]
    assert float(loss.detach()) == pytest.approx(float(want), rel=1e-6)
    assert float(loss.detach()) > float(outputs.loss) * 1.01


# ------------------------------------------------------------------ evaluation and logging


def test_evaluation_is_untouched(tmp_path: Path) -> None:
    """During training and after, bit for bit; and no figures of the regularizer in its logs."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "logging_steps": 2}
    model = tiny_llama()
    trainer = LfUTrainer(model, arguments(tmp_path, **options), train_dataset=ROWS, eval_dataset=ROWS, lfu=STEERING)
    twins: list[float] = []

    class Twin(tf.TrainerCallback):
        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            if not trainer.is_in_train:
                return
            assert trainer.lfu is not None
            twin = tf.Trainer(tiny_llama(), arguments(tmp_path), eval_dataset=ROWS)
            twin.model.load_state_dict(model.state_dict())
            twins.append(twin.evaluate()["eval_loss"])

    trainer.add_callback(Twin())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["eval_loss"] for log in logs] == twins
    assert len(twins) == 2
    assert not any("lfu" in key for log in logs for key in log)
    assert ["lfu/sft_loss" in log for log in trainer.state.log_history if "loss" in log] == [True]

    plain = tf.Trainer(model, arguments(tmp_path), eval_dataset=ROWS)
    assert plain.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"] == twins[-1]
    assert (plain.predict(ROWS).predictions == trainer.predict(ROWS).predictions).all()
    assert trainer.lfu is None


def test_logged_figures_are_averages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    step = LfURegularizer.__call__

    def spied(self: LfURegularizer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        seen.append({name: float(value) for name, value in self.metrics.items() if value is not None})
        return loss

    monkeypatch.setattr(LfURegularizer, "__call__", spied)
    lfu = {**STEERING, "every": 2, "lam": lambda step: 0.1 * (step + 1)}
    _, trainer = trained(
        tmp_path,
        lfu=lfu,
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
    )
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log, steps in zip(logs, (seen[:4], seen[4:]), strict=True):
        for name in ("sft_loss", "consistency_loss"):
            figures = [step[name] for step in steps if name == "sft_loss" or "ascent_grad_norm" in step]
            assert log[f"lfu/{name}"] == pytest.approx(sum(figures) / len(figures), rel=1e-6)
        assert log["lfu/lam"] == steps[-1]["lam"]


LOGGED: list[dict[str, float]] = []


class _Own(tf.Trainer):
    """Logs, counts and collects in its own `compute_loss`, as subclasses do."""

    calls = 0
    figures: Any = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.calls += 1
        self.figures["own"].append(1)
        self.log({"own": 1.0})
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        LOGGED.append(logs)
        super().log(logs, *args, **kwargs)


class Collecting(LfUTrainerMixin, _Own):
    pass


def test_what_a_subclass_logs_and_collects_counts_once(tmp_path: Path) -> None:
    trainer = Collecting(tiny_llama(), arguments(tmp_path, max_steps=2), train_dataset=ROWS, lfu=STEERING)
    trainer.figures = defaultdict(list)
    LOGGED.clear()
    trainer.train()
    assert [trainer.calls, len(trainer.figures["own"])] == [2, 2]
    assert sum("own" in entry for entry in LOGGED) == 2


def test_how_strong_it_is_is_logged(tmp_path: Path) -> None:
    """By default a gradient as long as that of the SFT loss, over micro-batches."""
    _, trainer = trained(
        tmp_path,
        lfu=None,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
    )
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3
    for log in logs:
        assert_of_strength_one(log)


# ------------------------------------------------------------------ resuming


def _noisy() -> Any:
    return tiny_llama(attention_dropout=0.2)


@pytest.mark.parametrize("weight", [{"alpha": 0.05, "lam": lambda step: 0.5 / (1 + step)}, {}], ids=["lam", "strength"])
def test_resuming_is_exact(weight: dict[str, Any], tmp_path: Path) -> None:
    lfu = {"auxiliary": "lora", **weight}
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = LfUTrainer(_noisy(), arguments(tmp_path, **options), train_dataset=ROWS, lfu=lfu)
    whole.train()
    again = LfUTrainer(_noisy(), arguments(tmp_path, **options), train_dataset=ROWS, lfu=lfu)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not differing(values(again.model), values(whole.model))
    figures = [
        {k: v for k, v in log.items() if k.startswith("lfu") and "relative" not in k}
        for trainer in (whole, again)
        for log in trainer.state.log_history
        if log["step"] == 4 and "loss" in log
    ]
    assert figures[0] == figures[1] != {}

    (tmp_path / "checkpoint-2" / "lfu_reg.json").unlink()
    other = LfUTrainer(_noisy(), arguments(tmp_path, **options), train_dataset=ROWS, lfu=lfu)
    with pytest.warns(LfUWarning, match=says("lfu_reg.json", "counted from 0")):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert differing(values(other.model), values(whole.model))


def test_every_run_starts_anew(tmp_path: Path) -> None:
    """After another run, and after a call of compute_loss by hand; LoRA's A is drawn from the step number."""
    lfu = {"auxiliary": "lora", "alpha": 0.1, "lam": 50.0, "seed": 3}
    first, trainer = trained(tmp_path, lfu=lfu)
    for by_hand in (False, True):
        trainer.model.load_state_dict(tiny_llama().state_dict())
        if by_hand:
            trainer.compute_loss(trainer.model.train(), as_batch(ROWS[:4]))
        before = values(trainer.model)
        trainer.train()
        assert_same_gradients(descended(before, trainer.model), first, 1e-12)


def test_run_repeated_with_smaller_batches_starts_anew(tmp_path: Path) -> None:
    model, lams = tiny_llama(), []
    forward = model.forward

    def short_of_memory(input_ids: torch.Tensor, **inputs: Any) -> Any:
        if len(lams) == 2 and len(input_ids) == 4:
            raise RuntimeError("CUDA out of memory.")
        return forward(input_ids=input_ids, **inputs)

    model.forward = short_of_memory
    lfu = {**STEERING, "lam": lambda step: lams.append(step) or 0.1}
    args = arguments(tmp_path, auto_find_batch_size=True, max_steps=3, learning_rate=0.01)
    LfUTrainer(model, args, train_dataset=ROWS, lfu=lfu).train()
    assert lams == [0, 1, 0, 1, 2]
    assert not is_attached(model)


# ------------------------------------------------------------------ no trace, and refusals


def test_nothing_is_left(tmp_path: Path) -> None:
    model = tiny_llama()
    before = Snapshot.of(model)
    plain = tf.Trainer(copy.deepcopy(model), arguments(tmp_path, learning_rate=0.0), train_dataset=ROWS)
    plain.train()
    _, trainer = trained(tmp_path, model, learning_rate=0.0)
    assert trainer.lfu is None
    after_plain = Snapshot.of(plain.model)
    for field in ("hooks", "tensor_hooks", "flags", "training", "attributes"):
        assert getattr(Snapshot.of(model), field) == getattr(after_plain, field), field
    assert Snapshot.of(model).hooks == before.hooks


def test_nothing_is_left_after_an_exception(tmp_path: Path) -> None:
    model = tiny_llama()
    trainer = LfUTrainer(model, arguments(tmp_path), train_dataset=ROWS, lfu=STEERING, callbacks=[Fails()])
    before = Snapshot.of(model).hooks
    with pytest.raises(KeyError, match="own error"):
        trainer.train()
    assert trainer.lfu is None
    assert Snapshot.of(model).hooks == before
    LfURegularizer(model).remove()


@pytest.mark.parametrize(
    ("lfu", "parts"),
    [
        ({"lamda": 1}, ("'lamda'", "LfURegularizer takes", "lam,")),
        ({"lam": -1}, ("lam=-1",)),
        ({"layers": [9]}, ("2 blocks",)),
        ("steering", ("lfu is a str", "mapping")),
    ],
)
def test_settings_are_checked_at_once(lfu: Any, parts: tuple[str, ...], tmp_path: Path) -> None:
    model = tiny_llama()
    before = Snapshot.of(model)
    with pytest.raises((TypeError, ValueError), match=says(*parts)):
        LfUTrainer(model, arguments(tmp_path), train_dataset=ROWS, lfu=lfu)
    before.check(model)


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=says("sees 2 GPUs", "torchrun", "CUDA_VISIBLE_DEVICES")):
        LfUTrainer(tiny_llama(), args, train_dataset=ROWS)


def test_reentrant_checkpoints_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match=says("use_reentrant", "False")):
        LfUTrainer(tiny_llama(), args, train_dataset=ROWS)
