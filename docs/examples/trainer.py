"""transformers' Trainer: `LfUTrainer` is `Trainer` with one more argument."""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from lfu_reg.integrations.hf import LfUTrainer

name = "benchmarks/evidence/base_model"  # 2.2 M parameters; or "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name).float()
rows = [json.loads(line) for line in Path("benchmarks/demo/data/svamp.jsonl").read_text().splitlines()]


def encode(row):
    prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


data = [*map(encode, rows)]
args = TrainingArguments(
    "runs/trainer",
    max_steps=4,
    learning_rate=5e-4,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
trainer = LfUTrainer(
    model,
    args,
    train_dataset=data[:32],
    eval_dataset=data[32:48],
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    lfu={"strength": 1},  # settings of LfURegularizer; 1 is the default
)
trainer.train()
for row in trainer.state.log_history[:-1]:
    loss, ratio = row["lfu/sft_loss"], row["lfu/gradient_ratio"]
    print(f"loss {loss:.2f}, gradient ratio {ratio:.2f} (good: 0.1-10)")
print(trainer.evaluate())  # the plain loss, as without LfU
