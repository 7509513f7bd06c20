"""SDFT (Yang et al., 2024, arXiv 2402.13669): the model to be tuned rewrites the responses first.

A transform of the data and no loss, for models that follow instructions: a base model only continues the text. A
rewritten response is kept where its final answer is that of the original, otherwise the original stays.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from demo.skills import Example
from torch import nn
from transformers import PreTrainedTokenizerBase

TEMPLATE = (
    "Below are an instruction and a reference answer. Using the reference answer as a guide, write your own response "
    "to the instruction.\n\n### Instruction:\n{prompt}\n\n### Reference Answer:\n{response}\n\n### Response:\n"
)


@torch.no_grad()
def self_distilled(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    final_answer: Callable[[str], str] | None = None,
    max_new_tokens: int = 256,
) -> tuple[list[Example], float]:
    """The examples with the model's own responses.

    Args:
        model: the model before fine-tuning.
        tokenizer: its tokenizer.
        examples: what is to be trained on.
        final_answer: takes the answer out of a response; a rewrite with another one is dropped. None: only empty
            rewrites are dropped.
        max_new_tokens: longest rewrite.

    Returns:
        As many examples, and the share of them that are rewritten.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    distilled, rewritten = [], 0
    for example in examples:
        prompt = TEMPLATE.format(prompt=example.prompt, response=example.response)
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
        produced = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        text = tokenizer.decode(produced[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        same = final_answer is None or final_answer(text) == final_answer(example.response)
        rewritten += bool(text) and same
        distilled.append(Example(example.prompt, text) if text and same else example)
    model.train(was_training)
    return distilled, rewritten / max(len(examples), 1)
