"""torch.compile, block by block: before or after attaching, the gradients are those of the uncompiled run."""

import json
from pathlib import Path

import torch
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


for block in model.train().model.layers:
    block.compile(backend="inductor")
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
pad = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=128)  # one length, so that nothing is compiled again
loader = DataLoader([*map(encode, rows)], 4, shuffle=True, collate_fn=pad)
with LfURegularizer(model, "steering") as reg:  # LoRA breaks the graph at every linear map
    for batch in loader:
        loss = reg(model, batch, sft_loss_fn)  # was: loss = sft_loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {reg.metrics['sft_loss']:.2f}, gradient ratio {reg.metrics['gradient_ratio']:.2f} (good: 0.1-10)")
