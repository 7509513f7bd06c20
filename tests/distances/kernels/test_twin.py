"""The torch twin against the plain version in float64."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lfu_reg.distances.kernels import entry, torch_twin
from lfu_reg.distances.kernels.entry import mse_over_layers
from tests.distances.kernels.reference import compare, gradients, make

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# The largest is walked in several blocks.
SHAPES = [
    [(1, 1, 1)],
    [(1, 1, 1)] * 128,
    [(3, 5, 257)] * 3,
    [(5, 7, 1271)],
    [(4, 401, 1271)],
    [(2, 3, 8), (4, 9), (17,), (2, 1, 3, 6)],
    [(64, 3, 300)] * 2,
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stop_gradient", ["clean", "perturbed", "none"])
def test_all_positions(dtype: torch.dtype, shapes: list[tuple[int, ...]], stop_gradient: str) -> None:
    compare(*make(shapes, dtype), impl="torch", stop_gradient=stop_gradient, reduction="sum", upstream=-2.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "index", [[], [3], [5, 1, 9], [2, 3, 4, 5, 10, 11], list(range(15)), [0, 14], [*range(3, 11)]], ids=str
)
def test_token_index(index: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of positions and single ones, in one block and in several."""
    chosen = torch.tensor(index, dtype=torch.int64)
    for block in (1 << 18, 90):
        monkeypatch.setattr(torch_twin, "_BLOCK_CPU", block)
        layers = make([(3, 5, 30)] * 2, dtype)
        compare(*layers, chosen, impl="torch", stop_gradient="none")
        compare(*layers, [chosen, None], impl="torch", stop_gradient="none")


def test_dtypes_that_differ() -> None:
    compare(*make([(3, 5, 20)] * 2, torch.bfloat16, torch.float32), impl="torch", stop_gradient="none")
    compare(*make([(3, 5, 20)] * 2, torch.float32, torch.float16), impl="torch", stop_gradient="none")
    compare(*make([(64, 3, 300)], torch.float32, torch.float64), impl="torch", stop_gradient="none")


def test_layers_of_several_dtypes_keep_their_order() -> None:
    (a, c), (b, d) = make([(2, 3), (4, 5)], torch.float64), make([(3, 4), (5, 2)], torch.bfloat16)
    sides = [a[0], b[0], a[1], b[1]], [c[0], d[0], c[1], d[1]]
    loss, per_layer = mse_over_layers(*sides, None)
    alone = [mse_over_layers([h], [h_prime], None)[0].double() for h, h_prime in zip(*sides, strict=True)]
    assert torch.equal(per_layer, torch.stack(alone))
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(sum(alone).item() / 4)


