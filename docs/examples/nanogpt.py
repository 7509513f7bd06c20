"""A loop as in nanoGPT or minGPT: batches are pairs (x, y), the model returns (logits, loss), and -1 is no target."""

import json
from pathlib import Path

import torch
from torch import nn

from lfu_reg import LfURegularizer

torch.manual_seed(0)
rows = [json.loads(line) for line in Path("benchmarks/demo/data/svamp.jsonl").read_text().splitlines()[:32]]


class GPT(nn.Module):  # in place of yours
    def __init__(self, width=64):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(128, width), nn.Embedding(256, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, num_layers=4, enable_nested_tensor=False)
        self.head = nn.Linear(width, 128, bias=False)

    def forward(self, x, y):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        logits = self.head(self.blocks(self.tokens(x) + self.positions.weight[: x.shape[1]], mask, is_causal=True))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)


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

for iteration in range(8):
    batch = get_batch()  # here, not in the loss function: that one runs twice, on the same data
    loss = reg(model, batch, lambda model, batch: model(*batch)[1])  # was: logits, loss = model(*batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(f"loss {reg.metrics['sft_loss']:.2f}, gradient ratio {reg.metrics['gradient_ratio']:.2f} (good: 0.1 to 10)")
reg.remove()
