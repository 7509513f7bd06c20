"""Loops of recurrent models and of graphs: no linear map, a hidden state carried on, sparse inputs, a train mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, ctc_loss, mse_loss
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.loops.judge import assert_exact

NO_LINEARS = "The chosen layers"


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.decoder = nn.Embedding(9, 6), nn.LSTM(6, 6, 2, dropout=0.1), nn.Linear(6, 9)

    def forward(self, ids: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, hidden = self.rnn(self.embed(ids), hidden)
        return self.decoder(h), hidden


def test_a_hidden_state_that_is_carried_on() -> None:
    carried = [(torch.zeros(2, 3, 6).double(),) * 2]

    def batch() -> tuple[Any, ...]:
        ids = torch.randint(9, (8, 3))
        return ids[:-1], ids[1:].flatten(), carried[-1]

    def loss(model: Any, batch: Any) -> Tensor:
        scores, hidden = model(batch[0], batch[2])
        if batch[2] is carried[-1]:  # of the first pass
            carried.append(tuple(state.detach() for state in hidden))
        return cross_entropy(scores.flatten(0, 1), batch[1])

    assert_exact(LSTM, batch, loss, told=["LSTM has no repeated blocks", NO_LINEARS])


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.linear = nn.LSTMCell(1, 5), nn.LSTMCell(5, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = two = (x.new_zeros(len(x), 5),) * 2
        found = []
        for now in x.split(1, 1):
            one = self.first(now, one)
            two = self.second(one[0], two)
            found.append(self.linear(two[0]))
        return torch.cat(found, 1)


def test_cells_in_a_loop_over_time() -> None:
    batch = lambda: torch.randn(3, 6, dtype=torch.float64).cumsum(1)  # noqa: E731
    loss = lambda model, x: mse_loss(model(x[:, :-1]), x[:, 1:])  # noqa: E731
    assert_exact(Cells, batch, loss, told=["Cells has no repeated blocks", NO_LINEARS])


class Convolution(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(i, o) / i**0.5)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return torch.sparse.mm(adjacency, torch.mm(x, self.weight))


class GCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gc1, self.gc2, self.drop = Convolution(7, 6), Convolution(6, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        scores: Tensor = self.gc2(self.drop(torch.relu(self.gc1(x, adjacency))), adjacency)
        return scores


def graph(sparse_features: bool = True, nodes: int = 12) -> tuple[Any, ...]:
    edges = (torch.rand(nodes, nodes) < 0.3).double() + torch.eye(nodes).double()
    x = torch.randn(nodes, 7, dtype=torch.float64)
    inputs = x.to_sparse() if sparse_features else x, edges.to_sparse()
    return inputs, torch.randint(3, (nodes,)), torch.arange(5)


def train_mask(batch: Any) -> Tensor:
    return torch.zeros(len(batch[1])).index_fill(0, batch[2], 1).bool()


def graph_loss(model: Any, batch: Any) -> Tensor:
    inputs, labels, chosen = batch
    return cross_entropy(model(*inputs)[chosen], labels[chosen])


def test_a_whole_graph_with_a_train_mask() -> None:
    told = ["GCN has no repeated blocks", NO_LINEARS]
    mask = lambda batch, _: train_mask(batch)  # noqa: E731
    assert_exact(GCN, graph, graph_loss, mask=mask, token_mask=train_mask, told=told)


class Isomorphism(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        moved: Tensor = self.net(x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))
        return moved


class GIN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs, self.head = nn.ModuleList(Isomorphism(width) for width in (7, 6, 6)), nn.Linear(6, 3)

    def forward(self, graphs: Any) -> Tensor:
        h = graphs.x
        for conv in self.convs:
            h = torch.relu(conv(h, graphs.edges))
        scores: Tensor = self.head(h.new_zeros(3, 6).index_add(0, graphs.number, h))
        return scores


class Graphs:
    """A batch of them, as an object."""

    def __init__(self) -> None:
        self.x, self.edges = torch.randn(12, 7, dtype=torch.float64), torch.randint(12, (2, 30))
        self.number, self.y = torch.arange(3).repeat_interleave(4), torch.randint(3, (3,))


def test_many_graphs_in_an_object() -> None:
    assert_exact(GIN, Graphs, lambda model, batch: cross_entropy(model(batch), batch.y))


class Packed(nn.Module):
    """Time first; sums both directions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(width, 6, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h, _ = pad_packed_sequence(self.rnn(pack_padded_sequence(x, lengths))[0])
        return h.unflatten(-1, (2, 6)).sum(-2)


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnns, self.fc = nn.ModuleList(Packed(width) for width in (4, 6)), nn.Linear(6, 7)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        for rnn in self.rnns:
            x = rnn(x, lengths)
        return self.fc(x).log_softmax(-1)


def test_speech_with_packed_sequences_and_ctc() -> None:
    lengths, targets = torch.tensor([10, 8, 7]), torch.tensor([3, 2, 2])
    heard = torch.arange(10)[:, None] < lengths

    def loss(model: Any, batch: Any) -> Tensor:
        return ctc_loss(model(batch[0], batch[2]), batch[1], batch[2], batch[3])

    batch = lambda: (torch.randn(10, 3, 4).double(), torch.randint(1, 7, (3, 3)), lengths, targets)  # noqa: E731
    mask = lambda batch, _: heard  # noqa: E731
    assert_exact(Speech, batch, loss, mask=mask, token_mask=heard, told=[NO_LINEARS])
