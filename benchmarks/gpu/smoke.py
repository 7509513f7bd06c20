"""Whether it works at all. Every part compares with the plain way, and reports by how much it is off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gpu.place import Place
from lfu_reg import LfURegularizer
from lfu_reg.cli.workloads import Setting, Workload, make_workload
from lfu_reg.distances.kernels.entry import mse_over_layers

AUXILIARIES = ("steering", "lora", "weights")
# How far results may be off, as a share of their norm. Half precision may be off by ten times what it is in plain SFT.
KERNEL, SAME, ROUNDED, HALF = 1e-5, 1e-4, 1e-3, 0.1
STRONG = {"alpha": 0.3, "lam": 100.0}  # the consistency term has a good part in these models' gradients

Gradients = dict[str, Tensor]


def kernel_against_twin(place: Place) -> dict[str, Any]:
    """Loss and both gradients, with all positions and with some."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        clean = [torch.randn(4, 64, 512, device=place.device.name).to(dtype).requires_grad_() for _ in range(3)]
        perturbed = [(h.detach() + 0.1 * torch.randn_like(h)).requires_grad_() for h in clean]
        for index in (None, torch.arange(3, 200, 3, device=place.device.name)):
            both = []
            for impl in (place.device.impl, "torch"):
                loss, per_layer = mse_over_layers(clean, perturbed, index, impl=impl)  # type: ignore[arg-type]
                both.append([per_layer, *torch.autograd.grad(loss, [*clean, *perturbed])])
            name = f"{dtype}, {'all' if index is None else 'some'} positions"
            found[name] = max(off(a, b) for a, b in zip(*both, strict=True))
            least = 4 * torch.finfo(dtype).eps
            if not found[name] <= max(KERNEL, least):
                raise AssertionError(f"{name}: off by {found[name]:.1e}; allowed is {max(KERNEL, least):.1e}")
    return {"off": found}


def float32(place: Place) -> dict[str, Any]:
    """Against the CPU. LoRA's A is drawn on the device, which draws otherwise: that one is against a retained graph."""
    here, cpu = workload(place), workload(place, device="cpu")
    found = {name: distance(gradients(here, name), gradients(cpu, name)) for name in ("sft", "steering", "weights")}
    found["lora, released against retained"] = distance(
        gradients(here, "lora"), gradients(here, "lora", strategy="retained")
    )
    return within(found, ROUNDED)


def bfloat16(place: Place) -> dict[str, Any]:
    """Under autocast, and with weights in bfloat16, against float32."""
    plain, halved = workload(place), workload(place, dtype="bfloat16")
    autocast = torch.autocast(place.device.name, torch.bfloat16)
    found = {}
    for name in ("sft", *AUXILIARIES):
        expected = gradients(plain, name)
        found[f"{name}, autocast"] = distance(gradients(plain, name, around=autocast), expected)
        found[f"{name}, weights in bfloat16"] = distance(gradients(halved, name), expected)
    return half(found)


def float16(place: Place) -> dict[str, Any]:
    """Autocast with a GradScaler: of three optimizer steps none is left out, and gradients are those of float32."""
    found: dict[str, float] = {}
    for name in ("sft", *AUXILIARIES):
        expected = gradients(workload(place), name)
        made = workload(place)
        scaler = torch.amp.GradScaler(place.device.name, init_scale=2.0**12)
        trained = [p for p in made.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-3)
        before = [p.detach().clone() for p in trained]
        with regularized(made, name) as loss_of:
            for number in range(3):
                with torch.autocast(place.device.name, torch.float16):
                    loss = loss_of()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                if number == 0:
                    found[name] = distance(taken(made.model), expected)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        if scaler.get_scale() != 2.0**12:
            raise AssertionError(f"{name}: the scale fell to {scaler.get_scale()}, so a step was left out")
        if all(torch.equal(a, b) for a, b in zip(before, trained, strict=True)):
            raise AssertionError(f"{name}: no weight has moved")
    return half(found)


def checkpointing(place: Place) -> dict[str, Any]:
    """With activation checkpointing against without."""
    with_, without = workload(place, checkpointing=True), workload(place)
    return within({name: distance(gradients(with_, name), gradients(without, name)) for name in AUXILIARIES}, SAME)


def compiled(place: Place) -> dict[str, Any]:
    """A compiled model against the plain one."""
    found = {}
    for name in place.sized(AUXILIARIES, AUXILIARIES[:1]):
        made = workload(place)
        made.model.compile(backend=place.sized("inductor", "eager"))
        found[name] = distance(gradients(made, name), gradients(workload(place), name))
    return within(found, ROUNDED)


