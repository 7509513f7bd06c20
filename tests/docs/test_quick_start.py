"""docs/quick-start.md runs as it stands, with a tiny model under the name that it loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.test_recipes import blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quick-start.md"
NAME = '"Qwen/Qwen3-0.6B"'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved Llama with a tokenizer of characters."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    characters = {token: number for number, token in enumerate(["<pad>", "<eos>", *" 0123456789+="])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(characters, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    config = transformers.LlamaConfig(
        vocab_size=len(characters), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    tokenizer.save_pretrained(tmp_path / "model")
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_quick_start_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("accelerate", "trl", "datasets"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    first, loop, *trainers = blocks(PAGE.read_text())
    assert NAME in first
    names: dict[str, object] = {"__name__": "quick_start"}
    exec(compile(first.replace(NAME, repr(str(folder))), str(PAGE), "exec"), names)
    exec(compile(loop, str(PAGE), "exec"), names)
    assert float(names["reg"].metrics["consistency_loss"]) > 0  # type: ignore[attr-defined]
    assert len(trainers) == 2
    for block in trainers:
        exec(compile(block, str(PAGE), "exec"), names)
        assert names["trainer"].state.log_history[0]["lfu/consistency_loss"] > 0  # type: ignore[attr-defined]
