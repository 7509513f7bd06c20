"""The compiled C++ kernel against the plain float64 version: the checks of the Triton kernels, and what is its own."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch

from lfu_reg import LfUWarning
from lfu_reg.distances.kernels import mse_compile, mse_trial
from lfu_reg.distances.kernels.mse_over_layers import mse_over_layers
from tests.distances.kernels.checks import CHECKS
from tests.distances.kernels.reference import compare, gradients, make

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="needs a C++ compiler"
)
# Outside of a layer an index raises on the CPU; and this kernel never writes over the clean states.
OWN_ANSWER = {"index_outside_turns_the_loss_into_nan", "overwriting_the_clean_states"}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@needs_compiler
@pytest.mark.parametrize("name", sorted(set(CHECKS) - OWN_ANSWER))
def test_checks_of_the_triton_kernel(name: str) -> None:
    torch.manual_seed(0)
    CHECKS[name]("cpu", "native")


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 257), (4, 401, 1271), (2, 0, 3), (70, 16)], ids=str)
def test_every_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the twin would be right as well
        compare(*make([shape] * 2, dtype), impl="native", stop_gradient="none", reduction="sum", upstream=-2.5)


@needs_compiler
def test_gradcheck() -> None:
    clean, perturbed = make([(2, 3, 5), (2, 3, 20)], torch.float64)
    index = [torch.tensor([4, 0, 3]), None]
    assert torch.autograd.gradcheck(
        lambda *_: mse_over_layers(clean, perturbed, index, [0.5, 2.0], stop_gradient="none", impl="native")[0],
        [*clean, *perturbed],
    )


@needs_compiler
def test_the_same_bits_with_any_number_of_threads() -> None:
    layers = make([(64, 3, 300), (3, 64, 2000)], torch.bfloat16)
    runs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss, per_layer = mse_over_layers(*layers, torch.arange(5, 190), impl="native")
            runs.append([loss, per_layer, *gradients(loss, layers[1])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@needs_compiler
def test_half_precision_rounds_to_the_nearest_and_keeps_nan() -> None:
    clean = torch.zeros(1, 20, dtype=torch.bfloat16)
    perturbed = torch.randn(1, 20).to(torch.bfloat16)
    perturbed[0, [0, 19]] = float("nan")  # one among the lanes, one behind them
    perturbed.requires_grad_()
    loss, _ = mse_over_layers([clean], [perturbed], None, [1.2345], impl="native")
    (found,) = gradients(loss, [perturbed])
    assert found.isnan().nonzero().tolist() == [[0, 0], [0, 19]]
    factor = torch.tensor(2 * 1.2345 / 20)
    assert torch.equal(found[0, 1:19], (perturbed.detach().float() * factor).to(torch.bfloat16)[0, 1:19])


@needs_compiler
def test_a_nan_whose_bits_would_round_to_a_number() -> None:
    clean = torch.zeros(1, 20, dtype=torch.bfloat16, requires_grad=True)
    perturbed = torch.zeros(1, 20)
    perturbed.view(torch.int32)[0, [0, 19]] = 0x7FFFFFFF
    loss, _ = mse_over_layers([clean], [perturbed], None, stop_gradient="perturbed", impl="native")
    assert gradients(loss, [clean])[0].isnan().nonzero().tolist() == [[0, 0], [0, 19]]


@needs_compiler
@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_index_outside_of_the_layer(wrong: int) -> None:
    with pytest.raises(IndexError, match="positions 0 to 3"):
        mse_over_layers(*make([(4, 16)]), torch.tensor([1, wrong, 0]), impl="native")


@needs_compiler
def test_overwriting_is_declined() -> None:
    clean, perturbed = make([(2, 3, 64)])
    owned = clean[0].detach()
    before = owned.clone()
    loss, _ = mse_over_layers([owned], perturbed, None, impl="native", overwrite_clean=True)
    gradients(loss, perturbed)
    assert torch.equal(owned, before)


@pytest.mark.parametrize("compiler", ["/nowhere/c++", shutil.which("false") or "/bin/false"])
def test_without_a_compiler_that_works(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin steps in, and says so once."""
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(mse_trial, "_verdicts", {})
    mse_compile.library.cache_clear()
    layers = make([(2, 3, 5)])
    with pytest.warns(LfUWarning, match=r"C\+\+ kernel does not work on cpu") as told:
        found = [mse_over_layers(*layers, None, impl="native")[0] for _ in range(2)]
    assert len(told) == 1
    assert found[0] == mse_over_layers(*layers, None, impl="torch")[0]


@needs_compiler
def test_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    build = mse_compile._build
    asked: list[list[str]] = []

    def refuses_openmp(compiler: str, source: str, target: Path, options: list[str]) -> object:
        asked.append(options)
        if options:
            raise OSError("no OpenMP")
        return build(compiler, source, target, options)

    monkeypatch.setattr(mse_compile, "_build", refuses_openmp)
    mse_compile.library.cache_clear()
    try:
        compare(*make([(64, 3, 300)]), impl="native")
    finally:
        mse_compile.library.cache_clear()
    assert asked == [["-fopenmp"], []]
