"""What every table and figure compares, declared: rows, training sets, and what is measured afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from paper.settings import Protocol

Measured = Literal["tasks", "variations", "similarity", "attack"]


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        label: the method, as in the table.
        method: key in `train.method_of`; "vanilla" trains nothing.
        settings: its hyperparameters; alpha and lambda that are not here come from the model.
        setting: the table's words for them.
        lr_factor: of the protocol's learning rate.
        seed_shift: of the protocol's seed.
    """

    label: str
    method: str = "sft"
    settings: dict[str, Any] = field(default_factory=dict)
    setting: str = ""
    lr_factor: float = 1.0
    seed_shift: int = 0

    def protocol(self, protocol: Protocol) -> Protocol:
        """The protocol at this row's learning rate and seed."""
        return replace(protocol, lr=protocol.lr * self.lr_factor, seed=protocol.seed + self.seed_shift)


@dataclass(frozen=True)
class Table:
    """A table or figure.

    Attributes:
        what: one line.
        data: training sets, those of the paper's main part first.
        rows: methods.
        measured: what is measured after training.
    """

    what: str
    data: tuple[str, ...]
    rows: tuple[Row, ...]
    measured: Measured = "tasks"


VANILLA, SFT = Row("Vanilla", "vanilla"), Row("SFT")
NEFTUNE, GEM = Row("NEFTune", "neftune", {"noise_alpha": 5.0}), Row("GEM", "gem", {"beta": 0.7})
IM, SDFT, LFU = Row("IM", "im"), Row("SDFT", "sdft"), Row("LfU", "lfu")
METHODS = (SFT, NEFTUNE, GEM, IM, SDFT, LFU)


def _lfu(setting: str, **settings: Any) -> Row:
    return Row("LfU", "lfu", settings, setting)


TABLE_5A = (
    _lfu("lam=5 alpha=0.1 layers=all", lam=5.0, alpha=0.1),
    replace(SFT, setting="lam=0"),
    *(_lfu(f"lam={lam:g} alpha=0.1", lam=lam, alpha=0.1) for lam in (0.1, 1.0, 10.0)),
    *(_lfu(f"lam=5 alpha={alpha:g}", lam=5.0, alpha=alpha) for alpha in (0.001, 0.01, 0.5)),
)
TABLE_5B = tuple(
    _lfu(f"lam=5 alpha=0.1 layers={part}", lam=5.0, alpha=0.1, layers=part) for part in ("early", "middle", "late")
)
# The paper gives no weights for the feature norms; these are ours.
TABLE_6 = {
    "6a": SFT,
    "6b": Row("SAM-like (loss at theta + alpha g/|g|)", "sam"),
    "6c": Row("feature L1", "feature-l1", {"lam": 0.01}),
    "6d": Row("feature L2", "feature-l2", {"lam": 0.01}),
    "6e": Row("logit KL", "logit-kl"),
    "6f": LFU,
}
TABLES: dict[str, Table] = {
    "1": Table("Fine-tuning on one task", ("gsm8k", "arc_challenge"), (VANILLA, *METHODS)),
    "2": Table("Fine-tuning on instructions", ("dolly", "lima"), (VANILLA, *METHODS)),
    "3": Table("Time of a step", ("gsm8k",), (SFT, replace(LFU, label="LfU LoRA"), Row("LfU RepS", "lfu-steering"))),
    "4": Table("Five adversarial steps afterwards", ("beavertails",), METHODS, "attack"),
    "5a": Table("alpha and lambda", ("gsm8k",), TABLE_5A),
    "5b": Table("Which layers", ("gsm8k",), TABLE_5B),
    **{key: Table("Other regularizers", ("gsm8k",), (row,)) for key, row in TABLE_6.items()},
    "figure5": Table("Prompt variations", ("gsm8k",), METHODS, "variations"),
    "figure6": Table("Hidden states under noise", ("gsm8k",), (VANILLA, *METHODS), "similarity"),
}
GROUPS = {"all": tuple(TABLES), "6": tuple(TABLE_6)}


def with_sft_grid(table: Table) -> Table:
    """The table with SFT at half, once and twice the learning rate, three seeds each, after its own rows."""
    if not any(row.method == "sft" for row in table.rows):
        return table
    grid = tuple(
        Row("SFT", setting=f"lr x {factor:g}, seed + {shift}", lr_factor=factor, seed_shift=shift)
        for factor in (0.5, 1.0, 2.0)
        for shift in range(3)
        if (factor, shift) != (1.0, 0)  # the table's own row
    )
    return replace(table, rows=(*table.rows, *grid))
