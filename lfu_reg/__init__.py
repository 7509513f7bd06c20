"""Learning-from-the-Undesirable (LfU) for any PyTorch fine-tuning loop.

    from lfu_reg import LfURegularizer

    reg = LfURegularizer(model)
    loss = reg(model, batch, sft_loss_fn)  # was: loss = sft_loss_fn(model, batch)

Nam, Kim, Jeong: "Learning from the Undesirable: Robust Adaptation of Language Models without Forgetting", AAAI 2026,
arXiv 2511.13052.
"""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # which nothing here needs
    import torch  # noqa: F401

from lfu_reg.auxiliaries import (
    Auxiliary,
    LoRADeltas,
    OutputAuxiliary,
    RandomDirections,
    SteeringVectors,
    WeightDeltas,
)
from lfu_reg.diagnostics import LfUWarning
from lfu_reg.distances import MSE, Contrastive, Cosine, Distance, LogitKL, PerLayerDistance
from lfu_reg.regularizer import LfURegularizer

__version__ = "0.1.0"

__all__ = [
    "MSE",
    "Auxiliary",
    "Contrastive",
    "Cosine",
    "Distance",
    "LfURegularizer",
    "LfUWarning",
    "LoRADeltas",
    "LogitKL",
    "OutputAuxiliary",
    "PerLayerDistance",
    "RandomDirections",
    "SteeringVectors",
    "WeightDeltas",
]
