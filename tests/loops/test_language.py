"""Loops of language models: what a batch looks like, which targets the loss ignores, where it keeps its loss."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.loops.judge import assert_exact

V, WIDTH = 17, 8
IGNORED = "All positions count in the consistency term although the loss ignores"


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.attn(self.norm(h)).chunk(3, -1)
        h = h + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return h + self.down(nn.functional.gelu(self.up(h)))


class GPT(nn.Module):
    """Returns logits and loss, and keeps the loss, as small GPTs do."""

    def __init__(self, blocks: Any = nn.ModuleList, ignored: int = -1) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, WIDTH), nn.Linear(WIDTH, V, bias=False)
        self.blocks, self.drop = blocks(Block() for _ in range(3)), nn.Dropout(0.1)
        self.head.weight, self.ignored, self.last_loss = self.embed.weight, ignored, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_loss": None}  # a copy has none: it has a graph

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        h = self.drop(self.embed(ids))
        for block in self.blocks.values() if isinstance(self.blocks, nn.ModuleDict) else self.blocks:
            h = block(h)
        logits = self.head(h)
        if targets is not None:
            self.last_loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=self.ignored)
        return logits, self.last_loss


def numbered(blocks: Any) -> nn.ModuleDict:
    return nn.ModuleDict({str(number): block for number, block in enumerate(blocks)})


def pair(ignored: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, V, (4, 9))
    targets = ids.roll(-1, 1)
    targets[:, :4] = ignored
    return ids, targets


def own_loss(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model(*batch)[1]
    return loss


def test_prompts_marked_by_minus_one() -> None:
    assert_exact(GPT, lambda: pair(-1), own_loss, mask=lambda batch, _: batch[1] != -1)


def test_a_list_and_accumulation() -> None:
    make = functools.partial(GPT, ignored=-100)
    mask = lambda batch, _: batch[1] != -100  # noqa: E731
    assert_exact(make, lambda: list(pair(-100)), own_loss, mask=mask, finish=lambda loss: loss / 4)


def test_a_label_of_their_own_that_is_ignored() -> None:
    make = functools.partial(GPT, ignored=0)
    assert_exact(make, lambda: pair(0), own_loss, mask=lambda batch, _: batch[1] != 0, ignore_index=0)
    assert_exact(make, lambda: pair(0), own_loss, told=[IGNORED])


def test_a_loss_that_the_model_keeps() -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        model(*batch)
        kept: Tensor = model.last_loss
        return kept

    assert_exact(GPT, lambda: pair(-1), loss, mask=lambda batch, _: batch[1] != -1)


def test_blocks_in_a_dictionary_of_numbers() -> None:
    def batch() -> dict[str, Tensor]:
        ids, labels = pair(-100)
        return {"input": ids, "labels": labels}

    def loss(model: Any, batch: Any) -> Tensor:
        total = cross_entropy(model(batch["input"])[0].flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        return total / (batch["labels"] != -100).sum()

    names = [f"blocks.{number}" for number in range(3)]
    make = functools.partial(GPT, numbered)
    assert_exact(make, batch, loss, mask=lambda batch, _: batch["labels"] != -100, layers=names)


class Translator(nn.Module):
    """Time first, padded by zeros; masks are made by the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, WIDTH), nn.Linear(WIDTH, V)
        self.transformer = nn.Transformer(WIDTH, 2, 2, 2, 16, 0.1)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(len(target), dtype=torch.float64)
        unattended = {"src_key_padding_mask": (source == 0).T, "memory_key_padding_mask": (source == 0).T}
        mixed = self.transformer(self.embed(source), self.embed(target), tgt_mask=causal, **unattended)
        logits: Tensor = self.head(mixed)
        return logits


def sentences() -> tuple[Tensor, Tensor]:
    source, target = torch.randint(1, V, (7, 3)), torch.randint(1, V, (9, 3))
    source[5:, 0], target[6:, :2] = 0, 0
    return source, target


def translation_loss(model: Any, source: Tensor, target: Tensor) -> Tensor:
    logits = model(source, target[:-1])
    return cross_entropy(logits.flatten(0, 1), target[1:].flatten(), ignore_index=0)


def test_two_stacks_with_masks_of_their_own() -> None:
    def batch() -> dict[str, Tensor]:
        source, target = sentences()
        return {"source": source, "target": target, "labels": target[1:], "attention_mask": source != 0}

    def mask(batch: Any, layer: str) -> Tensor:
        counted: Tensor = batch["labels"] != 0 if "decoder" in layer else batch["attention_mask"]
        return counted

    loss = lambda model, batch: translation_loss(model, batch["source"], batch["target"])  # noqa: E731
    assert_exact(Translator, batch, loss, mask=mask, ignore_index=0)


def test_targets_that_the_loss_shifts_are_told_of() -> None:
    loss = lambda model, batch: translation_loss(model, *batch)  # noqa: E731
    assert_exact(Translator, sentences, loss, told=[IGNORED], auxiliaries=["lora"])


class MaskedLM(GPT):
    """A token's loss, and a sentence's."""

    def __init__(self) -> None:
        super().__init__()
        self.next = nn.Linear(WIDTH, 2)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h)
        return self.next(h[:, 0]), self.head(h)


def test_a_loss_of_masked_tokens_and_of_sentences() -> None:
    def batch() -> dict[str, Tensor]:
        ids = torch.randint(1, V, (4, 9))
        labels = ids * (torch.rand(4, 9) < 0.4)
        labels[:, 3] = ids[:, 3]
        return {"bert_input": ids, "bert_label": labels, "is_next": torch.randint(2, (4,))}

    def loss(model: Any, batch: Any) -> Tensor:
        is_next, tokens = model(batch["bert_input"])
        masked = cross_entropy(tokens.transpose(1, 2), batch["bert_label"], ignore_index=0)
        return masked + cross_entropy(is_next, batch["is_next"])

    counted = lambda batch: batch["bert_label"] != 0  # noqa: E731
    assert_exact(MaskedLM, batch, loss, mask=lambda batch, _: counted(batch), token_mask=counted)
