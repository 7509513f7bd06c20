"""GEM (Li et al., 2024, arXiv 2408.16673): fine-tuning as a game that keeps the output distribution's entropy.

    min_f  E_y E_{y' ~ q} [ log f(y') - log f(y) ],    q = softmax(log f / beta), no gradient through q

with h linear, the paper's default.
"""

from __future__ import annotations

from torch import Tensor, nn

from methods.base import Batch, LossFunction, Method
from methods.predictions import predictions


class GEM(Method):
    """GEM in the place of cross-entropy.

    Args:
        model: what is fine-tuned.
        beta: temperature of q, in (0, 1]; the paper's is 0.7.
    """

    def __init__(self, model: nn.Module, beta: float = 0.7) -> None:
        super().__init__(model)
        if not 0 < beta <= 1:
            raise ValueError(f"beta={beta!r}; allowed are numbers above 0 and up to 1.")
        self.beta = beta

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """Mean over response tokens."""
        found = predictions(model, batch, sft_loss_fn)
        log_f = found.logits.log_softmax(-1)
        q = (log_f.detach() / self.beta).softmax(-1)
        log_f_target = log_f.gather(1, found.targets[:, None])
        return (q * (log_f - log_f_target)).sum() / max(len(q), 1)
