"""Loops of image models: convolutions without linear maps, losses written to in place, noise drawn in the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from lfu_reg import LfURegularizer
from tests.loops.judge import assert_exact

NO_BLOCKS, NO_LINEARS = "has no repeated blocks", "The chosen layers"


def images(number: int = 4, size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(number, channels, size, size, dtype=torch.float64)


def labelled() -> tuple[Tensor, Tensor]:
    return images(), torch.randint(5, (4,))


def classify(model: Any, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


class Digits(nn.Module):
    """Two convolutions and two linear maps, as single layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.drop, self.fc1, self.fc2 = nn.Dropout(0.25), nn.Linear(24, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.conv2(torch.relu(self.conv1(x)))), 2)
        scores: Tensor = self.fc2(torch.relu(self.fc1(self.drop(x.flatten(1)))))
        return scores


def test_single_layers() -> None:
    axis = lambda layer: 1 if "conv" in layer else -1  # noqa: E731
    assert_exact(Digits, labelled, classify, channel_axis=axis, told=[f"Digits {NO_BLOCKS}"])


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y += x
        out: Tensor = self.act(y)
        return out


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
        self.layer1, self.layer2 = (nn.Sequential(Residual(6), Residual(6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))
        return scores


def test_blocks_without_linear_maps_and_a_loss_divided_in_place() -> None:
    def halved(loss: Tensor) -> Tensor:
        loss /= 2
        return loss

    assert_exact(ResNet, labelled, classify, channel_axis=1, told=[NO_LINEARS], finish=halved)


class Task(nn.Module):
    """A model and its loss, returned in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.DataParallel(ResNet())  # without a device it calls the model as it is

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        scores = self.trained(x)
        return {"loss": cross_entropy(scores, y), "output": scores}


def test_a_model_that_returns_its_loss_and_a_wrapper_without_devices() -> None:
    loss = lambda task, batch: task(*batch)["loss"]  # noqa: E731
    assert_exact(Task, labelled, loss, channel_axis=1, told=[NO_LINEARS])


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.mean, self.spread = nn.Linear(12, 9), nn.Linear(9, 3), nn.Linear(9, 3)
        self.fc3, self.fc4 = nn.Linear(3, 9), nn.Linear(9, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.relu(self.fc1(x))
        mean, spread = self.mean(h), self.spread(h)
        z = mean + torch.randn_like(mean) * (spread / 2).exp()
        return self.fc4(torch.relu(self.fc3(z))), mean, spread


def test_noise_in_the_model_and_a_sum_of_losses() -> None:
    def loss(model: Any, x: Tensor) -> Tensor:
        again, mean, spread = model(x)
        return mse_loss(again, x, reduction="sum") - 0.5 * (1 + spread - mean.square() - spread.exp()).sum()

    assert_exact(VAE, lambda: torch.rand(5, 12, dtype=torch.float64), loss, told=[f"VAE {NO_BLOCKS}"])


class Down(nn.Module):
    """Returns its hidden state, and once more among those that skip to the other side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.time = nn.Conv2d(width, width, 3, padding=1), nn.Linear(4, width)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        h = x + torch.tanh(self.conv(x) + self.time(time)[:, :, None, None])
        return h, (x, h)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)
        self.down = nn.ModuleList(Down(6) for _ in range(2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h, skips = self.inp(x), []
        for block in self.down:
            h, kept = block(h, time)
            skips += kept
        out: Tensor = self.out(h + sum(skips))
        return out


def test_noise_in_the_loss_and_a_state_returned_twice() -> None:
    def loss(model: Any, x: Tensor) -> Tensor:
        noise, time = torch.randn_like(x), torch.rand(len(x), 4, dtype=x.dtype)
        return mse_loss(model(x + noise, time), noise)

    # The oracle moves the first of the two only, which LoRA's linear maps are not concerned by.
    assert_exact(UNet, images, loss, channel_axis=1, auxiliaries=["lora"])


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1, bias=False)  # noqa: E731
        layers = conv(3, 5), nn.LeakyReLU(0.2, inplace=True), conv(5, 6), nn.BatchNorm2d(6), nn.LeakyReLU(0.2)
        self.main = nn.Sequential(*layers, conv(6, 1), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.main(x)).flatten()


def test_one_of_two_models_that_train_each_other() -> None:
    bce = nn.functional.binary_cross_entropy
    batch = lambda: (images(), torch.ones(4, dtype=torch.float64))  # noqa: E731
    assert_exact(Discriminator, batch, lambda model, b: bce(model(b[0]), b[1]), channel_axis=1, told=[NO_LINEARS])


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")
@pytest.mark.parametrize("auxiliary", ["lora", "steering", "weights", "random"])
def test_a_regularizer_per_epoch(auxiliary: Any) -> None:
    """The two lines in the function that trains an epoch; what it keeps does not hold on to the regularizer."""
    model, kept = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)), nn.Linear(6, 5)), []

    def train(loader: Any) -> None:
        reg = LfURegularizer(model, auxiliary)
        for batch in loader:
            loss = reg(model, batch, classify)
            loss.backward()
            kept.append((loss, reg.metrics))

    for _ in range(3):
        train([(torch.randn(4, 6), torch.randint(5, (4,)))] * 2)
    assert all("ascent_grad_norm" in metrics for _, metrics in kept)
    with LfURegularizer(model, auxiliary), pytest.raises(RuntimeError, match="already has"):
        LfURegularizer(model, auxiliary)


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")
def test_a_copy_of_the_logits_for_the_accuracy() -> None:
    """A closure keeps those of the first pass, and the loop never sees those of the second."""
    model, kept = ResNet().double(), []
    batch = labelled()
    with LfURegularizer(model) as reg:

        def loss(model: Any, batch: Any) -> Tensor:
            scores = model(batch[0])
            if not reg.is_second_pass:
                kept.append(scores.detach())
            return cross_entropy(scores, batch[1])

        reg(model, batch, loss).backward()
    (scores,) = kept
    assert torch.equal(scores, model(batch[0]).detach())
