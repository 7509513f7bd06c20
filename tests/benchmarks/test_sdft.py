"""SDFT's transform of the data: greedy rewrites by the model itself, and which of them are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from demo.load import EMBEDDED_MODEL, load_model
from demo.skills import Example
from methods.sdft import TEMPLATE, self_distilled
from torch import Tensor, nn

EXAMPLES = [Example("add 12 34: ", "46"), Example("sort 312=", "123"), Example("flip abc: ", "cba")]


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return load_model(str(EMBEDDED_MODEL), torch.device("cpu"), torch.float32)


def greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """The continuation, token by token, each from a whole forward."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + count and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


def test_responses_are_the_models_own(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    model.train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    distilled, share = self_distilled(model, tokenizer, EXAMPLES, max_new_tokens=6)
    assert model.training
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    model.eval()
    want = [greedy(model, tokenizer, TEMPLATE.format(prompt=p, response=r), 6) for p, r in EXAMPLES]
    assert any(want)
    assert any(text and text != e.response for text, e in zip(want, EXAMPLES, strict=True))
    assert distilled == [Example(e.prompt, text or e.response) for text, e in zip(want, EXAMPLES, strict=True)]
    assert share == sum(map(bool, want)) / 3
    self_distilled(model, tokenizer, EXAMPLES[:1], max_new_tokens=1)
    assert not model.training


class Scripted(nn.Module):
    """Says what it is told to, one text a call, and keeps the prompts."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokenizer, self.texts = tokenizer, iter(texts)
        self.prompts: list[str] = []

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        assert not self.training
        assert options == {"max_new_tokens": 9, "do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}
        self.prompts.append(self.tokenizer.decode(input_ids[0]))
        said = self.tokenizer(next(self.texts), add_special_tokens=False)["input_ids"]
        end = [self.tokenizer.eos_token_id]
        return torch.cat([input_ids, torch.tensor([said + end], dtype=input_ids.dtype)], 1)


def last_word(text: str) -> str:
    return text.split()[-1] if text.split() else ""


def test_rewrites_with_another_answer_are_dropped(base: tuple[Any, Any]) -> None:
    _, tokenizer = base
    model = Scripted(tokenizer, [" it is 46 ", "it is 321", ""])
    distilled, share = self_distilled(model, tokenizer, EXAMPLES, last_word, max_new_tokens=9)
    assert distilled == [Example(EXAMPLES[0].prompt, "it is 46"), EXAMPLES[1], EXAMPLES[2]]
    assert share == 1 / 3
    prompt = model.prompts[1]
    assert prompt.index("sort 312=") < prompt.index("### Reference Answer:\n123") < prompt.index("### Response:")


def test_empty_rewrites_are_dropped_always(base: tuple[Any, Any]) -> None:
    _, tokenizer = base
    empty = [Example("a", ""), Example("b", "c")]
    distilled, share = self_distilled(Scripted(tokenizer, [" ", " "]), tokenizer, empty, last_word, max_new_tokens=9)
    assert (distilled, share) == (empty, 0.0)
    distilled, share = self_distilled(Scripted(tokenizer, ["", "x"]), tokenizer, EXAMPLES[:2], max_new_tokens=9)
    assert (distilled, share) == ([EXAMPLES[0], Example(EXAMPLES[1].prompt, "x")], 0.5)
    assert self_distilled(Scripted(tokenizer, []), tokenizer, []) == ([], 0.0)
