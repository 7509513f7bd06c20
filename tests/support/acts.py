"""What is asked of every example: each step is regularized, by more than nothing, and the model still learns."""

from __future__ import annotations

Steps = list[dict[str, float]]


def assert_acts(steps: Steps, *, at_least: int = 2) -> None:
    """The ratio of LfU's gradient to the loss's is between 0.1 and 10 at every step."""
    assert len(steps) >= at_least
    for number, step in enumerate(steps):
        assert 0.1 <= step["gradient_ratio"] <= 10, (number, step)


def assert_learns(steps: Steps) -> None:
    """The last third of the steps has a lower loss than the first."""
    losses = [step["sft_loss"] for step in steps]
    third = len(losses) // 3
    assert sum(losses[-third:]) < sum(losses[:third]), losses
