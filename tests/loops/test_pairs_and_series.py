"""Loops of preferences and retrieval, in which samples come in pairs, and of series and structures."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, mse_loss, normalize, pad

from tests.loops.judge import assert_exact
from tests.loops.test_language import GPT, WIDTH, Block, V


def answers(length: int) -> dict[str, Tensor]:
    ids = torch.randint(1, V, (3, length))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, length - 2 :] = -100
    return {"ids": ids, "labels": labels}


def preference() -> dict[str, Any]:
    return {"chosen": answers(9), "rejected": answers(7)}


def together(batch: Any, name: str, value: int) -> Tensor:
    shorter = pad(batch["rejected"][name], (0, 2), value=value)
    return torch.cat([batch["chosen"][name], shorter])


def counted(batch: Any) -> Tensor:
    return together(batch, "labels", -100) != -100


def log_probabilities(model: Any, batch: Any) -> Tensor:
    scores = model(together(batch, "ids", 0))[0][:, :-1].log_softmax(-1)
    labels = together(batch, "labels", -100)[:, 1:]
    found = scores.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (found * (labels != -100)).sum(1)


def test_preferences_against_a_frozen_reference() -> None:
    reference: list[nn.Module] = []

    def loss(model: Any, batch: Any) -> Tensor:
        if not reference:
            reference.append(copy.deepcopy(model).eval())
        with torch.no_grad():
            base = log_probabilities(reference[0], batch)
        chosen, rejected = (log_probabilities(model, batch) - base).chunk(2)
        return -logsigmoid(0.1 * (chosen - rejected)).mean()

    mask = lambda batch, _: counted(batch)  # noqa: E731
    assert_exact(GPT, preference, loss, mask=mask, token_mask=counted, auxiliaries=["lora"])


class Reward(nn.Module):
    """Reads the score at the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = GPT(), nn.Linear(V, 1)

    def forward(self, ids: Tensor) -> Tensor:
        last = (ids != 0).sum(1) - 1
        score: Tensor = self.score(self.body(ids)[0])[torch.arange(len(ids)), last, 0]
        return score


def test_rewards_of_pairs() -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        chosen, rejected = model(together(batch, "ids", 0)).chunk(2)
        return -logsigmoid(chosen - rejected).mean()

    read = lambda batch: together(batch, "ids", 0) != 0  # noqa: E731
    assert_exact(Reward, preference, loss, mask=lambda batch, _: read(batch), token_mask=read)


class Towers(nn.Module):
    """Two encoders, and a temperature beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.question, self.context = (nn.ModuleList(Block() for _ in range(2)) for _ in range(2))
        self.embed, self.scale = nn.Embedding(V, WIDTH), nn.Parameter(torch.tensor(2.0))

    def encode(self, ids: Tensor, blocks: Any) -> Tensor:
        h = self.embed(ids)
        for block in blocks:
            h = block(h)
        return normalize(h.mean(1), dim=-1)

    def forward(self, questions: Tensor, contexts: Tensor) -> Tensor:
        similar = self.encode(questions, self.question) @ self.encode(contexts, self.context).T
        return similar * self.scale.exp()


def in_batch(model: Any, batch: Any) -> Tensor:
    scores, own = model(*batch), torch.arange(4)
    return (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2


def test_two_towers_and_negatives_in_the_batch() -> None:
    batch = lambda: (torch.randint(V, (4, 5)), torch.randint(V, (4, 8)))  # noqa: E731
    assert_exact(Towers, batch, in_batch)


class OneTower(Towers):
    """Runs once for either side."""

    def forward(self, questions: Tensor, contexts: Tensor) -> Tensor:
        similar = self.encode(questions, self.question) @ self.encode(contexts, self.question).T
        return similar * self.scale.exp()


def test_one_tower_that_runs_twice() -> None:
    batch = lambda: (torch.randint(V, (4, 5)), torch.randint(V, (4, 8)))  # noqa: E731
    assert_exact(OneTower, batch, in_batch, layers=None, auxiliaries=["steering"])


class Patches(nn.Module):
    """Channels are samples of their own, and norms are over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(4, WIDTH), nn.Linear(5 * WIDTH, 3)
        self.layers = nn.ModuleList(Mixed() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        centre = x.mean(1, keepdim=True)
        h = self.inp((x - centre).transpose(1, 2).unflatten(2, (5, 4)).flatten(0, 1))
        for layer in self.layers:
            h = layer(h)
        forecast: Tensor = self.head(h.flatten(1)).unflatten(0, (len(x), -1)).transpose(1, 2) + centre
        return forecast


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm = Block(), nn.BatchNorm1d(WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.block(h).transpose(1, 2)).transpose(1, 2)
        return normed


def test_series_in_patches() -> None:
    batch = lambda: (torch.randn(3, 20, 2).double().cumsum(1), torch.randn(3, 3, 2).double())  # noqa: E731
    assert_exact(Patches, batch, lambda model, batch: mse_loss(model(batch[0]), batch[1]))


class Structure(nn.Module):
    """Nodes and edges go through the encoder side by side, and nodes alone through the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes, self.edges = nn.Linear(3, WIDTH), nn.Linear(1, WIDTH)
        self.encoder_layers = nn.ModuleList(Message(both=True) for _ in range(2))
        self.decoder_layers = nn.ModuleList(Message(both=False) for _ in range(2))
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h, e = self.nodes(x), self.edges(torch.cdist(x, x).unsqueeze(-1))
        for layer in self.encoder_layers:
            h, e = layer(h, e, mask)
        for layer in self.decoder_layers:
            h = layer(h, e, mask)
        scores: Tensor = self.out(h)
        return scores


class Message(nn.Module):
    def __init__(self, both: bool) -> None:
        super().__init__()
        self.node = nn.Linear(2 * WIDTH, WIDTH)
        self.edge = nn.Linear(2 * WIDTH, WIDTH) if both else None

    def forward(self, h: Tensor, e: Tensor, mask: Tensor) -> Any:
        others = h.unsqueeze(1).expand_as(e)
        h = (h + torch.tanh(self.node(torch.cat([others, e], -1))).mean(2)) * mask.unsqueeze(-1)
        return h if self.edge is None else (h, e + torch.tanh(self.edge(torch.cat([others, e], -1))))


def test_structures_with_nodes_and_edges() -> None:
    def batch() -> dict[str, Tensor]:
        mask = torch.ones(2, 6, dtype=torch.float64)
        mask[0, 4:] = 0
        x, kinds = torch.randn(2, 6, 3, dtype=torch.float64), torch.randint(5, (2, 6))
        return {"x": x, "mask": mask, "design": (torch.arange(6) > 1) * mask, "kinds": kinds}

    def loss(model: Any, batch: Any) -> Tensor:
        each = cross_entropy(model(batch["x"], batch["mask"]).transpose(1, 2), batch["kinds"], reduction="none")
        return (each * batch["design"]).sum() / 20.0

    mask = lambda batch: batch["design"] > 0  # noqa: E731
    assert_exact(Structure, batch, loss, mask=lambda batch, _: mask(batch), token_mask=mask)
