"""Two things that differ on a GPU, on a CPU: the model's device is not the default one, and backwards have a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from lfu_reg import LfURegularizer
from lfu_reg.auxiliaries import steering
from lfu_reg.cli import flops
from lfu_reg.cli.methods import LFU
from lfu_reg.cli.workloads import Setting, make_workload
from tests.support.architectures import IS_OLDER

pytestmark = pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models for counting operations are on the device "meta": with fake tensors it is a device like any other.

    Operations on it and the CPU together are errors, as on a GPU.
    """
    here, enabled, generator = flops._on_fake_cpu, torch.is_autocast_enabled, torch.Generator

    def like(tensor: Tensor) -> Tensor:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    def there(workload: Any) -> Any:
        with torch.device("meta"):
            return here(workload)

    class OnCPU:
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator("cpu")  # only a real device has generators; nothing is drawn

    monkeypatch.setattr(flops, "_like", like)
    monkeypatch.setattr(flops, "_on_fake_cpu", there)
    monkeypatch.setattr(torch, "Generator", OnCPU)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": kind != "meta" and enabled(kind))


@pytest.mark.skipif(IS_OLDER, reason="an older transformers looks at values of masks")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_step_stays_on_its_device(tuning: str, dtype: str, elsewhere: None) -> None:
    workload = make_workload(Setting("tiny", tuning, dtype, batch=2, tokens=8, device="meta"))
    assert flops.count_steps(workload, ("sft", *LFU)).keys() == {"sft", *LFU, "blocks"}


@pytest.mark.skipif(IS_OLDER, reason="an older transformers looks at values of masks")
def test_a_tensor_on_the_wrong_device_is_noticed(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    start = steering.SteeringVectors.start

    def wrong(self: Any, *call: Any) -> Any:
        return tuple(torch.zeros(c.shape, dtype=c.dtype, device="cpu") for c in start(self, *call))

    monkeypatch.setattr(steering.SteeringVectors, "start", wrong)
    workload = make_workload(Setting("tiny", batch=2, tokens=8, device="meta"))
    assert flops.count_steps(workload, ("sft", "steering")) == {}


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """The threads that backwards ran in: a single one, which is not the caller's."""
    found: set[int] = set()

    def moved(function: Callable[..., Any], pool: ThreadPoolExecutor) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            found.add(threading.get_ident())
            return function(*args, **kwargs)

        return lambda *args, **kwargs: pool.submit(run, *args, **kwargs).result()

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(torch.autograd, "grad", moved(torch.autograd.grad, pool))
        monkeypatch.setattr(torch.autograd, "backward", moved(torch.autograd.backward, pool))
        yield found


def gradients(auxiliary: str, checkpointing: bool, **options: Any) -> list[Tensor]:
    made = make_workload(Setting("tiny", "full", batch=2, tokens=8, checkpointing=checkpointing))
    with LfURegularizer(made.model, auxiliary, seed=0, alpha=0.3, lam=100.0, **options) as reg:
        reg(made.model, made.batch, made.sft_loss).backward()
    return [p.grad for p in made.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("way", [{}, {"checkpointing": True}, {"strategy": "retained"}], ids=str)
@pytest.mark.parametrize("auxiliary", ["steering", "lora", "weights"])
def test_the_backward_may_run_in_another_thread(
    auxiliary: str, way: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    options = {"checkpointing": False, **way}
    expected = gradients(auxiliary, **options)
    threads = request.getfixturevalue("threads")
    found = gradients(auxiliary, **options)
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
