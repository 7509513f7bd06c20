"""A preference loss (DPO) by hand, with the adapter switched off as reference; right answers are chosen, others not."""

import json
from itertools import pairwise
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from lfu_reg import LfURegularizer

torch.manual_seed(0)
name = "benchmarks/evidence/base_model"  # 2.2 M parameters; or "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer, base = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name).float()
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
rows = [json.loads(line) for line in Path("benchmarks/demo/data/svamp.jsonl").read_text().splitlines()[:17]]


def encode(prompt, answer):
    prompt, answer = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def collate(pairs):  # first the chosen answers, then the rejected ones, in one batch
    return pad([pair[0] for pair in pairs] + [pair[1] for pair in pairs])


def log_probabilities(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:, None]
    return (logits.log_softmax(-1).gather(2, labels.clamp(min=0)) * (labels != -100)).sum((1, 2))


def dpo_loss(model, batch, beta=0.1):
    with torch.no_grad(), model.disable_adapter():  # the reference: neither perturbed nor compared
        reference = log_probabilities(model, batch)
    chosen, rejected = (log_probabilities(model, batch) - reference).chunk(2)
    return -logsigmoid(beta * (chosen - rejected)).mean()


pad = DataCollatorForSeq2Seq(tokenizer)
pairs = [
    (encode(row["prompt"], row["completion"]), encode(row["prompt"], other["completion"]))
    for row, other in pairwise(rows)
]
loader = DataLoader(pairs, 4, shuffle=True, collate_fn=collate)
optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=2e-3)
with LfURegularizer(model, "steering") as reg:
    for batch in [*loader, *loader]:  # two epochs
        loss = reg(model, batch, dpo_loss)  # was: loss = dpo_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {reg.metrics['sft_loss']:.2f}, gradient ratio {reg.metrics['gradient_ratio']:.2f} (good: 0.1-10)")