@pytest.mark.parametrize("shape", [(700, 1024), (700, 1021)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_long_sums_keep_their_digits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    compare(*make([shape], dtype), impl="torch")


def test_half_precision_does_not_overflow_in_the_difference() -> None:
    clean = [torch.full((4, 3000), -60000.0, dtype=torch.float16)]
    perturbed = [torch.full((4, 3000), 60000.0, dtype=torch.float16)]
    assert mse_over_layers(clean, perturbed, None)[0].item() == pytest.approx(120000.0**2, rel=1e-4)


def test_strides() -> None:
    views = [
        torch.randn(4, 6, 32).transpose(0, 1),
        torch.randn(6, 4, 64)[..., ::2],
        torch.randn(6, 32, 4).transpose(1, 2),
        torch.randn(1, 1, 32).expand(6, 4, 32),
    ]
    dense = [torch.randn(6, 4, 32) for _ in views]
    index = torch.tensor([0, 3, 4, 20])
    for first, second in ((views, dense), (dense, views)):
        for chosen in (None, index):
            tensors = [t.detach().requires_grad_() for t in (*first, *second)]
            compare(tensors[:4], tensors[4:], chosen, impl="torch", stop_gradient="none")


@pytest.mark.parametrize("sides", ["clean", "perturbed", "both"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(sides: str, reduction: Any) -> None:
    clean, perturbed = make([(2, 3, 5)] * 3, torch.float64)
    index = [torch.tensor([4, 0, 3]), None, torch.empty(0, dtype=torch.int64)]
    inputs = [*(clean if sides != "perturbed" else []), *(perturbed if sides != "clean" else [])]

    def loss(*_: torch.Tensor) -> torch.Tensor:
        return mse_over_layers(clean, perturbed, index, reduction=reduction)[0]

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_detached_side_gets_no_gradient(stopped: int) -> None:
    sides = make([(2, 3, 5)] * 2)
    given = [[t.detach() for t in side] if n == stopped else side for n, side in enumerate(sides)]
    mse_over_layers(*given, None)[0].backward()
    assert all(t.grad is None for t in sides[stopped])
    assert all(t.grad is not None for t in sides[1 - stopped])


def test_gradients_nobody_wants_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, perturbed = make([(2, 3, 5)] * 3)
    clean = [clean[0], clean[1].detach(), clean[2].detach()]
    loss, _ = mse_over_layers(clean, [*perturbed[:2], perturbed[2].detach()], None)
    calls: dict[str, int] = {"_difference": 0, "_placed": 0}
    for name in calls:
        function = getattr(torch_twin, name)

        def counted(*arguments: Any, name: str = name, function: Any = function) -> Any:
            calls[name] += 1
            return function(*arguments)

        monkeypatch.setattr(torch_twin, name, counted)
    loss.backward()
    assert calls == {"_difference": 2, "_placed": 3}


def test_second_derivatives_are_refused() -> None:
    _, perturbed = layers = make([(2, 3, 5)])
    loss, _ = mse_over_layers(*layers, None)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss.square(), perturbed, create_graph=True)


def test_upstream_gradient_that_is_not_one() -> None:
    layers = make([(2, 3, 5), (64, 3, 300)])
    loss, _ = mse_over_layers(*layers, None)
    value = loss.item()
    chained = torch.autograd.grad(3 * loss + loss.square(), layers[1])
    direct = gradients(mse_over_layers(*layers, None)[0], layers[1], 3 + 2 * value)
    for a, b in zip(chained, direct, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_selected_and_empty_layers() -> None:
    clean, perturbed = make([(2, 3, 16), (0, 3, 16), (2, 3, 0), (2, 3, 0), (70, 300)])
    none = torch.empty(0, dtype=torch.int64)
    loss, per_layer = mse_over_layers(clean, perturbed, [none, None, None, None, none])
    assert loss.item() == 0.0
    assert per_layer.tolist() == [0.0] * 5
    for gradient, tensor in zip(gradients(loss, [*clean, *perturbed]), [*clean, *perturbed], strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("shape", [(8, 64), (8, 6400)])
def test_values_at_other_positions_do_not_matter(shape: tuple[int, int]) -> None:
    clean, perturbed = make([shape])
    rest = [0, 1, 3, 4, 6, 7]
    with torch.no_grad():
        clean[0][rest] = float("nan")
        perturbed[0][rest] = float("inf")
    loss, _ = mse_over_layers(clean, perturbed, torch.tensor([2, 5]))
    (gradient,) = gradients(loss, perturbed)
    assert loss.isfinite()
    assert torch.equal(gradient[rest], torch.zeros_like(gradient[rest]))
    assert gradient[[2, 5]].all()


@pytest.mark.parametrize("shape", [(4, 16), (64, 1024)])
@pytest.mark.parametrize("wrong", [-1, 100])
def test_index_outside_of_the_layer(shape: tuple[int, int], wrong: int) -> None:
    index = torch.tensor([wrong, *range(1, shape[0] - 1)] if wrong < 0 else [*range(1, shape[0] - 1), wrong])
    with pytest.raises((IndexError, RuntimeError)):
        mse_over_layers(*make([shape]), index)
    with pytest.raises((IndexError, RuntimeError)):
        mse_over_layers(*make([shape]), index.flip(0))


def test_every_element_is_written() -> None:
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        assert torch.empty(8).isnan().all()
        for index in (None, torch.arange(60, 130), torch.tensor([0, 3, 100])):
            compare(*make([(64, 3, 300), (3, 64, 20)]), index, impl="torch", stop_gradient="none")
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_same_bits_every_time() -> None:
    layers = make([(64, 3, 300), (3, 64, 20)], torch.bfloat16)
    first, second = (gradients(mse_over_layers(*layers, None)[0], layers[1]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing() -> None:
    layers = make([(64, 3, 300), (3, 64, 20)])
    plain, per_layer = mse_over_layers(*layers, None)
    with torch.autocast("cpu", torch.bfloat16):
        cast, per_layer_cast = mse_over_layers(*layers, None)
    assert torch.equal(plain, cast)
    assert torch.equal(per_layer, per_layer_cast)


def test_only_references_are_kept() -> None:
    layers = make([(64, 3, 300)] * 3)
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        mse_over_layers(*layers, None)
    assert set(kept) == {t.data_ptr() for side in layers for t in side}


def test_saved_tensors_that_move() -> None:
    layers = make([(64, 3, 300), (2, 3, 4)])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
        loss, _ = mse_over_layers(*layers, None)
    expected, _ = mse_over_layers(*layers, None)
    for a, b in zip(gradients(loss, layers[1]), gradients(expected, layers[1]), strict=True):
        assert torch.equal(a, b)


@given(st.data())
def test_ragged_layers(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    shapes, index = [], []
    for _ in range(data.draw(st.integers(1, 5))):
        lead = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        shapes.append((*lead, data.draw(st.integers(1, 40))))
        positions = int(torch.tensor(lead).prod())
        chosen = data.draw(st.none() | st.lists(st.integers(0, positions - 1), unique=True))
        index.append(None if chosen is None else torch.tensor(chosen, dtype=torch.int64))
    dtype = data.draw(st.sampled_from(DTYPES))
    reduction = data.draw(st.sampled_from(["mean", "sum"]))
    compare(*make(shapes, dtype), index, reduction=reduction, impl="torch", stop_gradient="none")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.backends.mps.is_available() and not torch.cuda.is_available(), reason="needs a GPU")
def test_twin_on_another_device() -> None:
    device = "cuda" if torch.cuda.is_available() else "mps"
    compare(*make([(64, 3, 300)] * 2, device=device), torch.arange(9, device=device), impl="torch")


def test_imports_without_triton() -> None:
    assert "triton" not in vars(entry)
    assert "lfu_reg.distances.kernels.triton_launch" not in sys.modules or "triton" in sys.modules
