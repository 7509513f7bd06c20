"""A user's own auxiliary: every wrong return is an error at once that names the class, the method and the cure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfu_reg import Auxiliary, LfURegularizer, LoRADeltas, OutputAuxiliary, RandomDirections, SteeringVectors
from lfu_reg.auxiliaries import return_checks
from tests.support.models import TINY
from tests.support.refusals import refuses, refuses_step, says


class Gains(OutputAuxiliary):
    """One factor per channel, h' = h * (1 + c), and nothing wrong with it."""

    default_alpha, default_lam = 0.1, 0.5

    def sites(self, model: nn.Module, layers: Any) -> Any:
        return layers

    def start(self, call: Any, generator: torch.Generator) -> Any:
        return (call.y.new_zeros(call.y.shape[-1]),)

    def apply(self, components: Any, call: Any) -> Any:
        (c,) = components
        return call.y * (1 + c)


def gains(**methods: Any) -> Gains:
    """`Gains` with other methods; the class is called Mine."""
    mine: type[Gains] = type("Mine", (Gains,), methods)
    return mine()


def refused(auxiliary: Auxiliary, *parts: str, **options: Any) -> None:
    model = TINY.make()
    refuses_step(parts, model=model, reg=LfURegularizer(model, auxiliary, **options))


STARTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a tensor": (lambda y: y.new_zeros(8), ("tensor of shape [8]", "a tuple", "(c,)")),
    "a list": (lambda y: [y.new_zeros(8)], ("a list", "a tuple")),
    "None": (lambda y: None, ("None", "a tuple")),
    "nothing": (lambda y: (), ("a tuple with 0 entries",)),
    "a number": (lambda y: (0.0,), ("a float", "floating-point tensors")),
    "integers": (lambda y: (torch.zeros(8, dtype=torch.int64),), ("int64", "master_dtype")),
    "another device": (lambda y: (torch.zeros(8, device="meta"),), ("on meta", "on cpu")),
}


@pytest.mark.parametrize("kind", STARTS)
def test_start(kind: str) -> None:
    returned, parts = STARTS[kind]
    refused(gains(start=lambda self, call, generator: returned(call.y)), "Mine.start", "blocks.0", *parts)


APPLIES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "None": (lambda c, y: None, ("None", "return statement")),
    "a tuple": (lambda c, y: (y * (1 + c),), ("a tuple",)),
    "another shape": (lambda c, y: (y * (1 + c))[:, :-1], ("of shape [3, 6, 8]", "shaped like call.y")),
    "a shape that broadcasts": (lambda c, y: (y * (1 + c))[:1], ("of shape [1, 7, 8]", "shaped like call.y")),
    "another dtype": (lambda c, y: (y * (1 + c)).float(), ("float32", "float64", "c.to(call.y.dtype)")),
    "another device": (lambda c, y: (y * (1 + c)).to("meta"), ("on meta", "on cpu")),
    "y written in place": (lambda c, y: y.mul_(1 + c), ("in place", "new tensor")),
    "y written in place, a copy returned": (lambda c, y: y.mul_(1 + c).clone(), ("in place", "new tensor")),
}


@pytest.mark.parametrize("where", ["default rule", "pass 2"])
@pytest.mark.parametrize("kind", APPLIES)
def test_apply(kind: str, where: str) -> None:
    returned, parts = APPLIES[kind]
    methods: dict[str, Any] = {"apply": lambda self, components, call: returned(*components, call.y)}
    if where == "pass 2":
        methods["gradient_rule"] = lambda self, components, call: lambda grad_y: (grad_y.sum((0, 1)),)
    refused(gains(**methods), "Mine.apply", "blocks.", *parts)


def test_apply_that_writes_to_the_input() -> None:
    def apply(self: Any, components: Any, call: Any) -> Tensor:
        call.x.mul_(2)
        return call.y * (1 + components[0])

    refused(gains(apply=apply), "Mine.apply", "in place")


