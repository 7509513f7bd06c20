"""LoRA fine-tuning with PEFT: the regularizer goes on the PEFT model."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from lfu_reg import LfURegularizer

torch.manual_seed(0)
name = "benchmarks/evidence/base_model"  # 2.2 M parameters; or "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer, base = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name).float()
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
rows = [json.loads(line) for line in Path("benchmarks/demo/data/svamp.jsonl").read_text().splitlines()[:32]]


def encode(row):
    prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def sft_loss_fn(model, batch):
    return model(**batch).loss


optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=5e-3)
loader = DataLoader([*map(encode, rows)], 4, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
with LfURegularizer(model) as reg:  # "weights" moves the adapter's own matrices instead, as the authors' code does
    print(reg)  # settings, and the layers whose hidden states are kept
    for batch in loader:
        loss = reg(model, batch, sft_loss_fn)  # was: loss = sft_loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {reg.metrics['sft_loss']:.2f}, gradient ratio {reg.metrics['gradient_ratio']:.2f} (good: 0.1-10)")
model.save_pretrained("runs/peft")
