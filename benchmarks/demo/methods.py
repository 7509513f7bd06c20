"""What the demo compares: plain fine-tuning and the flavours of LfU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from lfu_reg import LfURegularizer, LoRADeltas, SteeringVectors, WeightDeltas

BASELINE = "sft"


Auxiliary = LoRADeltas | SteeringVectors | WeightDeltas


@dataclass(frozen=True)
class Method:
    """A way to fine-tune. `alpha` and `lam` at None are the library's defaults, i.e. the paper's values."""

    key: str
    label: str
    auxiliary: Callable[[], Auxiliary] | None = None  # None: plain fine-tuning
    alpha: float | None = None
    lam: float | None = None

    def regularizer(self, model: nn.Module, seed: int) -> LfURegularizer | None:
        """Attaches this method's regularizer to the model, if it has one."""
        if self.auxiliary is None:
            return None
        return LfURegularizer(model, self.auxiliary(), alpha=self.alpha, lam=self.lam, seed=seed)

    def settings(self) -> dict[str, float | None]:
        """The values of alpha and lambda, None for plain fine-tuning."""
        if self.auxiliary is None:
            return {"alpha": None, "lam": None}
        defaults = self.auxiliary()
        return {
            "alpha": defaults.default_alpha if self.alpha is None else self.alpha,
            "lam": defaults.default_lam if self.lam is None else self.lam,
        }


METHODS: dict[str, Method] = {
    method.key: method
    for method in (
        Method(BASELINE, "SFT"),
        Method("lfu-lora", "LfU (LoRA)", LoRADeltas),
        Method("lfu-lora-paper", "LfU (LoRA, paper's)", LoRADeltas, alpha=0.1, lam=5.0),
        Method("lfu-steering", "LfU (steering)", SteeringVectors),
        Method("lfu-relative", "LfU (relative steering)", lambda: SteeringVectors(relative=True)),
        Method("lfu-weights", "LfU (weights)", WeightDeltas),
    )
}
DEFAULT_METHODS = (BASELINE, "lfu-lora", "lfu-steering")

# alpha and lambda for the embedded model, as sweep.py chose them; docs/demo-settings.md shows the whole sweep.
CHOSEN: dict[str, tuple[float, float]] = {
    "lfu-lora": (0.01, 0.05),
    "lfu-steering": (0.1, 0.1),
    "lfu-relative": (0.03, 0.01),
}


def with_chosen_settings(method: Method) -> Method:
    """The method with the sweep's alpha and lambda, where the sweep covers it."""
    if method.key not in CHOSEN:
        return method
    alpha, lam = CHOSEN[method.key]
    return replace(method, alpha=alpha, lam=lam)