@pytest.mark.parametrize("returned", [lambda c, y: y * (1 + c.detach()), lambda c, y: y.clone()])
def test_apply_that_leaves_the_components_out(returned: Any) -> None:
    refused(gains(apply=lambda self, cs, call: returned(*cs, call.y)), "Mine.apply", "does not depend", "detach()")


def test_apply_that_has_nothing_to_change_in_a_call() -> None:
    """The output itself may be returned: the site has no gradient then, and others are moved."""

    def apply(self: Any, components: Any, call: Any) -> Tensor:
        return call.y if call.name == "blocks.0" else call.y * (1 + components[0])

    reg = LfURegularizer(TINY.make(), gains(apply=apply))
    reg(reg._attached.model, TINY.batch(), TINY.loss).backward()
    assert [bool(c.any()) for c in reg.perturbation.values()] == [False, True, True]


RULES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a tensor": (lambda g: g.sum((0, 1)), ("tensor of shape [8]", "a sequence", "(gradient,)")),
    "None": (lambda g: None, ("None", "a sequence")),
    "too many": (lambda g: (g.sum((0, 1)), None), ("2 entries", "one entry per component")),
    "none": (lambda g: [], ("0 entries", "one entry per component")),
    "a number": (lambda g: (0.0,), ("a float",)),
    "another shape": (lambda g: (g,), ("of shape [3, 7, 8]", "(here [8] on cpu)")),
    "integers": (lambda g: (g.sum((0, 1)).long(),), ("int64",)),
    "another device": (lambda g: (g.sum((0, 1)).to("meta"),), ("on meta", "on cpu")),
}


@pytest.mark.parametrize("strategy", ["released", "retained"])
@pytest.mark.parametrize("kind", RULES)
def test_gradient_rule(kind: str, strategy: str) -> None:
    rule, parts = RULES[kind]
    mine = gains(gradient_rule=lambda self, components, call: rule)
    refused(mine, "Mine.gradient_rule", "blocks.2", *parts, strategy=strategy)


@pytest.mark.parametrize("returned", [None, (torch.zeros(8),)])
def test_a_gradient_rule_that_is_no_function(returned: Any) -> None:
    refused(gains(gradient_rule=lambda self, components, call: returned), "Mine.gradient_rule", "function of dl/dy")


SITES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a list": (lambda m, layers: list(layers.values()), ("a list", "a mapping")),
    "None": (lambda m, layers: None, ("None", "a mapping")),
    "empty": (lambda m, layers: {}, ("no module", "nothing would be perturbed")),
    "modules by number": (lambda m, layers: dict(enumerate(layers.values())), ("entry 0", "full names")),
    "no modules": (lambda m, layers: dict.fromkeys(layers), ("'blocks.0': None", "modules")),
    "a module of its own": (lambda m, layers: {"blocks.0": nn.Linear(8, 8)}, ("'blocks.0'", "Linear")),
    "short names": (lambda m, layers: {"0": m.blocks[0]}, ("'0'", "named_modules()")),
}


@pytest.mark.parametrize("kind", SITES)
def test_sites(kind: str) -> None:
    returned, parts = SITES[kind]
    mine = gains(sites=lambda self, model, layers: returned(model, layers))
    refuses(TINY.make(), ("Mine.sites", *parts), mine)


@pytest.mark.parametrize("returned", [lambda names: [0], lambda names: torch.arange(3), lambda names: ["a", "b", "c"]])
def test_groups(returned: Any) -> None:
    refused(gains(groups=lambda self, names: returned(names)), "Mine.groups", "one whole number per name")


@pytest.mark.parametrize(
    "returned", [lambda gs: gs[:2], lambda gs: gs[0], lambda gs: [g[:2] for g in gs], lambda gs: None]
)
def test_direction(returned: Any) -> None:
    refused(gains(direction=lambda self, gs: returned(gs)), "Mine.direction", "one tensor per gradient")


