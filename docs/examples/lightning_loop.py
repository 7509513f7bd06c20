"""Lightning: a callback, and `training_step` stays as it is."""

import json
from pathlib import Path

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from lfu_reg.integrations.lightning import LfUCallback

torch.manual_seed(0)
name = "benchmarks/evidence/base_model"  # 2.2 M parameters; or "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
rows = [json.loads(line) for line in Path("benchmarks/demo/data/svamp.jsonl").read_text().splitlines()[:32]]


def encode(row):
    prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


class Tuned(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(name).float().train()

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-4)


class Show(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        loss, ratio = (trainer.callback_metrics[f"lfu/{name}"] for name in ("sft_loss", "gradient_ratio"))
        print(f"loss {loss:.2f}, gradient ratio {ratio:.2f} (good: 0.1-10)")


loader = DataLoader([*map(encode, rows)], 4, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
trainer = L.Trainer(
    max_epochs=1,
    logger=False,
    enable_progress_bar=False,
    enable_checkpointing=False,
    callbacks=[LfUCallback(), Show()],  # settings of LfURegularizer go into LfUCallback(...)
)
trainer.fit(Tuned(), loader)
