"""Trains the demo's small model: `python -m demo.pretrain` in benchmarks/.

A 0.87 M-parameter Llama over single characters learns the six skills of skills.py from generated
examples of their train split. Weights, tokenizer and the log of the run (one JSON object a line) go to
benchmarks/demo/model/.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.data import batches_by_length, encode
from demo.eval import score
from demo.loop import parse, train
from demo.skills import SKILLS, Example, draw_item, mixed_format_examples, render

MODEL_FOLDER = Path(__file__).parent / "model"
SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
SHARES = {"add": 3, "subtract": 3}  # arithmetic takes longest to learn; the other skills count once
CAPITALISED = 0.25  # share of prompts that start with a capital letter


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and line break; every other character is <unk>."""
    characters = sorted(set(string.printable) - set("\t\r\x0b\x0c"))
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *characters))}
    # Byte-pair encoding without merges splits text into characters.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    pad, eos, unk = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, unk_token=unk)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def small_llama(
    tokenizer: PreTrainedTokenizerFast, *, hidden: int = 128, intermediate: int = 384, layers: int = 4, heads: int = 4
) -> LlamaForCausalLM:
    """An untrained model for the tokenizer; the default sizes are the demo's."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def training_example(rng: random.Random) -> Example:
    """A random skill, item and format; some prompts get a capital letter, so that those are known too."""
    (skill,) = rng.choices(list(SKILLS.values()), weights=[SHARES.get(name, 1) for name in SKILLS])
    prompt_format = rng.choice(skill.formats)
    if rng.random() < CAPITALISED:
        prompt_format = prompt_format[0].upper() + prompt_format[1:]
    return render(skill, draw_item(skill, "train", rng), prompt_format)


def training_batches(tokenizer: PreTrainedTokenizerFast, size: int, rng: random.Random) -> Iterator[dict[str, Tensor]]:
    """Endless batches; 16 at a time are drawn together and sorted by length, which spares padding."""
    while True:
        rows = [encode(tokenizer, training_example(rng), 128) for _ in range(16 * size)]
        batches = list(batches_by_length(rows, size, tokenizer.pad_token_id, torch.device("cpu")))
        rng.shuffle(batches)
        yield from batches


def skill_accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, float]:
    """Exact-match accuracy of every skill on validation items."""
    rng = random.Random("validation")
    return {
        name: score(model, tokenizer, mixed_format_examples(skill, "validation", count, rng)).exact
        for name, skill in SKILLS.items()
    }


def pretrain(args: argparse.Namespace) -> None:
    """Trains, logs and saves."""
    torch.manual_seed(args.seed)
    tokenizer = character_tokenizer()
    model = small_llama(tokenizer)
    batches = training_batches(tokenizer, args.batch_size, random.Random(args.seed))
    train(model, batches, args, lambda count: skill_accuracy(model, tokenizer, count))
    model.save_pretrained(args.out)
    save_tokenizer(tokenizer, args.out)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    pretrain(parse(argv, __doc__ or "", steps=5000, batch_size=64, lr=6e-3, log_every=500, out=MODEL_FOLDER))


if __name__ == "__main__":
    main()
