"""A model of 135 M parameters: what a step costs, and a study of forgetting with its weights, where they were carried.

The study is the cell of docs/evidence-data.md with an effect: 64 examples of GSM8K, one learning rate for all methods.
"""

from __future__ import annotations

import statistics
import warnings
from typing import Any
from unittest import mock

import torch
from step.others import OTHERS

from gpu.place import Place, Skipped
from lfu_reg import LfURegularizer
from lfu_reg.cli.methods import DEFAULT
from lfu_reg.cli.overhead import measure
from lfu_reg.cli.plan import Plan
from lfu_reg.cli.published import PROCEDURES
from lfu_reg.cli.workloads import Setting, make_workload

SEEDS, LEARNING_RATE = 3, 5e-4


def cost(place: Place) -> dict[str, Any]:
    """`lfu-reg overhead` with LoRA and full tuning; random weights cost the same."""
    batch, tokens = place.sized((8, 512), (2, 8))
    found = {}
    for tuning in ("lora", "full"):
        name = place.sized("smollm2-135m", "tiny")
        setting = Setting(name, tuning, "bfloat16", batch=batch, tokens=tokens, device=place.device.name)
        with mock.patch.dict(PROCEDURES, OTHERS):
            found[tuning] = measure(setting, Plan(DEFAULT, rounds=place.sized(20, 2)), make_workload(setting), None)
        place.device.clear()
    return found


def sft(place: Place) -> dict[str, Any]:
    return cell(place, None)


def steering(place: Place) -> dict[str, Any]:
    return cell(place, "steering")


def lora(place: Place) -> dict[str, Any]:
    return cell(place, "lora")


def cell(place: Place, auxiliary: str | None) -> dict[str, Any]:
    """Token accuracy in the domain, and nats per token on other texts before and after, of every seed."""
    if place.model is None:
        raise Skipped("no folder was given with --model")
    from demo.load import load_model
    from demo.train import Recipe, make_optimizer, sft_loss, trainable_copy, training_batches
    from evidence.corpus import NoData
    from evidence.tasks import TASKS

    task, device = TASKS["gsm8k-64"], torch.device(place.device.name)
    base, tokenizer = load_model(str(place.model), device, torch.float32)
    rows = []
    try:
        before = scores(base, tokenizer)
        for seed in range(place.sized(SEEDS, 1)):
            recipe = Recipe(place.sized(task.steps, 2), task.batch_size, LEARNING_RATE, "lora", task.max_length)
            model = trainable_copy(base, recipe.tuning, seed)
            batches = training_batches(task.train(seed), tokenizer, recipe, seed, device)
            optimizer = make_optimizer(model, recipe.lr)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=recipe.steps)
            reg = None if auxiliary is None else LfURegularizer(model, auxiliary, seed=seed)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for batch in batches:
                    (sft_loss(model, batch) if reg is None else reg(model, batch, sft_loss)).backward()
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
            if reg is not None:
                reg.remove()
            rows.append({"seed": seed, **scores(model, tokenizer), "warnings": [str(w.message) for w in caught]})
    except NoData as error:
        raise Skipped(str(error)) from error
    kept = [statistics.fmean(before[n] / row[n] for n in before if n != "in_domain") for row in rows]
    return {"before": before, "rows": rows, "retention": kept, "learning_rate": LEARNING_RATE}


def scores(model: torch.nn.Module, tokenizer: Any) -> dict[str, float]:
    """Token accuracy on held-out questions, nats per token elsewhere."""
    from demo.eval import score
    from evidence.tasks import TASKS, last_words, texts

    questions, _ = TASKS["gsm8k-64"].held_out("test")
    found = {"in_domain": score(model, tokenizer, questions, 160, batch_size=16).token_accuracy}
    elsewhere = {**texts("test"), "lambada": last_words("test")}
    for name, examples in elsewhere.items():
        found[name] = score(model, tokenizer, examples, 256, batch_size=16, ends=False).loss
    return found