def memory(place: Place) -> dict[str, Any]:
    """What a step has taken is free after it; with the default settings, which compare gradients at the first steps."""
    made, held = workload(place), {}
    for name in AUXILIARIES:
        with regularized(made, name, alpha=None, lam=None) as loss_of:
            after = []
            for _ in range(4):
                loss_of().backward()
                made.model.zero_grad(set_to_none=True)
                after.append(place.device.held())
        held[name] = after
        if after[1] != after[-1]:
            raise AssertionError(f"{name}: bytes held after each step: {after}")
    return {"held": held}


def side_stream(place: Place) -> dict[str, Any]:
    """A step on a stream of its own against one on the default stream."""
    made = workload(place)
    found = {
        name: distance(place.device.beside(lambda name=name: gradients(made, name)), gradients(made, name))
        for name in AUXILIARIES
    }
    return within(found, SAME)


def capture(place: Place) -> dict[str, Any]:
    """Whether the kernel's forward can be captured as a CUDA graph. Nobody promises that: this finds out."""
    clean = [torch.randn(8, 64, 256, device=place.device.name) for _ in range(4)]
    perturbed = [h + 0.1 for h in clean]

    def loss() -> Tensor:
        return mse_over_layers(clean, perturbed, None, impl=place.device.impl)[0]  # type: ignore[arg-type]

    result, replay = place.device.captured(loss)
    for other in range(64):  # whatever host memory the capture has used is used again
        mse_over_layers([h * other for h in clean], clean, None, impl=place.device.impl)  # type: ignore[arg-type]
    for h in perturbed:
        h.mul_(2)
    replay()
    place.device.synchronize()
    return within({"replayed": off(result, loss())}, SAME)


def workload(place: Place, device: str | None = None, **settings: Any) -> Workload:
    """The small Llama with an adapter whose two matrices both get gradients; the same weights on every device."""
    name = place.sized("small", "tiny")
    setting = Setting(model=name, batch=2, tokens=place.sized(64, 8), device=place.device.name, **settings)
    made = make_workload(setting)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.model.parameters():
            shape = parameter.shape
            width = 0.02 if len(shape) > 1 else 0.0
            parameter.copy_(torch.randn(shape, generator=drawn) * width + (len(shape) == 1))
    vocabulary = int(made.model.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, made.batch["input_ids"].shape, generator=drawn)
    to = device or place.device.name
    batch = {"input_ids": ids.to(to), "attention_mask": torch.ones_like(ids).to(to), "labels": ids.to(to)}
    return Workload(made.model.to(to), batch, made.sft_loss)


@contextmanager
def regularized(made: Workload, name: str, **options: Any) -> Iterator[Callable[[], Tensor]]:
    """A function that computes the loss of a method's step."""
    if name == "sft":
        yield lambda: made.sft_loss(made.model, made.batch)
        return
    with LfURegularizer(made.model, name, seed=0, **{**STRONG, **options}) as reg:
        yield lambda: reg(made.model, made.batch, made.sft_loss)


def gradients(
    made: Workload, name: str, *, around: AbstractContextManager[Any] | None = None, **options: Any
) -> Gradients:
    """Of one step."""
    with regularized(made, name, **options) as loss_of:
        with around or nullcontext():
            loss = loss_of()
        loss.backward()
    found = taken(made.model)
    made.model.zero_grad(set_to_none=True)
    return found


def taken(model: nn.Module) -> Gradients:
    """The gradients that a model has, as float32 on the CPU."""
    named = {name.replace("_orig_mod.", ""): p.grad for name, p in model.named_parameters()}
    return {name: g.detach().float().cpu() for name, g in named.items() if g is not None}


def distance(found: Gradients, expected: Gradients) -> float:
    """Between all gradients, as a share of the expected ones' norm."""
    if not expected or found.keys() != expected.keys():
        raise AssertionError(f"gradients of {sorted(found)} instead of {sorted(expected)}")
    squared = sum((found[name] - g).square().sum().item() for name, g in expected.items())
    return math.sqrt(squared / sum(g.square().sum().item() for g in expected.values()))


def off(found: Tensor, expected: Tensor) -> float:
    """Between two tensors, as a share of the largest entry."""
    a, b = found.detach().double(), expected.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def within(found: dict[str, float], most: float) -> dict[str, Any]:
    """`found`, if nothing is further off."""
    if wrong := {name: value for name, value in found.items() if not value <= most}:
        raise AssertionError(f"off by more than {most:g}: {wrong}; all: {found}")
    return {"off": found, "allowed": most}


def half(found: dict[str, float]) -> dict[str, Any]:
    """The same for half precision, which is off by something in plain SFT as well."""
    return within(found, max(HALF, *(10 * value for name, value in found.items() if name.startswith("sft"))))
