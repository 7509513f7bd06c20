"""Makes the base model of the evidence: `python -m evidence.pretrain` in benchmarks/.

A Llama of about 2 M parameters on a byte-pair vocabulary of 2048, trained on novels and WikiText (half of the tokens)
and on the generated skills of skills.py (the other half). Weights go to the cache folder in float32, and as float16
(under 5 MB) with the log of the run to benchmarks/evidence/base_model/.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from demo.eval import score
from demo.loop import parse, train
from demo.pretrain import save_tokenizer, small_llama
from demo.skills import mixed_format_examples
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from evidence.corpus import novels, wikitext
from evidence.skills import BASE_SKILLS, skill_example

OUT = Path(__file__).parent / "base_model"
CACHE = Path(os.environ.get("LFU_CACHE", Path.home() / ".cache" / "lfu_reg"))
PAD, EOS = "<pad>", "<eos>"
LENGTH = 256


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every digit is a token of its own, so that numbers are spelled alike everywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=[PAD, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    inputs = ["input_ids", "attention_mask"]  # transformers 4 makes token_type_ids as well, which no Llama takes
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, model_input_names=inputs)


def text_rows(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[list[int]]:
    """Pieces of LENGTH tokens, from all texts in random order; endless."""
    encoded: list[int] = []
    for text in (*novels("train"), wikitext("valid")):
        for start in range(0, len(text), 100_000):
            encoded += tokenizer(text[start : start + 100_000])["input_ids"]
        encoded.append(tokenizer.eos_token_id)
    tokens = torch.tensor(encoded, dtype=torch.int16)
    del encoded
    while True:
        start = rng.randrange(len(tokens) - LENGTH)
        yield tokens[start : start + LENGTH].tolist()


def skill_rows(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[list[int]]:
    """Skill examples one after the other, LENGTH tokens at a time; endless."""
    row: list[int] = []
    while True:
        examples = [skill_example(rng) for _ in range(256)]
        # Prompt and response are encoded apart, as fine-tuning and scoring do.
        prompts = tokenizer([e.prompt for e in examples])["input_ids"]
        responses = tokenizer([e.response for e in examples])["input_ids"]
        for prompt, response in zip(prompts, responses, strict=True):
            row += [*prompt, *response, tokenizer.eos_token_id]
            while len(row) >= LENGTH:
                yield row[:LENGTH]
                row = row[LENGTH:]


def batches(tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Half text, half skills."""
    rng = random.Random(seed)
    text, skills = text_rows(tokenizer, rng), skill_rows(tokenizer, rng)
    while True:
        rows = [next(text if i % 2 else skills) for i in range(size)]
        ids = torch.tensor(rows)
        yield {"input_ids": ids, "labels": ids}


def accuracies(model: nn.Module, tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, float]:
    """Exact-match accuracy of every skill, on held-out items where there are any."""
    rng = random.Random("validation")
    result = {}
    for name, skill in BASE_SKILLS.items():
        if name in ("town", "trade"):
            examples = [skill_example(rng, {name: skill}) for _ in range(count)]
        else:
            examples = mixed_format_examples(skill, "validation", count, rng)
        result[name] = score(model, tokenizer, examples).exact
    return result


def pretrain(args: argparse.Namespace) -> None:
    """Trains, logs and saves."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    sample = [next(iter([text]))[:400_000] for text in novels("train")]
    skills = [f"{e.prompt}{e.response}" for e in (skill_example(rng) for _ in range(40_000))]
    tokenizer = train_tokenizer([*sample, wikitext("valid"), *skills])
    model = small_llama(tokenizer, hidden=160, intermediate=448, layers=6, heads=5)
    CACHE.mkdir(parents=True, exist_ok=True)
    data = batches(tokenizer, args.batch_size, args.seed)
    train(model, data, args, lambda count: accuracies(model, tokenizer, count))
    model.save_pretrained(CACHE / "evidence-base")
    tokenizer.save_pretrained(CACHE / "evidence-base")
    model.half().save_pretrained(args.out)
    save_tokenizer(tokenizer, args.out)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    pretrain(parse(argv, __doc__ or "", steps=1600, batch_size=16, lr=8e-3, log_every=200, out=OUT))


if __name__ == "__main__":
    main()
