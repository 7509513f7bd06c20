"""An image classifier: a convolution net with residual blocks reads handwritten digits (scikit-learn's)."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lfu_reg import LfURegularizer

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images[:512], dtype=torch.float32)[:, None] / 16
classes = torch.tensor(digits.target[:512])


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        convolution = [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        self.inner = nn.Sequential(*convolution, nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))

    def forward(self, x):
        return torch.relu(x + self.inner(x))


model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.Sequential(*(Block(16) for _ in range(4))),  # the layers that LfU takes: the repeated blocks
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(16, 10),
).train()


def loss_fn(model, batch):
    images, classes = batch
    return nn.functional.cross_entropy(model(images), classes)


optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loader = DataLoader(TensorDataset(images, classes), batch_size=64, shuffle=True)
with LfURegularizer(model, "steering") as reg:  # LoRA needs linear maps, as a vision transformer has them
    for batch in loader:
        loss = reg(model, batch, loss_fn)  # was: loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {reg.metrics['sft_loss']:.2f}, gradient ratio {reg.metrics['gradient_ratio']:.2f} (good: 0.1-10)")
