"""Trains the demo's small model: `python -m demo.pretrain` in benchmarks/.

A 0.87 M-parameter Llama over single characters learns the six skills of skills.py from generated
examples of their train split. Weights, tokenizer and the log of the run (one JSON object a line) go to
benchmarks/demo/model/.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import string
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.data import batches_by_length, encode
from demo.eval import score
from demo.muon import Muon
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


def small_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
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


def make_optimizers(model: nn.Module, lr: float, steps: int) -> list[tuple[Optimizer, LambdaLR]]:
    """Muon for the hidden layers' matrices, AdamW for embeddings and norms; warm-up, then linear decay."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (1 - step / (steps + 1))

    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [Muon(hidden, lr), torch.optim.AdamW(others, lr / 2, betas=(0.9, 0.98), weight_decay=0.0)]
    return [(optimizer, LambdaLR(optimizer, factor)) for optimizer in optimizers]


def pretrain(args: argparse.Namespace) -> None:
    """Trains, logs and saves."""
    torch.manual_seed(args.seed)
    tokenizer = character_tokenizer()
    model = small_llama(tokenizer)
    optimizers = make_optimizers(model, args.lr, args.steps)
    batches = training_batches(tokenizer, args.batch_size, random.Random(args.seed))
    args.out.mkdir(parents=True, exist_ok=True)
    started, losses, tokens = time.perf_counter(), [], 0
    with (args.out / "pretrain_log.jsonl").open("w", encoding="utf-8") as log:

        def write(**entry: Any) -> None:
            log.write(json.dumps(entry) + "\n")
            log.flush()

        write(
            event="start",
            parameters=sum(p.numel() for p in model.parameters()),
            settings={key: value for key, value in vars(args).items() if key != "out"},
            torch=torch.__version__,
            python=platform.python_version(),
        )
        bar = tqdm(range(1, args.steps + 1), desc="pretraining", unit="step")
        for step in bar:
            batch = next(batches)
            loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in optimizers:
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
            tokens += int(batch["attention_mask"].sum())
            if step % args.log_every == 0 or step == args.steps:
                accuracy = skill_accuracy(model, tokenizer, 1000 if step == args.steps else 100)
                write(
                    event="end" if step == args.steps else "progress",
                    step=step,
                    seconds=round(time.perf_counter() - started, 1),
                    examples=step * args.batch_size,
                    tokens=tokens,
                    loss=round(sum(losses) / len(losses), 5),
                    validation_accuracy={name: round(value, 4) for name, value in accuracy.items()},
                )
                losses.clear()
                bar.set_postfix_str(" ".join(f"{name} {value:.2f}" for name, value in accuracy.items()))
    model.save_pretrained(args.out)
    save_tokenizer(tokenizer, args.out)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=500)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    pretrain(args)


if __name__ == "__main__":
    main()
