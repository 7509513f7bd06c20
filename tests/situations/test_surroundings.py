"""What surrounds the model's call inside of the loss function: contexts, adapters, flags, hooks, other weights."""

from __future__ import annotations

import contextlib
import contextvars
import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts as selective

from lfu_reg import LfURegularizer
from tests.support.literal import ALPHA, LAM, Block, Net, World, assert_equal, assert_exact, seed_everything

CHOSEN: contextvars.ContextVar[int] = contextvars.ContextVar("chosen", default=0)


class Tasks(Block):
    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.active = 0

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) + torch.tanh(self.adapters[self.active + CHOSEN.get()](h))


class TaskNet(Net):
    block = Tasks


class ByFlag(World):
    """A task is chosen by a flag in a context that puts the old one back."""

    net = TaskNet

    @contextlib.contextmanager
    def task(self, number: int) -> Any:
        for layer in self.model.layers:
            layer.active = number
        try:
            yield
        finally:
            for layer in self.model.layers:
                layer.active = 0

    def loss(self, model: Any, batch: Any) -> Tensor:
        with self.task(batch["step"] % 2):
            return super().loss(model, batch)


class ByContextVariable(World):
    net = TaskNet

    def loss(self, model: Any, batch: Any) -> Tensor:
        token = CHOSEN.set(batch["step"] % 2)
        try:
            return super().loss(model, batch)
        finally:
            CHOSEN.reset(token)


class BySwap(World):
    """Another block is put in the place of one for the call only."""

    def begin(self) -> None:
        self.spare = Block().double()

    def loss(self, model: Any, batch: Any) -> Tensor:
        own = model.layers[1].a
        model.layers[1].a = self.spare.a
        try:
            return super().loss(model, batch)
        finally:
            model.layers[1].a = own


class FrozenInside(World):
    def loss(self, model: Any, batch: Any) -> Tensor:
        frozen = [*model.inp.parameters(), *model.layers[0].parameters()]
        for weight in frozen:
            weight.requires_grad_(False)
        try:
            return super().loss(model, batch)
        finally:
            for weight in frozen:
                weight.requires_grad_(True)


class HookInside(World):
    """Hooks are registered for the call and removed in the loss."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        kept: list[Tensor] = []
        handles = [
            model.layers[1].register_forward_hook(lambda m, i, o: o * 1.5),
            model.layers[2].register_forward_pre_hook(lambda m, i: (i[0] + 0.1,)),
            model.layers[2].register_forward_hook(lambda m, i, o: kept.append(o)),
        ]
        try:
            return super().loss(model, batch) + 0.1 * torch.stack(kept).square().mean()
        finally:
            for handle in handles:
                handle.remove()


class AcrossByHook(World):
    """What a hook keeps of the first block is added to the input of the last one, and stays until the next call."""

    def begin(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.model.layers[2].register_forward_pre_hook(self.add)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept["h"] = output

    def add(self, module: nn.Module, args: Any) -> Any:
        return (args[0] + torch.tanh(self.kept["h"]),)

    def __deepcopy__(self, memo: Any) -> Any:
        self.kept.clear()
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def loss(self, model: Any, batch: Any) -> Tensor:
        handle = model.layers[0].a.register_forward_hook(self.keep)
        try:
            return super().loss(model, batch)
        finally:
            handle.remove()


class AcrossByInput(AcrossByHook):
    """The same, of the first block's input."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        handle = model.inp.register_forward_hook(self.keep)
        try:
            return World.loss(self, model, batch)
        finally:
            handle.remove()


class FeaturesByHook(World):
    """Standing hooks fill a list that the loss reads and clears."""

    def begin(self) -> None:
        self.features: list[Tensor] = []
        self.model.layers[0].register_forward_hook(self.keep)
        self.model.layers[1].a.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.features.append(output)

    def loss(self, model: Any, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        loss = loss + sum(f.square().mean() for f in self.features)
        self.features.clear()
        return loss


class Conditioned(Block):
    scale: Any = 1.0

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) * self.scale


class ConditionedNet(Net):
    block = Conditioned


class SetOnLayers(World):
    net = ConditionedNet

    def begin(self) -> None:
        self.film = nn.Linear(3, 6).double()

    def trained(self) -> dict[str, Tensor]:
        return {**super().trained(), **{f"film.{n}": p for n, p in self.film.named_parameters()}}

    def loss(self, model: Any, batch: Any) -> Tensor:
        for layer in model.layers:
            layer.scale = 1 + self.film(batch["x"])
        try:
            return super().loss(model, batch)
        finally:
            for layer in model.layers:
                del layer.scale


class FunctionalCall(World):
    def loss(self, model: Any, batch: Any) -> Tensor:
        weights = {n: p * 1.1 for n, p in model.named_parameters()}
        output = torch.func.functional_call(model, weights, (batch["x"],))
        return (output - batch["y"]).square().mean()


