"""One step of the first example, for an environment that has torch alone."""

import torch
from torch import nn

from lfu_reg import LfURegularizer

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
batch = {"x": torch.randn(5, 4), "y": torch.randint(3, (5,))}

with LfURegularizer(model, layers=["0", "2"]) as reg:
    loss = reg(model, batch, lambda model, batch: nn.functional.cross_entropy(model(batch["x"]), batch["y"]))
    loss.backward()
assert all(parameter.grad is not None for parameter in model.parameters())
