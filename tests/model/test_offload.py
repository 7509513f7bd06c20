"""accelerate's device maps: offloaded weights exist only while their module runs, and their hooks replace forwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from lfu_reg.model.rng import devices_of
from tests.support.architectures import VOCAB, WIDTH
from tests.support.cases import next_token_loss
from tests.support.compare import assert_same_gradients, close, gradients_of
from tests.support.harness import auxiliary
from tests.support.models import LLAMA, llm_batch
from tests.support.peft_models import lora_config
from tests.support.refusals import says

accelerate = pytest.importorskip("accelerate")

AUXILIARIES = ("lora", "steering", "weights")


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    """The second layer on the disk, everything else where it was."""
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    layers = {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(4)}
    return accelerate.dispatch_model(
        model, {**dict.fromkeys(parts, "cpu"), **layers}, main_device="cpu", offload_dir=str(folder)
    )


def adapted(model: nn.Module, layers: list[int]) -> nn.Module:
    torch.manual_seed(3)
    model = peft.get_peft_model(model, lora_config(layers_to_transform=layers)).train()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.device.type != "meta":
            parameter.data = parameter.data.double()
    return model


@pytest.mark.parametrize("name", AUXILIARIES)
def test_adapters_on_resident_layers(name: str, tmp_path: Path) -> None:
    """The gradients without offloading."""
    found = []
    for model in (LLAMA.make(), dispatched(LLAMA.make(), tmp_path)):
        model = adapted(model, [2, 3])
        with LfURegularizer(model, auxiliary(name), alpha=0.02, lam=0.7, seed=3) as reg:
            loss = reg(model, llm_batch(), LLAMA.loss)
            loss.backward()
            if name == "lora":
                assert len(reg.perturbation) == 28
            if name != "weights":
                parts = [part for moved in reg.perturbation.values() for part in moved]
                assert {part.device for part in parts} == {torch.device("cpu")}
        found.append((float(loss.detach()), gradients_of(model)))
    assert any(p.device.type == "meta" for p in model.parameters()), "nothing was offloaded, or it has not gone back"
    close(found[1][0], found[0][0])
    assert_same_gradients(found[1][1], found[0][1])


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")
@pytest.mark.parametrize("name", ["lora", "steering"])
def test_everything_offloaded_and_a_head_of_the_users(name: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    head = nn.Linear(WIDTH, VOCAB).double()

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return next_token_loss(head(hidden), batch["labels"])

    found = []
    for offload in (None, accelerate.cpu_offload, accelerate.disk_offload):
        head.zero_grad()
        model = LLAMA.make().model.requires_grad_(False)
        if offload is not None:
            where = {"offload_dir": str(tmp_path)} if offload is accelerate.disk_offload else {}
            offload(model, execution_device=torch.device("cpu"), **where)
        reg = LfURegularizer(model, auxiliary(name), alpha=0.05, lam=0.7, seed=3)
        value = reg(model, llm_batch(), loss)
        value.backward()
        assert torch.isfinite(value)
        found.append((float(value.detach()), head.weight.grad.clone()))
    for value, gradient in found[1:]:
        close(value, found[0][0])
        assert torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("kind", ["cpu_offload", "disk_offload", "device_map"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_trainable_weights_that_are_offloaded_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    """Their gradients go to copies that are thrown away: plain training loses them without a word."""
    model = LLAMA.make()
    if kind == "device_map":
        model = dispatched(model, tmp_path)
    elif kind == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    reg = LfURegularizer(model, auxiliary(name))
    with pytest.raises(ValueError, match=says("trainable parameters", "meta", "device_map")):
        reg(model, llm_batch(), LLAMA.loss)


def test_devices_of_offloaded_modules() -> None:
    """The meta device draws no random numbers and has no autocast; where weights are brought to is any accelerator."""
    modules = [nn.Linear(2, 2, device="meta"), nn.Linear(2, 2), nn.ReLU()]
    assert torch.device("cpu") in devices_of(modules)
    assert torch.device("meta") not in devices_of(modules)
    assert devices_of(modules[1:]) == [torch.device("cpu")]


def test_devices_where_an_accelerator_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    found = devices_of([nn.Linear(2, 2, device="meta"), nn.Linear(2, 2)])
    assert found == [torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)]
    assert devices_of([nn.Linear(2, 2)]) == [torch.device("cpu")]