class Inner(World):
    """MAML: an inner step of gradient descent, then the loss at the moved weights."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        weights = dict(model.named_parameters())
        inner = (torch.func.functional_call(model, weights, (batch["x"] + 1,)) - batch["y"]).square().mean()
        gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        fast = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), gradients, strict=True)}
        return (torch.func.functional_call(model, fast, (batch["x"],)) - batch["y"]).square().mean()


class Stacked(World):
    """Members of an ensemble, one after the other, by functional_call with slices of stacked weights."""

    def begin(self) -> None:
        self.stacked = {
            n: nn.Parameter(torch.stack([p.detach(), p.detach() * 0.9])) for n, p in self.model.named_parameters()
        }

    def trained(self) -> dict[str, Tensor]:
        return self.stacked

    def loss(self, model: Any, batch: Any) -> Tensor:
        outputs = [
            torch.func.functional_call(model, {n: w[i] for n, w in self.stacked.items()}, (batch["x"],)) for i in (0, 1)
        ]
        return (torch.stack(outputs).mean(0) - batch["y"]).square().mean()


class Double(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * torch.tanh(w)


class Parametrized(World):
    def begin(self) -> None:
        parametrize.register_parametrization(self.model.layers[1].a, "weight", Double())

    def loss(self, model: Any, batch: Any) -> Tensor:
        with parametrize.cached():
            return super().loss(model, batch)


class ParametrizedAround(Parametrized):
    def loss(self, model: Any, batch: Any) -> Tensor:
        return World.loss(self, model, batch)


class HyperNetwork(World):
    """Another network makes the weight of a layer for this call."""

    def begin(self) -> None:
        self.hyper = nn.Linear(3, 36).double()
        del self.model.layers[1].a.weight
        self.model.layers[1].a.weight = torch.zeros(6, 6).double()

    def trained(self) -> dict[str, Tensor]:
        return {**super().trained(), **{f"hyper.{n}": p for n, p in self.hyper.named_parameters()}}

    def after(self) -> Any:
        return {}

    def loss(self, model: Any, batch: Any) -> Tensor:
        layer = model.layers[1].a
        empty, layer.weight = layer.weight, self.hyper(batch["x"].mean(0)).view(6, 6)
        try:
            return super().loss(model, batch)
        finally:
            layer.weight = empty


class Popped(World):
    """The loss takes entries out of the batch, writes others and changes a tensor of it in place."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        y = batch.pop("y")
        batch["x"] = batch["x"] * 2
        return (model(batch["x"]) - y).square().mean()


class History(World):
    """The input comes out of another network, in the loss."""

    def begin(self) -> None:
        self.encoder = nn.Linear(3, 3).double()

    def trained(self) -> dict[str, Tensor]:
        return {**super().trained(), **{f"encoder.{n}": p for n, p in self.encoder.named_parameters()}}

    def loss(self, model: Any, batch: Any) -> Tensor:
        return (model(torch.tanh(self.encoder(batch["x"]))) - batch["y"]).square().mean()


class EvalInside(World):
    """A teacher's pass in eval mode without gradients, then the student's."""

    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.drop(x))

    def loss(self, model: Any, batch: Any) -> Tensor:
        model.eval()
        with torch.no_grad():
            target = model(batch["x"])
        model.train()
        return super().loss(model, batch) + (model(batch["x"]) - target).square().mean()


class Checkpointed(World):
    def loss(self, model: Any, batch: Any) -> Tensor:
        h = model.inp(batch["x"])
        for layer in model.layers:
            h = checkpoint(layer, h, use_reentrant=False)
        return (model.out(h) - batch["y"]).square().mean()


class ReturnsEarly(World):
    def loss(self, model: Any, batch: Any) -> Tensor:
        prediction = model(batch["x"])
        if batch["step"] == 1:
            return prediction.square().mean()
        return (prediction - batch["y"]).square().mean() + (model(batch["x"] + 1) - batch["y"]).square().mean()


class DefaultsInside(World):
    """Global switches that hold for the call only."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        torch.set_default_dtype(torch.float64)
        try:
            with torch.autograd.set_detect_anomaly(True):
                noise = torch.randn(5, 3)
                return (model(batch["x"] + noise) - batch["y"]).square().mean()
        finally:
            torch.set_default_dtype(torch.float32)


class ForwardReplaced(World):
    """The loss gives a layer another forward method for the call."""

    number = 0

    def loss(self, model: Any, batch: Any) -> Tensor:
        layer = model.layers[self.number]
        plain = layer.forward
        layer.forward = lambda h: plain(h) * 1.2
        try:
            return super().loss(model, batch)
        finally:
            del layer.forward


class NextForwardReplaced(ForwardReplaced):
    number = 1


class SomeLayersSkipped(World):
    """Layers are left out by a flag that the loss sets (a curriculum of depth)."""

    class net(Net):
        depth = 3

        def forward(self, x: Tensor) -> Tensor:
            h = self.inp(x)
            for layer in self.layers[: self.depth]:
                h = layer(h)
            return self.out(torch.tanh(h))

    def loss(self, model: Any, batch: Any) -> Tensor:
        model.depth = 2 + batch["step"] % 2
        try:
            return super().loss(model, batch)
        finally:
            model.depth = 3


class WeightsCast(World):
    """Weights are changed in place for the call (noise on weights) and put back."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        weight = model.layers[1].a.weight
        noise = 0.1 * torch.randn(6, 6).double()
        own = model.layers[1].a._parameters["weight"]
        model.layers[1].a._parameters["weight"] = weight + noise
        try:
            return super().loss(model, batch)
        finally:
            model.layers[1].a._parameters["weight"] = own


