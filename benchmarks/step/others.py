"""Methods whose cost is measured beside LfU's, on top of those that `lfu-reg overhead` knows."""

from __future__ import annotations

from functools import partial

from methods.authors_steering import AuthorsSteering
from methods.neftune import NEFTune
from methods.r_drop import RDrop
from methods.sam import SAM

from lfu_reg.cli.published import Procedure

OTHERS = {
    "authors-steering": Procedure("authors' steering procedure", AuthorsSteering),
    "neftune": Procedure("NEFTune", NEFTune),
    "r-drop": Procedure("R-Drop", partial(RDrop, needs_dropout=False)),
    "sam": Procedure("SAM", SAM),
}
