"""Hugging Face Accelerate: nothing but the one line, before or after `prepare`."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
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


def sft_loss_fn(model, batch):
    return model(**batch).loss


accelerator = Accelerator(gradient_accumulation_steps=2)  # mixed_precision="bf16" needs nothing else
optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-4)
loader = DataLoader([*map(encode, rows)], 4, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
reg = LfURegularizer(model)
accelerator.register_for_checkpointing(reg)  # its step count is saved and loaded with the rest

for batch in loader:
    with accelerator.accumulate(model):
        loss = reg(model, batch, sft_loss_fn)  # was: loss = sft_loss_fn(model, batch)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    mean = {name: accelerator.gather(reg.metrics[name][None]).mean() for name in ("sft_loss", "gradient_ratio")}
    accelerator.print(f"loss {mean['sft_loss']:.2f}, gradient ratio {mean['gradient_ratio']:.2f} (good: 0.1-10)")
reg.remove()
