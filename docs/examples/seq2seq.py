"""An encoder-decoder: T5 reads a word problem of SVAMP and writes its equation."""

import json
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, DataCollatorForSeq2Seq, T5Config, T5ForConditionalGeneration

from lfu_reg import LfURegularizer

torch.manual_seed(0)
rows = [json.loads(line) for line in Path("benchmarks/demo/data/svamp.jsonl").read_text().splitlines()[:32]]
tokenizer = ByT5Tokenizer()  # bytes; needs no file
config = T5Config(vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4, decoder_start_token_id=0)
model = T5ForConditionalGeneration(config).train()  # or T5ForConditionalGeneration.from_pretrained("google/byt5-small")
data = [tokenizer(row["prompt"], text_target=row["completion"]) for row in rows]


def sft_loss_fn(model, batch):
    return model(**batch).loss


optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
loader = DataLoader(data, 4, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
with LfURegularizer(model) as reg:  # encoder and decoder; layers=r"decoder\.block\.\d+" takes one of them
    for batch in loader:
        loss = reg(model, batch, sft_loss_fn)  # was: loss = sft_loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {reg.metrics['sft_loss']:.2f}, gradient ratio {reg.metrics['gradient_ratio']:.2f} (good: 0.1-10)")
