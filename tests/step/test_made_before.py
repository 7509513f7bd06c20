"""What a layer is given: there before the layers ran, or made by one of them."""

from __future__ import annotations

import torch

from lfu_reg.step.made_before import LOOKS, MadeBefore


def test_plain_values_and_what_the_first_layer_is_given() -> None:
    mask = torch.ones(2)
    before = MadeBefore()
    before.begin([mask])
    assert before.holds(1, [None, True, 3, 0.5, "eager", torch.float32, torch.device("cpu"), mask])
    assert not before.holds(1, [object()])


def test_what_was_there_is_known_from_the_second_time_on() -> None:
    before = MadeBefore()
    for expected in (False, True, True):
        mask = torch.ones(2)
        before.begin([])
        assert before.holds(1, [None, mask]) is expected
        assert not before.holds(2, [None, torch.ones(2)])
        assert not before.holds(1, [None, mask.clone().requires_grad_()])
        before.forget()


def test_what_is_written_to_is_another_one() -> None:
    before, mask = MadeBefore(), torch.ones(2)
    before.begin([mask])
    assert before.holds(1, [mask])
    assert before.are_unwritten()
    mask += 1
    assert not before.are_unwritten()
    assert not before.holds(2, [mask])
    before.forget()
    before.begin([])
    assert not before.holds(1, [None, mask])
    before.begin([])
    mask += 1
    assert not before.holds(1, [None, mask])  # nor is its place learnt
    assert not before.holds(1, [None, mask])


def test_another_tensor_in_the_place_of_one_that_is_gone() -> None:
    before = MadeBefore()
    before.begin([])
    assert not before.holds(1, [torch.ones(1)])
    gone = torch.ones(1)
    before.begin([])
    place = id(gone)
    del gone
    others = []
    while not others or (id(others[-1]) != place and len(others) < 1000):
        others.append(torch.ones(1))
    assert id(others[-1]) == place
    assert not before.holds(1, [others[-1]])


def test_it_does_not_look_for_ever() -> None:
    before = MadeBefore()
    for _ in range(LOOKS + 1):
        before.begin([])
        assert not before.holds(1, [torch.ones(1)])
    mask = torch.ones(1)
    before.begin([])
    assert not before.holds(1, [mask])