class SelectivelyCheckpointed(World):
    """What checkpoints save of some operations serves one backward."""

    class net(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.inp(x)
            for layer in self.layers:
                h = checkpoint(
                    layer, h, use_reentrant=False, context_fn=partial(selective, [torch.ops.aten.addmm.default])
                )
            return self.out(torch.tanh(h))


SITUATIONS = [
    SelectivelyCheckpointed,
    ByFlag, ByContextVariable, FrozenInside, HookInside, FeaturesByHook, SetOnLayers, FunctionalCall, Inner,
    Parametrized, ParametrizedAround, HyperNetwork, Popped, History, EvalInside, Checkpointed, ReturnsEarly,
    DefaultsInside, ForwardReplaced, NextForwardReplaced, SomeLayersSkipped, WeightsCast, BySwap, Stacked,
    AcrossByHook, AcrossByInput,
]  # fmt: skip


@pytest.mark.parametrize("layers", ["all", "late"])
@pytest.mark.parametrize("world", SITUATIONS)
def test_surroundings(world: type[World], layers: str) -> None:
    if world is SomeLayersSkipped and layers == "late":
        pytest.skip("a layer that was asked for by name has to run")
    kept = world.layers

    def chosen(self: World) -> dict[str, nn.Module]:
        found = kept(self)
        return found if layers == "all" else dict(list(found.items())[-1:])

    late = type(world.__name__, (world,), {"layers": chosen})
    kinds = ("steering", "lora") if world is Stacked else ("steering", "lora", "weights")
    assert_exact(late, kinds, layers="all" if layers == "all" else ["layers.2"])


class FrozenAfterwards(World):
    """A block is frozen after a call that has used it, and stays so until the next step."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        model.requires_grad_(True)
        loss = super().loss(model, batch)
        model.layers[1].a.requires_grad_(False)
        return loss + super().loss(model, {**batch, "x": batch["x"] + 1})


def test_what_is_frozen_after_its_use_gets_no_gradient() -> None:
    assert_exact(FrozenAfterwards, ("steering", "lora"))


class Adapters(World):
    """PEFT: adapters are chosen, both used, or switched off for a reference inside of the loss."""

    stack = "base_model.model.layers"

    def begin(self) -> None:
        peft = pytest.importorskip("peft")
        config = partial(peft.LoraConfig, r=2, target_modules=["a", "b"], init_lora_weights=False)
        self.model = peft.get_peft_model(self.model, config(), adapter_name="one")
        self.model.add_adapter("two", config())
        self.model.double()

    def own(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.model.named_parameters() if "lora_" in n}


class OneAdapter(Adapters):
    def loss(self, model: Any, batch: Any) -> Tensor:
        model.set_adapter("two" if batch["step"] % 2 else "one")
        return super().loss(model, batch)


class BothAdapters(Adapters):
    def loss(self, model: Any, batch: Any) -> Tensor:
        model.set_adapter("two")
        loss = super().loss(model, batch)
        model.set_adapter("one")
        return loss + super().loss(model, batch)


class Reference(Adapters):
    def loss(self, model: Any, batch: Any) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            reference = model(batch["x"])
        return super().loss(model, batch) + (model(batch["x"]) - reference).square().mean()


@pytest.mark.parametrize("world", [OneAdapter, BothAdapters, Reference])
def test_adapters(world: type[World]) -> None:
    assert_exact(world, ("steering",), steps=3)


@pytest.mark.parametrize("world", [BothAdapters, Reference])
def test_adapters_that_are_moved(world: type[World]) -> None:
    if not hasattr(pytest.importorskip("peft").utils.other, "_set_layer_requires_grad"):
        pytest.skip("PEFT 0.15 freezes adapters that are no leaves, as moved ones are: torch refuses it")
    assert_exact(world, ("weights",), steps=3)


class WeightNormed(World):
    def begin(self) -> None:
        for layer in self.model.layers:
            nn.utils.parametrizations.weight_norm(layer.a)


@pytest.mark.parametrize("strategy", ["released", "retained"])
@pytest.mark.parametrize("kind", ["steering", "weights"])
def test_weights_that_torch_keeps_around_the_step(kind: str, strategy: Any) -> None:
    """In `parametrize.cached()` each pass has weights of its own, whatever ran in the same block before."""
    found = []
    for around in (parametrize.cached, contextlib.nullcontext):
        seed_everything(0)
        ours = WeightNormed()
        with LfURegularizer(ours.model, kind, alpha=ALPHA, lam=LAM, strategy=strategy) as reg, around():
            ours.loss(ours.model, ours.batch(0)).backward()
            ours.model.zero_grad()
            for step in range(2):
                reg(ours.model, ours.batch(step), ours.loss).backward()
        found.append({name: weight.grad for name, weight in ours.trained().items()})
    assert_equal("gradient of", *found)
