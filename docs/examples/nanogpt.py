"""A loop as in nanoGPT or minGPT: batches are pairs (x, y), the model returns (logits, loss), and -1 is no target."""

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lfu_reg import LfURegularizer

torch.manual_seed(0)
rows = [json.loads(line) for line in Path("benchmarks/demo/data/svamp.jsonl").read_text().splitlines()[:32]]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x):
        q, k, v = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).chunk(3, 2))
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):  # in place of yours
    def __init__(self, width=64):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(128, width), nn.Embedding(256, width)
        self.h = nn.ModuleList(Block(width) for _ in range(4))
        self.lm_head = nn.Linear(width, 128, bias=False)

    def forward(self, x, y):
        hidden = self.wte(x) + self.wpe.weight[: x.shape[1]]
        for block in self.h:
            hidden = block(hidden)
        logits = self.lm_head(hidden)
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)


def get_batch(size=4):
    chosen = [rows[number] for number in torch.randint(len(rows), (size,))]
    texts = [torch.tensor([*(row["prompt"] + row["completion"]).encode()]) for row in chosen]
    x = nn.utils.rnn.pad_sequence([text[:-1] for text in texts], batch_first=True)
    y = nn.utils.rnn.pad_sequence([text[1:] for text in texts], batch_first=True, padding_value=-1)
    for row, target in zip(chosen, y, strict=True):
        target[: len(row["prompt"]) - 1] = -1  # the question is no target
    return x, y


model = GPT().train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
reg = LfURegularizer(model)

for _ in range(8):
    batch = get_batch()  # here, not in the loss function: that one runs twice, on the same data
    loss = reg(model, batch, lambda model, batch: model(*batch)[1])  # was: logits, loss = model(*batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(f"loss {reg.metrics['sft_loss']:.2f}, gradient ratio {reg.metrics['gradient_ratio']:.2f} (good: 0.1-10)")
reg.remove()