@pytest.mark.parametrize("wrap", [lambda a: a, RandomDirections])
def test_defaults_are_missed_where_they_are_needed(wrap: Any) -> None:
    methods = {name: getattr(Gains, name) for name in ("sites", "start", "apply")}
    bare: type[Auxiliary] = type("Bare", (OutputAuxiliary,), methods)
    refuses(TINY.make(), ("alpha was not given", "Bare", "default_alpha"), wrap(bare()), lam=0.1)
    for given, missing in (({"lam": 0.1}, "alpha"), ({"alpha": 0.1}, "lam")):
        with pytest.raises(ValueError, match=says(f"{missing} was not given", "Bare", f"default_{missing}")):
            LfURegularizer.paper(TINY.make(), wrap(bare()), **given)
    model = TINY.make()
    for given in ({}, {"alpha": 0.1, "lam": 0.1}):
        with LfURegularizer(model, wrap(bare()), **given) as reg:
            reg(model, TINY.batch(), TINY.loss).backward()


class Shifted(nn.Module):
    """Adds one to what every layer returns, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)).double()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).add_(1) if self.in_place else layer(x) + 1
        return x


def moved(make: Any, in_place: bool) -> list[Tensor]:
    model, x = Shifted(in_place), torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).double()
    with LfURegularizer(model, make(), alpha=0.1, lam=0.5, seed=0) as reg:
        reg(model, {"x": x}, lambda model, batch: model(batch["x"]).square().mean())
        parts = [p if isinstance(p, tuple) else (p,) for p in reg.perturbation.values()]
    return [part for pair in parts for part in pair]


@pytest.mark.parametrize("make", [Gains, lambda: SteeringVectors(relative=True)], ids=["default rule", "relative"])
def test_outputs_that_are_overwritten_are_not_read_in_the_backward(make: Any) -> None:
    """The gradient would be that of another output, without a word."""
    moved(make, in_place=False)
    with pytest.raises(ValueError, match=r"After layers\.2 .*wrote in place.*clone"):
        moved(make, in_place=True)


@pytest.mark.parametrize("make", [SteeringVectors, LoRADeltas])
def test_rules_that_read_no_output_are_exact_where_outputs_are_overwritten(make: Any) -> None:
    torch.testing.assert_close(moved(make, in_place=True), moved(make, in_place=False), rtol=1e-12, atol=1e-14)


def test_random_directions_name_what_they_are_of() -> None:
    mine = RandomDirections(gains(start=lambda self, call, generator: None))
    refused(mine, "RandomDirections(Mine).start", "a tuple")


def test_parameters_may_be_components() -> None:
    """Whether they require gradients is the user's business."""
    mine = gains(start=lambda self, call, generator: (self.own,))
    mine.own = nn.Parameter(torch.zeros(8, dtype=torch.float64))  # type: ignore[attr-defined]
    model = TINY.make()
    with LfURegularizer(model, mine) as reg:
        reg(model, TINY.batch(), TINY.loss).backward()
        assert all(bool(c.any()) for c in reg.perturbation.values())
    assert mine.own.requires_grad  # type: ignore[attr-defined]
    assert not mine.own.any()  # type: ignore[attr-defined]


def test_checks_read_no_value() -> None:
    """Tensors on the meta device have none, so whoever reads one, and on a GPU would wait for it, fails here."""
    y, c = torch.zeros(2, 3, 8, device="meta"), torch.zeros(8, device="meta")
    return_checks.check_components("Mine", (c,), "site", y)
    return_checks.check_output("Mine", y * (1 + c), "site", y, written=return_checks.versions(y, y) != (0, 0))
    return_checks.check_gradients("Mine", [c, None], "site", [(c.shape, c.device)] * 2)
    return_checks.check_direction("Mine", [c], [c])
    for changed in (y[:1], y.half(), None):
        with pytest.raises((TypeError, ValueError), match=r"Mine\.apply"):
            return_checks.check_output("Mine", changed, "site", y, written=False)
