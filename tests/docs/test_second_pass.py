"""What the pages say about the second call of the loss function: gotchas on it, on hooks, closures, offloading."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from lfu_reg import LfURegularizer, LfUWarning
from lfu_reg.model.checkpoints import can_tell_who_saves
from tests.support.cases import plain_loss, token_batch
from tests.support.models import LLAMA
from tests.support.plain_models import TinyLM

DOCS = Path(__file__).resolve().parents[2] / "docs"


def text_of(page: str) -> str:
    return " ".join((DOCS / page).read_text().split())


def make() -> TinyLM:
    torch.manual_seed(0)
    return TinyLM().train()


def loss_of_logits(logits: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def test_it_runs_twice_and_knows_it() -> None:
    model, calls = make(), []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        calls.append(reg.is_second_pass)
        return plain_loss(model, batch)

    with LfURegularizer(model, "steering", alpha=0.1) as reg:
        reg(model, token_batch(), loss_fn)
    assert calls == [False, True]


def test_a_loss_that_never_repeats() -> None:
    """Plain SFT, one warning whose text is the page's, and tries that become rarer: after 1, 3, 7, ... steps."""
    model, number, calls = make(), iter(range(10**6)), []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        calls[-1] += 1
        return plain_loss(model, token_batch(next(number)))

    with warnings.catch_warnings(record=True) as caught, LfURegularizer(model, "steering") as reg:
        warnings.simplefilter("always")
        for _ in range(200):
            calls.append(0)
            loss = reg(model, token_batch(), loss_fn)
        assert reg.metrics["unrepeatable_steps"] == sum(n == 2 for n in calls)
        assert "ascent_grad_norm" not in reg.metrics
        assert torch.equal(loss.detach(), reg.metrics["sft_loss"])
    tried = [step for step, n in enumerate(calls) if n == 2]
    assert [later - step - 1 for step, later in pairwise(tried)] == [1, 3, 7, 15, 31, 63, 64]
    (warning,) = [w for w in caught if w.category is LfUWarning]
    shown = text_of("gotchas/loss-function-runs-twice.md").split("LfUWarning: ")[1].split(" ... ")[0]
    assert str(warning.message).startswith(shown)


def test_the_longest_wait_is_that_of_the_pages() -> None:
    from lfu_reg.step.progress import LONGEST_WAIT

    assert f"at most {LONGEST_WAIT} steps" in text_of("gotchas/loss-function-runs-twice.md")
    assert f"63, and {LONGEST_WAIT} from there on" in text_of("how-it-works.md")


def test_a_generator_of_a_module_and_an_iterator_for_a_batch_repeat() -> None:
    model = make()
    model.noise = torch.Generator().manual_seed(0)

    def loss_fn(model: Any, batches: Iterator[Any]) -> Tensor:
        batch = next(batches)
        logits = model(batch["input_ids"])
        return loss_of_logits(logits, batch) * torch.rand((), generator=model.noise)

    mask = token_batch(1)["labels"] != -100  # labels in an iterator are not found
    with warnings.catch_warnings(), LfURegularizer(model, "steering", token_mask=mask) as reg:
        warnings.simplefilter("error", LfUWarning)
        batches = iter([token_batch(1), token_batch(2)])
        reg(model, batches, loss_fn)
        after = model.noise.get_state()
        assert len(list(batches)) == 1
    plain = torch.Generator().manual_seed(0)
    torch.rand((), generator=plain)
    assert torch.equal(after, plain.get_state())


@pytest.mark.parametrize(("leave_early", "runs"), [("auto", 2), (False, 2), (True, 1)])
def test_code_behind_the_last_layer(leave_early: Any, runs: int) -> None:
    """It runs twice where it does something, the second time without a graph, unless that is cut off."""
    model, graphs = make(), []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        logits = model(batch["input_ids"])
        graphs.append(logits.requires_grad)
        return loss_of_logits(logits, batch)

    with LfURegularizer(model, "steering", alpha=0.1, leave_early=leave_early) as reg:
        reg(model, token_batch(), loss_fn)
    assert graphs == [True, False][:runs]


