"""The step's own walk gives what torch's gives, also after the model has changed."""

from __future__ import annotations

import torch
from torch import nn

from lfu_reg.model.buffers import ForwardWatch
from lfu_reg.model.module_walk import modules_of, trained_parameters


def model() -> nn.Module:
    shared = nn.Linear(2, 2)
    made = nn.Sequential(
        nn.ModuleList([shared, nn.Sequential(shared, nn.BatchNorm1d(2))]), nn.ModuleDict({"a": shared})
    )
    made.register_module("nothing", None)
    made[1].above = nn.Identity()
    return made


def test_the_same_modules_in_the_same_order() -> None:
    made = model()
    assert modules_of(made) == list(made.modules())


def test_a_module_in_a_circle_comes_once() -> None:
    made = model()
    made[1].a.back = made
    assert modules_of(made) == list(made.modules())


def test_scripted_modules() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2))))
    held = nn.Sequential(scripted)
    assert [id(module) for module in modules_of(held)] == [id(module) for module in held.modules()]


def test_the_same_trained_parameters_under_the_same_names() -> None:
    made = model()
    made[1].a.weight.requires_grad_(False)
    made[1].above = nn.Linear(2, 2)
    made.tied = nn.Linear(2, 2, bias=False)
    made.tied.weight = made[1].above.weight
    made.register_parameter("none", None)
    expected = [(name, id(p)) for name, p in made.named_parameters() if p.requires_grad]
    assert len(expected) == 5
    assert [(name, id(p)) for name, p in trained_parameters(made).items()] == expected


def test_buffers_that_come_up_in_a_forward_are_noticed() -> None:
    made = model()
    watch = ForwardWatch(made)
    new = nn.BatchNorm1d(2)
    made.append(new)  # a module that was not there
    made[1].a.register_buffer("late", torch.ones(1))  # a buffer of one that had none
    names = [(module, name) for module, name in watch.changed()[0]]
    assert (made[1].a, "late") in names
    assert {(new, name) for name in new._buffers} <= set(names)
