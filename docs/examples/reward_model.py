"""A reward model (Bradley-Terry): the right equation of a word problem has to score higher than another one."""

import json
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lfu_reg import LfURegularizer

torch.manual_seed(0)
name = "benchmarks/evidence/base_model"  # 2.2 M parameters; or "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1).float()
model.config.pad_token_id = tokenizer.pad_token_id
rows = [json.loads(line) for line in Path("benchmarks/demo/data/svamp.jsonl").read_text().splitlines()[:17]]
pairs = [(row["prompt"] + row["completion"], row["prompt"] + other["completion"]) for row, other in pairwise(rows)]


def collate(pairs):  # first the chosen answers, then the rejected ones
    texts = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    return tokenizer(texts, padding=True, return_tensors="pt")


def reward_loss(model, batch):
    chosen, rejected = model(**batch).logits.squeeze(1).chunk(2)
    return -logsigmoid(chosen - rejected).mean()


optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
loader = DataLoader(pairs, 4, shuffle=True, collate_fn=collate)
with LfURegularizer(model) as reg:
    for batch in [*loader, *loader]:  # two epochs
        loss = reg(model, batch, reward_loss)  # was: loss = reward_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {reg.metrics['sft_loss']:.2f}, gradient ratio {reg.metrics['gradient_ratio']:.2f} (good: 0.1-10)")
