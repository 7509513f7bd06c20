"""What a kernel has to do, as functions of device and kernel: Triton's interpreter on a CPU, or a GPU.

Not collected by pytest itself: the interpreter is chosen when triton is imported, so it needs a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lfu_reg.distances.kernels.autograd import apply
from lfu_reg.distances.kernels.entry import _triton, mse_over_layers
from lfu_reg.distances.kernels.problem import describe_problems
from lfu_reg.distances.kernels.torch_twin import TWIN
from tests.distances.kernels.reference import compare, gradients, make

CHECKS: dict[str, Callable[[str, Any], None]] = {}

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
ODD = [(1, 1, 1), (3, 5, 257), (1, 7, 31)]


def check(function: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    CHECKS[function.__name__] = function
    return function


@check
def float32_at_odd_shapes(device: str, impl: Any) -> None:
    compare(*make(ODD, SINGLE, device=device), impl=impl)
    compare(*make(ODD, SINGLE, device=device), impl=impl, reduction="sum", stop_gradient="none")


@check
def bfloat16_at_odd_shapes(device: str, impl: Any) -> None:
    compare(*make(ODD, BRAIN, device=device), impl=impl, stop_gradient="none")


@check
def float16_at_odd_shapes(device: str, impl: Any) -> None:
    compare(*make(ODD, HALF, device=device), impl=impl, stop_gradient="none")


@check
def aligned_shapes(device: str, impl: Any) -> None:
    for dtype in (BRAIN, SINGLE):
        compare(*make([(2, 9, 128), (2, 3, 1024)], dtype, device=device), impl=impl)


@check
def several_tiles_per_program(device: str, impl: Any) -> None:
    compare(*make([(11, 13, 1271)], BRAIN, device=device), impl=impl)
    compare(*make([(9, 4, 4096)], SINGLE, device=device), impl=impl)


@check
def dtypes_that_differ(device: str, impl: Any) -> None:
    compare(*make([(2, 3, 40), (2, 3, 40)], BRAIN, SINGLE, device=device), impl=impl, stop_gradient="none")
    first, second = make([(2, 3, 33)], HALF, device=device), make([(1, 4, 48)], BRAIN, device=device)
    third = make([(2, 3, 33)], HALF, device=device)
    lists = [a + b + c for a, b, c in zip(first, second, third, strict=True)]
    compare(lists[0], lists[1], impl=impl, stop_gradient="none")


@check
def strides(device: str, impl: Any) -> None:
    clean, perturbed = make([(4, 6, 32)], SINGLE, device=device)
    swapped = [t.detach().transpose(0, 1).requires_grad_() for t in (clean[0], perturbed[0])]
    compare(swapped[:1], perturbed_like(swapped[1:]), impl=impl, stop_gradient="none")
    compare(
        [clean[0]],
        [clean[0].detach().transpose(0, 1).contiguous().transpose(0, 1).add(1).requires_grad_()],
        impl=impl,
    )
    last = torch.randn(5, 3, 64, device=device)[..., ::2].requires_grad_()  # hidden dimension strided
    compare([last], [torch.randn(5, 3, 32, device=device).requires_grad_()], impl=impl, stop_gradient="none")
    shuffled = torch.randn(4, 3, 2, 16, device=device).permute(2, 0, 1, 3).requires_grad_()  # needs a copy
    compare([shuffled], [torch.randn(2, 4, 3, 16, device=device).requires_grad_()], impl=impl)
    row = torch.randn(1, 1, 24, device=device).expand(3, 5, 24).requires_grad_()
    compare([row], [torch.randn(3, 5, 24, device=device).requires_grad_()], impl=impl)
    shifted = torch.randn(1 + 3 * 64, device=device)[1:].view(3, 64).requires_grad_()  # no 16-byte address
    compare([shifted], [torch.randn(3, 64, device=device).requires_grad_()], impl=impl)
    compare([torch.randn(17, device=device)], [torch.randn(17, device=device).requires_grad_()], impl=impl)


def perturbed_like(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


@check
def token_index(device: str, impl: Any) -> None:
    some = torch.tensor([1, 2, 3, 9, 12], device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    every_second = torch.arange(14, device=device)[1::2]
    unsorted = torch.tensor([13, 0, 5], device=device)
    for dtype in (BRAIN, SINGLE):
        compare(*make([(2, 7, 257), (14, 64)], dtype, device=device), some, impl=impl, stop_gradient="none")
        compare(*make([(2, 7, 64)] * 4, dtype, device=device), [some, None, none, unsorted], impl=impl)
        compare(*make([(2, 7, 64)] * 2, dtype, device=device), every_second, impl=impl)
    compare(*make([(2, 7, 64), (3, 7, 64)], device=device), [unsorted, unsorted], impl=impl)


@check
def nothing_selected(device: str, impl: Any) -> None:
    clean, perturbed = make([(2, 3, 16), (0, 3, 16), (2, 3, 0)], device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    loss, per_layer = mse_over_layers(clean, perturbed, [none, None, None], impl=impl)
    assert loss.item() == 0.0
    assert per_layer.tolist() == [0.0, 0.0, 0.0]
    for gradient, tensor in zip(gradients(loss, [*clean, *perturbed]), [*clean, *perturbed], strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@check
def values_at_other_positions_do_not_matter(device: str, impl: Any) -> None:
    clean, perturbed = make([(8, 64)], device=device)
    index = torch.tensor([2, 5], device=device)
    rest = [0, 1, 3, 4, 6, 7]
    with torch.no_grad():
        clean[0][rest] = float("nan")
        perturbed[0][rest] = float("inf")
    loss, _ = mse_over_layers(clean, perturbed, index, impl=impl)
    (gradient,) = gradients(loss, perturbed, upstream=float("inf"))
    assert loss.isfinite()
    assert torch.equal(gradient[rest], torch.zeros_like(gradient[rest]))


@check
def index_outside_turns_the_loss_into_nan(device: str, impl: Any) -> None:
    clean, perturbed = make([(4, 16), (4, 16)], device=device)
    for wrong in (-1, 4, 2**40):
        index = torch.tensor([1, wrong], device=device)
        loss, per_layer = mse_over_layers(clean, perturbed, [index, None], impl=impl)
        assert loss.isnan()
        assert per_layer.isnan().tolist() == [True, False]
        gradients(loss, perturbed)  # reads and writes nothing outside


@check
def upstream_gradient(device: str, impl: Any) -> None:
    layers = make([(3, 5, 40)] * 3, BRAIN, device=device)
    compare(*layers, impl=impl, upstream=-3.5)
    compare(*layers, impl=impl, upstream=2.0**16)
    loss, _per_layer = mse_over_layers(*layers, None, impl=impl)
    (3 * loss + loss.square()).backward()  # the gradient of the loss is not the last node of the graph
    expected, _ = mse_over_layers(*layers, None, impl=impl)
    factor = 3 + 2 * expected.item()
    for tensor, gradient in zip(layers[1], gradients(expected, layers[1], factor), strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-2, atol=1e-6)


@check
def upstream_gradient_that_is_one_number_expanded(device: str, impl: Any) -> None:
    layers = make([(3, 5, 40)] * 3, device=device)
    (problem,) = describe_problems(*layers, None, "mean")
    found, expected = (torch.autograd.grad(apply(problem, i, *layers).sum(), layers[1]) for i in (_triton(), TWIN))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@check
def gradient_for_some_layers_only(device: str, impl: Any) -> None:
    clean, perturbed = make([(2, 3, 16)] * 4, device=device)
    clean = [h.detach() for h in clean]
    for layer in (0, 2):
        perturbed[layer].requires_grad_(False)
    loss, _ = mse_over_layers(clean, perturbed, None, impl=impl)
    expected, _ = mse_over_layers(clean, perturbed, None, impl="torch")
    wanted = [perturbed[1], perturbed[3]]
    for a, b in zip(gradients(loss, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not mse_over_layers(clean, perturbed, None, impl=impl)[0].requires_grad


@check
def every_element_is_written(device: str, impl: Any) -> None:
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        assert torch.empty(8, device=device).isnan().all()
        index = torch.tensor([0, 3], device=device)
        for chosen in (None, index, [index, None]):
            clean, perturbed = make([(2, 3, 257), (1, 5, 40)], device=device)
            compare(clean, perturbed, chosen, impl=impl, stop_gradient="none")
    finally:
        torch.use_deterministic_algorithms(False)


@check
def the_same_bits_every_time(device: str, impl: Any) -> None:
    clean, perturbed = make([(11, 13, 257), (3, 7, 640)], BRAIN, device=device)
    runs = []
    for _ in range(3):
        loss, per_layer = mse_over_layers(clean, perturbed, None, impl=impl)
        runs.append([loss, per_layer, *gradients(loss, [*clean, *perturbed])])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@check
def one_and_128_layers(device: str, impl: Any) -> None:
    compare(*make([(2, 3, 8)], device=device), impl=impl)
    compare(*make([(2, 3, 8 + layer % 3) for layer in range(128)], device=device), impl=impl)


@check
def saved_tensors_that_move(device: str, impl: Any) -> None:
    clean, perturbed = make([(2, 3, 40)] * 2, device=device)
    expected, _ = mse_over_layers(clean, perturbed, None, impl="torch")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
        loss, _ = mse_over_layers(clean, perturbed, None, impl=impl)
    wanted = gradients(expected, perturbed)
    with torch.no_grad():
        for tensor in (*clean, *perturbed):
            tensor.fill_(float("nan"))  # whoever still reads there is found out
    for a, b in zip(gradients(loss, perturbed), wanted, strict=True):
        torch.testing.assert_close(a, b)


@check
def positions_beyond_2_to_the_31_elements(device: str, impl: Any) -> None:
    if device != "cpu":
        return  # there it would take real memory
    positions = 2**25 + 2
    with TemporaryDirectory() as folder:
        # Sparse files: only the pages of the two positions that count exist.
        clean, perturbed = (
            torch.from_file(str(Path(folder) / name), shared=True, size=positions * 64, dtype=HALF).view(positions, 64)
            for name in ("clean", "perturbed")
        )
        index = torch.tensor([0, positions - 1])
        clean[index] = torch.randn(2, 64).half()
        perturbed[index] = clean[index] + torch.tensor([[1.0], [2.0]]).half()
        _, found = mse_over_layers([clean], [perturbed], index, impl=impl)
        _, expected = mse_over_layers([clean[index]], [perturbed[index]], None, impl="torch")
        torch.testing.assert_close(found, expected)
        del clean, perturbed