@pytest.mark.parametrize("does_more", [False, True])
def test_a_loss_that_the_model_returns(does_more: bool) -> None:
    """Pass 2 leaves transformers' code after the last layer, and a function that only returns; no other one."""
    model, norms, noted = LLAMA.make(), [], {}

    def returns(model: Any, batch: Any) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    def notes(model: Any, batch: Any) -> Tensor:
        loss: Tensor = model(**batch).loss
        noted["loss"] = loss
        return loss

    model.model.norm.register_forward_pre_hook(lambda *call: norms.append(1))
    with LfURegularizer(model, "steering", alpha=0.1) as reg:
        reg(model, LLAMA.batch(), notes if does_more else returns)
    assert len(norms) == (2 if does_more else 1)


def test_what_a_module_counts_is_put_back() -> None:
    """A counter, a list and a buffer are as one plain call leaves them; the second call starts where the first did."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
            self.number, self.seen, self.table = 0, [], {}
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            starts.append((self.number, len(self.seen), dict(self.table), float(self.mean)))
            self.number += 1
            self.seen.append(len(x))
            self.table["last"] = self.number
            self.mean += 1
            for block in self.blocks:
                x = block(x)
            return x

    starts: list[Any] = []
    model = Counts().train()
    with LfURegularizer(model, "lora", alpha=0.1) as reg:
        for _ in range(2):
            reg(model, torch.randn(2, 4), lambda model, x: model(x).square().mean())
        assert reg.metrics["unrepeatable_steps"] == 0
    assert starts[0] == starts[1] != starts[2] == starts[3]
    assert (model.number, model.seen, model.table, float(model.mean)) == (2, [2, 2], {"last": 2}, 2.0)


def test_part_of_a_batch_cannot_be_told_from_other_data() -> None:
    model, number = make(), iter(range(10))

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return plain_loss(model, token_batch(next(number), shape=(len(batch["input_ids"]), 7)))

    with (
        LfURegularizer(model, "steering", batch_fraction=0.5) as reg,
        pytest.raises(ValueError, match="batch_fraction"),
    ):
        reg(model, token_batch(shape=(4, 7)), loss_fn)


@pytest.mark.parametrize("asks", [False, True])
def test_hooks_that_count(asks: bool) -> None:
    model, seen = make(), []

    def count(*call: Any) -> None:
        if not (asks and reg.is_second_pass):
            seen.append(1)

    with LfURegularizer(model, "steering", alpha=0.1) as reg:
        model.get_submodule(reg.layers[-1]).register_forward_hook(count)
        reg(model, token_batch(), plain_loss)
    assert len(seen) == (1 if asks else 2)


@pytest.mark.parametrize("auxiliary", ["steering", "lora", "random"])
def test_closures(auxiliary: str) -> None:
    """Every evaluation in one `optimizer.step` is the same step; so is one with the same batch and weights."""
    model, batch, losses = make(), token_batch(), []
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = reg(model, batch, plain_loss)
        loss.backward()
        losses.append(loss.detach())
        return loss

    with LfURegularizer(model, auxiliary, alpha=0.01, seed=1) as reg:
        optimizer.step(closure)
        assert reg.state_dict()["step"] == 1 < len(losses)
        first, again = reg(model, batch, plain_loss), reg(model, batch, plain_loss)
        assert torch.equal(first.detach(), again.detach())


def test_two_regularizers_in_one_loss() -> None:
    """The inner one adds its term to what the outer one takes for the SFT loss, and is quiet in its second pass."""
    first, second, inner = make(), make(), []

    def loss_of_second(second: Any, batch: Any) -> Tensor:
        inner.append(reg_b.is_second_pass)
        return second.head(second.blocks[2](second.blocks[1](second.blocks[0](batch["h"])))).square().mean()

    def loss_fn(first: Any, batch: Any) -> Tensor:
        logits = first(batch["input_ids"])
        return reg_b(second, {"h": logits[..., :8]}, loss_of_second)

    settings: dict[str, Any] = {"alpha": 0.1, "lam": 1.0}
    with (
        LfURegularizer(first, "steering", **settings) as reg_a,
        LfURegularizer(second, "steering", **settings) as reg_b,
    ):
        reg_a(first, token_batch(), loss_fn).backward()
        assert inner == [False, True, True]
        assert float(reg_b.metrics["consistency_loss"]) > 0
        torch.testing.assert_close(reg_a.metrics["sft_loss"], reg_b.metrics["loss"])
    assert all(block.up.weight.grad is not None for block in [*first.blocks, *second.blocks])


@pytest.mark.filterwarnings("ignore:All positions count")
@pytest.mark.parametrize("auxiliary", ["steering", "lora"])
def test_a_penalty_in_the_loss(auxiliary: str) -> None:
    """Whose gradient of a gradient the ascent direction has: it equals a difference quotient along itself."""
    model, batch = make().double(), token_batch()
    every_token = torch.ones_like(batch["input_ids"])
    calls: list[bool] = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        calls.append(reg.is_second_pass)
        loss = plain_loss(model, batch)
        (gradient,) = torch.autograd.grad(loss, [model.embed.weight], create_graph=True)
        return loss + gradient.square().sum()

    values = []
    for alpha in (0.0, 1e-5):
        with LfURegularizer(model, auxiliary, alpha=alpha, seed=1, token_mask=every_token) as reg:
            reg(model, batch, loss_fn)
            norm = float(reg.metrics["ascent_grad_norm"])
            with moved(model, reg.perturbation):
                values.append(float(loss_fn(model, batch).detach()))
    assert calls[:3] == [False, True, True]
    assert (values[1] - values[0]) / 1e-5 == pytest.approx(norm, rel=1e-3)


@contextmanager
def moved(model: nn.Module, perturbation: Any) -> Iterator[None]:
    """theta_aux in place, by hooks of the test's own: h + d, or y + 2 B A x (lora_alpha / rank is 2)."""
    handles = []
    for name, delta in perturbation.items():
        if isinstance(delta, Tensor):
            hook = lambda m, a, y, d=delta: y + d  # noqa: E731
        else:
            hook = lambda m, a, y, d=delta: y + 2 * a[0] @ d[0].T @ d[1].T  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """Expects everything to be unpacked before it packs again, as offloading does."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}
        self.unpacking = False
        super().__init__(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> int:
        if self.unpacking:
            assert not self.kept, "backward should have emptied the list"
        self.unpacking = False
        number = max(self.kept, default=0) + 1
        self.kept[number] = tensor.clone()
        return number

    def unpack(self, number: int) -> Tensor:
        self.unpacking = True
        return self.kept.pop(number)


@pytest.mark.skipif(not can_tell_who_saves(), reason="torch 2.6 does not tell who saves: offloading is not noticed")
@pytest.mark.parametrize("layers", ["all", "late"])
def test_activation_offloading(layers: str) -> None:
    model, offload = make(), Offload()
    with LfURegularizer(model, "steering", layers=layers) as reg, offload:
        reg(model, token_batch(), plain_loss).backward()
    assert not offload.kept
    with (
        LfURegularizer(model, "steering", strategy="retained") as reg,
        Offload(),
        pytest.raises(RuntimeError, match="saved-tensor hooks are in force") as caught,
    ):
        reg(model, token_batch(), plain_loss)
    assert text_of("gotchas/activation-offloading.md").split("RuntimeError: ")[1].split(" ```")[0] in str(caught.value)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("options", [{"strategy": "retained"}, {"stop_gradient": "none"}], ids=str)
def test_checkpoints_in_a_retained_graph_are_refused(options: dict[str, Any]) -> None:
    model = Checkpointed().train()
    refused = pytest.raises(RuntimeError, match="does not go with a graph that is retained")
    with LfURegularizer(model, "steering", **options) as reg, refused:
        reg(model, torch.randn(2, 4), lambda model, x: model(x).square().mean())


def test_scripts_and_exports_between_steps() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))).train()
    x = torch.randn(2, 4)
    with LfURegularizer(model, "steering", alpha=0.1) as reg:
        reg(model, x, lambda model, x: model(x).square().mean())
        assert torch.equal(torch.jit.script(model)(x), model(x))
        assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))
        reg(model, x, lambda model, x: model(x).square().mean())


def test_eval_mode_is_warned_of_at_any_step() -> None:
    model = make()
    with LfURegularizer(model, "steering") as reg:
        reg(model, token_batch(), plain_loss)
        model.eval()
        with pytest.warns(LfUWarning, match="a model in eval mode with gradients enabled"):
            loss = reg(model, token_batch(), plain_loss)
    assert torch.equal(loss.detach(), plain_loss(model, token_batch()).detach())
