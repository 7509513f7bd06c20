"""FSDP2: torchrun --nproc-per-node 2 docs/examples/fsdp2.py"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
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


dist.init_process_group()
device = torch.device("cuda", dist.get_rank()) if torch.cuda.is_available() else torch.device("cpu")
model.to(device).train()
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
data = [*map(encode, rows)]
loader = DataLoader(data, 2, sampler=DistributedSampler(data), collate_fn=DataCollatorForSeq2Seq(tokenizer))
reg = LfURegularizer(model)

for batch in loader:
    loss = reg(model, batch.to(device), sft_loss_fn)  # was: loss = sft_loss_fn(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss, ratio = reg.metrics["sft_loss"], reg.metrics["gradient_ratio"]
    print(f"rank {dist.get_rank()}: loss {loss:.2f}, gradient ratio {ratio:.2f} (good: 0.1-10)")
reg.remove()
dist.destroy_process_group()
