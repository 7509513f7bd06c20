"""Gradient accumulation in which every token has the same weight, mixed precision, clipping and a schedule."""

import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from lfu_reg import LfURegularizer

torch.manual_seed(0)
name = "benchmarks/evidence/base_model"  # 2.2 M parameters; or "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name).float()
rows = [json.loads(line) for line in Path("benchmarks/demo/data/svamp.jsonl").read_text().splitlines()[:32]]


def encode(row):
    prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


device = "cuda" if torch.cuda.is_available() else "cpu"
amp = torch.float16 if device == "cuda" else torch.bfloat16
scaler = torch.amp.GradScaler(device, enabled=amp == torch.float16)
model.to(device).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
loader = DataLoader([*map(encode, rows)], 4, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
micro_batches = [batch.to(device) for batch in loader]


def sft_loss_fn(model, batch):
    with torch.autocast(device, amp):
        return model(**batch).loss  # a mean over the batch's tokens, not a sum


with LfURegularizer(model) as reg:
    for step in range(4):
        batches = micro_batches[2 * step : 2 * step + 2]
        tokens = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
        for batch, count in zip(batches, tokens, strict=True):
            loss = reg(model, batch, sft_loss_fn)  # was: loss = sft_loss_fn(model, batch)
            scaler.scale(loss * count / sum(tokens)).backward()
            ratio = reg.metrics["gradient_ratio"]
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        print(f"loss {reg.metrics['sft_loss']:.2f}, gradient ratio {ratio:.2f} (good: 0.1-10)")
