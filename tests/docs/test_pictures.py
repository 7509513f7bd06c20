"""The code of docs/pictures.md runs; what logs elsewhere is stood in for, and is called with every figure."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils.data import DataLoader

from lfu_reg.integrations.history import History
from tests.support.cases import plain_loss, seeded, token_batch
from tests.support.plain_models import TinyLM

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pictures.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
FIGURES = {"lfu/sft_loss", "lfu/consistency_loss", "lfu/gradient_ratio", "lfu/distance/blocks.0", "lfu/lam"}

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*num_workers.*"),
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*"),
]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    model = seeded(TinyLM).float()
    found = {
        "model": model,
        "loader": [token_batch(seed) for seed in range(2)],
        "sft_loss_fn": plain_loss,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "__name__": "page",
    }
    run(found, "history.record(reg)")
    return found


def run(names: dict[str, Any], mark: str) -> None:
    """Execute the block of the page that has this in it."""
    (block,) = [block for block in BLOCKS if mark in block]
    exec(compile(block, str(PAGE), "exec"), names)


def test_one_picture(names: dict[str, Any]) -> None:
    assert len(names["history"].rows) == 2
    assert Path("lfu.png").exists()


def test_tensorboard(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda folder: writer))
    run(names, "SummaryWriter")
    logged = {call.args[0]: call.args[1:] for call in writer.add_scalar.call_args_list}
    assert set(logged) >= FIGURES
    assert all(isinstance(value, float) and step == 0 for value, step in logged.values())
    assert writer.add_figure.call_args.args[1].axes


def test_weights_and_biases(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logged = MagicMock()
    there = SimpleNamespace(init=lambda project: SimpleNamespace(log=logged, finish=lambda: None), Image=lambda of: of)
    monkeypatch.setitem(sys.modules, "wandb", there)
    run(names, "import wandb")
    assert set(logged.call_args_list[0].args[0]) >= FIGURES
    assert logged.call_args_list[-1].args[0] == {"history": "lfu.png"}


def test_the_trainer(names: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=16, num_hidden_layers=2, **sizes)
    names["model"] = transformers.LlamaForCausalLM(config)
    names["data"] = [{"input_ids": [row, 2, 3, 4], "labels": [row, 2, 3, 4]} for row in range(8)]
    names["args"] = transformers.TrainingArguments(
        "out", max_steps=2, logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    run(names, "TrainerCallback")
    assert _steps(names) == [1, 2]
    assert Path("trainer.png").exists()
    logged = {name for log in names["trainer"].state.log_history for name in log}
    by_itself = {name.removeprefix("lfu/") for name in logged if name.startswith("lfu/")}
    listed = [row for row in PAGE.read_text().splitlines() if "train/lfu/..." in row]
    assert by_itself == {name for row in listed for name in re.findall(r"`(\w+)`", row)}


def test_lightning(names: dict[str, Any]) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = names["model"]

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            return plain_loss(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    names["module"] = Module()
    names["loader"] = DataLoader(names["loader"], batch_size=None)
    run(names, "L.Callback")
    assert _steps(names) == [1, 2]
    assert Path("lightning.png").exists()


def _steps(names: dict[str, Any]) -> list[int]:
    history: History = names["history"]
    assert all("distance/" in " ".join(row) for row in history.rows)
    return [row["step"] for row in history.rows]
