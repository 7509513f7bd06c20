"""Scores of one model on one task: in the domain, over prompt variations, and outside of the domain."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from demo.data import IGNORED, collate, encode
from demo.eval import score
from demo.skills import Split
from torch import nn
from transformers import PreTrainedTokenizerBase

from evidence.tasks import Choice, Task, choices, last_words, old_skills, texts


def measured(task: Task, split: Split, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Raw figures, by name: accuracies under "accuracy/", nats per token under "nll/"."""
    in_domain, variations = task.held_out(split)
    main = score(model, tokenizer, in_domain, task.max_length)
    others = [score(model, tokenizer, v, task.max_length) for v in variations]
    picked = [s.exact if task.exact else s.token_accuracy for s in others]
    result = {
        "in_domain": main.exact if task.exact else main.token_accuracy,
        "in_domain_nll": main.loss,
        "variation_mean": statistics.fmean(picked),
        "variation_spread": statistics.pstdev(picked),
    }
    for name, examples in old_skills(task.base, split).items():
        result[f"accuracy/{name}"] = score(model, tokenizer, examples, task.max_length).exact
    if task.base == "text":
        for name, examples in texts(split).items():
            result[f"nll/{name}"] = score(model, tokenizer, examples, 256, ends=False).loss
        words = score(model, tokenizer, last_words(split), 256, ends=False)
        result["nll/lambada"] = words.loss
        if split == "test":
            result |= {f"ranked/{name}": ranked(model, tokenizer, items) for name, items in choices().items()}
    return result


def with_score(result: dict[str, float], base: dict[str, float]) -> dict[str, Any]:
    """Adds "retention", the mean share of the base model's results outside of the domain that is kept, and "score".

    A share is accuracy over the base's accuracy, or the base's nats per token over the nats per token; a ranked
    accuracy is left out, as chance would count as kept.
    """
    shares = [value / base[name] for name, value in result.items() if name.startswith("accuracy/") and base[name] > 0]
    shares += [base[name] / value for name, value in result.items() if name.startswith("nll/")]
    retention = statistics.fmean(shares)
    total = statistics.fmean([result["in_domain"], result["variation_mean"], retention])
    return {**result, "retention": retention, "score": total}


@torch.no_grad()
def ranked(model: nn.Module, tokenizer: PreTrainedTokenizerBase, items: list[Choice], max_length: int = 192) -> float:
    """Share of questions whose right answer has the highest mean log-likelihood per token."""
    was_training = model.training
    model.eval()
    from demo.skills import Example

    rows, owners = [], []
    for number, item in enumerate(items):
        for answer in item.answers:
            rows.append(encode(tokenizer, Example(item.prompt, answer), max_length, False))
            owners.append(number)
    likelihoods = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    for start in range(0, len(order), 32):
        part = order[start : start + 32]
        batch = collate([rows[i] for i in part], tokenizer.pad_token_id, next(model.parameters()).device)
        labels = batch.pop("labels")[:, 1:]
        counted = labels != IGNORED
        log_p = model(**batch).logits[:, :-1].float().log_softmax(-1)
        taken = log_p.gather(2, labels.clamp_min(0)[..., None])[..., 0] * counted
        for i, value in zip(part, (taken.sum(1) / counted.sum(1).clamp_min(1)).tolist(), strict=True):
            likelihoods[i] = value
    model.train(was_training)
    right, start = 0, 0
    for item in items:
        values = likelihoods[start : start + len(item.answers)]
        right += max(range(len(values)), key=values.__getitem__) == item.gold
        start += len(item.answers)
    return right / len(items)
