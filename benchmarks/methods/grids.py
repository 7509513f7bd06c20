"""Strengths that are worth trying, method by method, from weak to strong; the learning rate is to be tuned with each.

A method that is missing here has no strength of its own: its only dial is the learning rate (DFT, EAFT, TALR), or its
grid is in `evidence.grids`. Every grid has the paper's value where the paper has one. "steering-only" wants learning
rates some fifty times those of an adapter. DFT raises mean probabilities and STM looks at some tokens only, so the SFT
loss may rise while their own falls: compare by more than that loss.
"""

from __future__ import annotations

from typing import Any

_STRENGTHS: tuple[dict[str, Any], ...] = ({"strength": 0.3}, {"strength": 1.0}, {"strength": 3.0})

GRIDS: dict[str, tuple[dict[str, Any], ...]] = {
    # From Table 3 of the paper, which keeps 76 % of the tokens at its choice of 2.5. A base model that the data
    # surprises more keeps fewer: the text model of the evidence 3.6 % of 64 GSM8K examples.
    "stm": ({"threshold": 1000.0}, {"threshold": 25.0}, {"threshold": 2.5}),
    # Multiples of the median loss, which is the paper's choice.
    "flow": ({"temperature": 2.0}, {"temperature": 1.0}, {"temperature": 0.5}),
    # The authors' example has 0.05.
    "asft": ({"weight": 0.02}, {"weight": 0.05}, {"weight": 0.2}),
    "kl-to-base": ({"weight": 0.01}, {"weight": 0.1}, {"weight": 1.0}),
    "l2-sp": ({"weight": 0.001}, {"weight": 0.01}, {"weight": 0.1}),
    # Costs no training of its own: `WiSEFT.scale_to` serves all of them after one run.
    "wise-ft": ({"scale": 0.9}, {"scale": 0.7}, {"scale": 0.5}),
    # Controls.
    "extra-gradient": _STRENGTHS,
    "lfu-negative": _STRENGTHS,
    "extra-random-gradient": _STRENGTHS,
}
