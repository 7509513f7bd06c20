"""DistributedDataParallel with accumulation: torchrun --nproc-per-node 2 docs/examples/ddp.py"""

import json
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
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
ddp = DistributedDataParallel(model.to(device).train())
optimizer = torch.optim.AdamW(ddp.parameters(), lr=5e-4)
data = [*map(encode, rows)]
loader = DataLoader(data, 2, sampler=DistributedSampler(data), collate_fn=DataCollatorForSeq2Seq(tokenizer))
reg = LfURegularizer(ddp)  # sync_perturbation=True for one direction on all ranks

for number, batch in enumerate(loader):
    last = number % 2 == 1
    with nullcontext() if last else ddp.no_sync():  # the forward as well as the backward
        loss = reg(ddp, batch.to(device), sft_loss_fn)  # the wrapper; was: loss = sft_loss_fn(ddp, batch)
        (loss / 2).backward()
    if last:
        optimizer.step()
        optimizer.zero_grad()
        loss, ratio = reg.metrics["sft_loss"], reg.metrics["gradient_ratio"]
        print(f"rank {dist.get_rank()}: loss {loss:.2f}, gradient ratio {ratio:.2f} (good: 0.1-10)")
reg.remove()
dist.destroy_process_group()
