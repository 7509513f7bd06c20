"""TRL's SFTTrainer: completion masks, packing, its own figures, and gradients that accumulation does not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, disable_progress_bars
from trl import SFTConfig, SFTTrainer

from lfu_reg import LfURegularizer
from lfu_reg.integrations.trl import LfUSFTTrainer
from tests.support.architectures import llama, peft_llama
from tests.support.cases import seeded
from tests.support.compare import assert_same_gradients, gradients_of, mismatch
from tests.support.loops import (
    FIXED,
    STEERING,
    Remembers,
    assert_of_strength_one,
    descended,
    quiet,
    tiny_llama,
    values,
    word_tokenizer,
)
from tests.support.refusals import says

disable_progress_bars()

EQUAL = Dataset.from_list(
    [{"prompt": f"a b {x}", "completion": f" {x} d e {y}"} for x, y in zip("abcdefgh", "pqrstuvw", strict=True)]
)
UNEQUAL = Dataset.from_list(
    [
        {"prompt": f"a b {x}", "completion": f" {x} d e {y}"[: 4 + 2 * (i % 3)]}
        for i, (x, y) in enumerate(zip("abcd", "pqrs", strict=True))
    ]
)


def sft_trainer(where: Path, model: Any = None, data: Any = EQUAL, lfu: Any = STEERING, **options: Any) -> Any:
    keywords = {name: options.pop(name) for name in ("compute_loss_func", "callbacks") if name in options}
    settings = {"gradient_checkpointing": False, "bf16": False, "max_length": None, **options}
    config = SFTConfig(**quiet(where, **settings))
    model = tiny_llama() if model is None else model
    return LfUSFTTrainer(
        model, config, train_dataset=data, eval_dataset=data, processing_class=word_tokenizer(), lfu=lfu, **keywords
    )


def trained(where: Path, *args: Any, **options: Any) -> dict[str, Any]:
    trainer = sft_trainer(where, *args, **options)
    before = values(trainer.model)
    trainer.train()
    return descended(before, trainer.model)


@pytest.mark.parametrize("make", [tiny_llama, lambda: seeded(lambda: peft_llama(num_hidden_layers=2))])
def test_one_step_is_the_regularizers(make: Any, tmp_path: Path) -> None:
    """The consistency term looks at the completion's tokens only."""
    got = trained(tmp_path, make(), UNEQUAL)
    trainer = sft_trainer(tmp_path, make(), UNEQUAL)
    (batch,) = trainer.get_train_dataloader()
    model = make()
    masked = batch["labels"] == -100
    assert masked[:, :3].all()  # the prompts
    assert not masked[:, 3].any()
    with LfURegularizer(model, **STEERING) as reg:
        reg(model, dict(batch), lambda m, b: m(**b, use_cache=False).loss).backward()
        with_mask = gradients_of(model)
    assert_same_gradients(got, with_mask, 1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_accumulation_changes_nothing(batch_size: int, tmp_path: Path) -> None:
    common = {"data": EQUAL.select(range(6)), "lfu": FIXED, "max_steps": 2, "learning_rate": 0.1}
    want = trained(tmp_path, **common)
    got = trained(
        tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=4 // batch_size, **common
    )
    assert_same_gradients(got, want, 1e-5)
    without = trained(tmp_path, **{**common, "lfu": {**FIXED, "lam": 0.0}})
    assert mismatch(without, want)[0] > 1e-2


@pytest.mark.parametrize("layout", [{"packing": True, "max_length": 32}, {"padding_free": True}])
def test_rows_without_padding(layout: dict[str, Any], tmp_path: Path) -> None:
    """All rows in one, each with positions of its own: the gradients of the padded batch."""
    without = {**FIXED, "lam": 0.0}
    sft, flat_sft = trained(tmp_path, data=UNEQUAL, lfu=without), trained(tmp_path, data=UNEQUAL, lfu=without, **layout)
    if mismatch(flat_sft, sft)[0] > 1e-4:
        pytest.skip("this transformers attends across packed rows")
    want, got = trained(tmp_path, data=UNEQUAL, lfu=FIXED), trained(tmp_path, data=UNEQUAL, lfu=FIXED, **layout)
    assert mismatch(sft, want)[0] > 1e-2
    assert_same_gradients(got, want, 1e-4)


@pytest.mark.parametrize("auxiliary", ["lora", "steering"])
def test_checkpointed_activations(auxiliary: str, tmp_path: Path) -> None:
    lfu = {**STEERING, "auxiliary": auxiliary}
    plain = trained(tmp_path, lfu=lfu)
    checkpointed = sft_trainer(tmp_path, lfu=lfu, gradient_checkpointing=True)
    before = values(checkpointed.model)
    checkpointed.train()
    assert checkpointed.model.is_gradient_checkpointing
    assert_same_gradients(descended(before, checkpointed.model), plain, 1e-9)


def test_figures_of_trl_are_those_without(tmp_path: Path) -> None:
    """Token counts and accuracies are not counted twice, also where the loss function runs again."""
    logs = []
    for lfu in ({"lam": 0.0}, {**STEERING, "ascent_steps": 2}):
        seen = Remembers()
        trainer = sft_trainer(tmp_path, lfu=lfu, callbacks=[seen], learning_rate=0.0, max_steps=2)
        trainer.train()
        trainer.evaluate()
        logs.append(seen.logs)
    shared = ("num_tokens", "mean_token_accuracy", "entropy", "eval_loss", "eval_num_tokens", "eval_entropy")
    for before, after in zip(*logs, strict=True):
        assert {k: v for k, v in before.items() if k in shared} == {k: v for k, v in after.items() if k in shared}
        assert not any("lfu" in key for key in after if any(k.startswith("eval_") for k in after))
    assert logs[1][1]["num_tokens"] > 0
    assert logs[1][0]["lfu/consistency_loss"] > 0


def test_loss_without_logits_has_none_to_compare(tmp_path: Path) -> None:
    sft_module = pytest.importorskip("trl.trainer.sft_trainer")
    if not hasattr(sft_module, "add_fused_lm_head"):
        pytest.skip("this trl computes logits")
    with pytest.raises(ValueError, match=says("logit_kl", "fused LM head", "mse")):
        sft_trainer(tmp_path, lfu={"distance": "logit_kl"})


GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs shared/data")
def test_gsm8k(tmp_path: Path) -> None:
    """32 questions with a tokenizer trained on them: the loss falls, and only answers count."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:32]]
    words = ByteLevelBPETokenizer()
    words.train_from_iterator([r["question"] + r["answer"] for r in rows], vocab_size=400, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, pad_token="<pad>", eos_token="<eos>")
    model = llama(num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=1024)
    data = Dataset.from_list([{"prompt": r["question"] + "\n", "completion": r["answer"]} for r in rows])
    seen = Remembers()
    config = SFTConfig(
        **{
            **quiet(tmp_path, gradient_checkpointing=False, bf16=False, max_length=256),
            "max_steps": 8,
            "optim": "adamw_torch",
            "learning_rate": 0.02,
            "completion_only_loss": True,
        }
    )
    trainer = LfUSFTTrainer(
        model,
        config,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[seen],
        lfu={"auxiliary": "steering", "alpha": 0.02, "lam": 0.1},
    )
    trainer.train()
    losses = [log["lfu/sft_loss"] for log in seen.logs if "loss" in log]
    assert losses[-1] < losses[0] - 0.5
    assert all(log["lfu/empty_steps"] == 0 for log in seen.logs if "loss" in log)
    assert isinstance(trainer, SFTTrainer)
    assert torch.isfinite(next(model.parameters())).all()


def test_how_strong_it_is_is_logged(tmp_path: Path) -> None:
    seen = Remembers()
    sft_trainer(tmp_path, lfu=None, callbacks=[seen], learning_rate=0.01, max_steps=2).train()
    logs = [log for log in seen.logs if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert_of_strength_one(log)
