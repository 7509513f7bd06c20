"""A loop in plain PyTorch: word problems of SVAMP, read character by character."""

import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from lfu_reg import LfURegularizer

torch.manual_seed(0)
rows = [json.loads(line) for line in Path("benchmarks/demo/data/svamp.jsonl").read_text().splitlines()[:32]]


class Model(nn.Module):  # in place of yours
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(128, 64), nn.Linear(64, 128)
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), num_layers=4)

    def forward(self, input_ids):
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        return self.head(self.blocks(self.embed(input_ids), mask, is_causal=True))


def collate(rows):
    texts = [torch.tensor([*(row["prompt"] + row["completion"]).encode()]) for row in rows]
    input_ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    labels = input_ids.masked_fill(input_ids == 0, -100)  # padding does not count,
    for row, label in zip(rows, labels, strict=True):
        label[: len(row["prompt"])] = -100  # nor does the question
    return {"input_ids": input_ids, "labels": labels}


def sft_loss_fn(model, batch):
    logits = model(batch["input_ids"])[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


model = Model().train()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate)

with LfURegularizer(model, "steering") as reg:
    for batch in loader:
        loss = reg(model, batch, sft_loss_fn)  # was: loss = sft_loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {reg.metrics['sft_loss']:.2f}, gradient ratio {reg.metrics['gradient_ratio']:.2f} (good: 0.1-10)")
