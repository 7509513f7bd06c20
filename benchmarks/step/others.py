"""Methods whose cost is measured beside LfU's, on top of those that `lfu-reg overhead` knows."""

from __future__ import annotations

from functools import partial
from itertools import repeat

from methods.base import Batch, LossFunction
from methods.neftune import NEFTune
from methods.r_drop import RDrop
from methods.sam import SAM
from paper.published_steering import PublishedSteering
from paper.states import names_of
from torch import Tensor, nn

from lfu_reg.cli.published import Procedure


class AuthorsSteering(PublishedSteering):
    """The published procedure where there is one batch: another one of its shape would cost the same.

    Args:
        model: with embeddings, blocks and a last norm, whose states are compared.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, iter(()), names_of(model, "hidden-states"))

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """The loss of one batch; moves the vectors."""
        self.others = repeat(batch)
        return super().__call__(model, batch, sft_loss_fn)


OTHERS = {
    "authors-steering": Procedure("authors' steering procedure", AuthorsSteering),
    "neftune": Procedure("NEFTune", NEFTune),
    "r-drop": Procedure("R-Drop", partial(RDrop, needs_dropout=False)),
    "sam": Procedure("SAM", SAM),
}
