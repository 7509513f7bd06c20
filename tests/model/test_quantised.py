"""Packed and quantised linear maps: only sizes and activations are read; gradients are those of the unpacked model."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lfu_reg import LfURegularizer
from tests.support.architectures import llama
from tests.support.compare import assert_same_gradients, close, gradients_of
from tests.support.harness import auxiliary, run_pair
from tests.support.models import LLAMA, PEFT, llm_batch
from tests.support.packed import PackedLinear, pack, unpack
from tests.support.peft_models import lora_config

AUXILIARIES = ("lora", "steering", "weights")


def outcome(model: nn.Module, name: str, batch: Any, **options: Any) -> tuple[float, dict[str, Any]]:
    with LfURegularizer(model, auxiliary(name), alpha=0.05, lam=0.7, seed=3) as reg:
        loss = reg(model, batch, LLAMA.loss)
        loss.backward()
        assert len(reg.perturbation) == options.get("sites", len(reg.perturbation))
    return float(loss.detach()), gradients_of(model)


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")
@pytest.mark.parametrize("name", AUXILIARIES)
def test_packed_linear_maps(name: str) -> None:
    """Embeddings, norms and head are trained, what is packed is not."""
    batch = llm_batch()
    packed = pack(LLAMA.make())
    plain = unpack(copy.deepcopy(packed))
    sites = {"lora": 28, "steering": 4}
    extra = {"sites": sites[name]} if name in sites else {}
    got, want = outcome(packed, name, batch, **extra), outcome(plain, name, batch, **extra)
    close(got[0], want[0], 1e-10)
    trained = {key: value for key, value in want[1].items() if value is not None}
    assert_same_gradients({key: got[1][key] for key in trained}, trained)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_adapters_around_packed_linear_maps(name: str) -> None:
    """QLoRA: the site is PEFT's layer around the packed map. PEFT knows bitsandbytes' class; here it is set by hand."""
    model = PEFT.make()
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.base_layer = PackedLinear(module.base_layer)
    plain = unpack(copy.deepcopy(model))
    got, want = outcome(model, name, llm_batch()), outcome(plain, name, llm_batch())
    close(got[0], want[0], 1e-10)
    assert_same_gradients(got[1], want[1])


def test_other_names_of_the_sizes() -> None:
    model = pack(LLAMA.make(), lambda linear: PackedLinear(linear, sizes=("infeatures", "outfeatures")))
    outcome(model, "lora", llm_batch(), sites=28)


def test_sizes_that_do_not_fit_the_activations() -> None:
    def wrong(linear: nn.Linear) -> nn.Module:
        packed = PackedLinear(linear)
        packed.in_features //= 2  # two 4-bit numbers in a byte
        return packed

    model = pack(LLAMA.make(), wrong)
    with pytest.raises(ValueError, match=r"maps 8 to \d+ features.*target_modules"):
        outcome(model, "lora", llm_batch())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_compute_dtype_that_is_not_the_activations(name: str, autocast: bool) -> None:
    """Half-precision products between float32 activations: deltas follow the activations, outputs keep their dtype."""
    model = pack(llama().train(), lambda linear: PackedLinear(linear, compute=torch.bfloat16))
    seen: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.register_forward_hook(lambda m, args, y: seen.add(y.dtype))
    plain = {torch.bfloat16, torch.float32} if autocast else {torch.float32}
    reg = LfURegularizer(model, auxiliary(name), alpha=0.01)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = reg(model, llm_batch(), lambda m, b: LLAMA.loss(m, b).float())
    loss.backward()
    assert seen <= plain
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    if name == "lora":
        assert {matrix.dtype for pair in reg.auxiliary.perturbation().values() for matrix in pair} <= {torch.float32}


# ------------------------------------------------------------------ torchao and bitsandbytes


def quantised_by_torchao() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(1)
    model = llama().train()
    torchao.quantize_(
        model, torchao.Int8WeightOnlyConfig(), lambda m, name: isinstance(m, nn.Linear) and "layers" in name
    )
    torch.manual_seed(3)
    return peft.get_peft_model(model, lora_config(task_type="CAUSAL_LM"))


def dequantised(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    for module in plain.modules():
        weight = module._parameters.get("weight") if type(module) is nn.Linear else None
        if weight is not None and type(weight) is not nn.Parameter:
            module.weight = nn.Parameter(weight.dequantize().detach().clone(), requires_grad=False)
    return plain


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", AUXILIARIES)
def test_torchao_int8_weights_under_lora(name: str) -> None:
    batch = llm_batch()
    model = quantised_by_torchao()
    plain = dequantised(model)
    kinds = [type(m.weight) for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert nn.Parameter not in kinds
    got, want = outcome(model, name, batch), outcome(plain, name, batch)
    close(got[0], want[0], 1e-5)
    assert_same_gradients(got[1], want[1], 1e-3)  # float32, and the products round in another order


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning", "ignore::UserWarning")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_bitsandbytes_under_lora(name: str, bits: int) -> None:
    """On a GPU, or on a CPU where bitsandbytes has the kernels: against the model with the weights it computes with."""
    bnb = pytest.importorskip("bitsandbytes")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def convert(linear: nn.Linear) -> nn.Module:
        kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
        extra = {"compute_dtype": torch.float32} if bits == 4 else {"has_fp16_weights": False}
        made = kind(linear.in_features, linear.out_features, bias=False, **extra)
        made.load_state_dict(linear.state_dict())
        return made.to(device)

    def unpacked(module: nn.Module) -> nn.Module:
        width = module.in_features
        with torch.no_grad():
            weight = module(torch.eye(width, device=device)).t().contiguous()
        linear = nn.Linear(width, len(weight), bias=False, device=device).requires_grad_(False)
        linear.weight.copy_(weight)
        return linear

    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    model = pack(llama(**sizes).train(), convert).to(device)
    torch.manual_seed(3)
    model = peft.get_peft_model(model, lora_config())
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if type(inner := getattr(module, "base_layer", None)).__module__.startswith("bitsandbytes"):
            module.base_layer = unpacked(inner)
    batch = {key: value.to(device) for key, value in llm_batch().items()}
    with torch.no_grad():
        difference = (LLAMA.loss(model, batch) - LLAMA.loss(plain, batch)).abs()
    got, want = outcome(model, name, batch), outcome(plain, name, batch)
    # Products with 8-bit weights round the activations as well: those of identity's rows come out exact, others do not.
    tolerance = 1e-2 if bits == 4 else 0.1
    close(got[0], want[0], 10 * float(difference) + 1e-4)
    assert_same_gradients(got[1], want[1], tolerance)


def test_the_zoos_llama_is_what_is_packed() -> None:
    """The oracle agrees about the unpacked model, so that it may stand for it above."""
    case = LLAMA
    model = unpack(pack(case.make()))
    run_pair(case, "lora", model=model).check()
