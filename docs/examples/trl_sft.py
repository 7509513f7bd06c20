"""TRL: `LfUSFTTrainer` is `SFTTrainer` with one more argument."""

import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from lfu_reg.integrations.trl import LfUSFTTrainer

name = "benchmarks/evidence/base_model"  # 2.2 M parameters; or "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name).float()
rows = [json.loads(line) for line in Path("benchmarks/demo/data/svamp.jsonl").read_text().splitlines()[:32]]
config = SFTConfig(
    "runs/trl",
    max_steps=8,
    learning_rate=5e-4,
    per_device_train_batch_size=4,
    completion_only_loss=True,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    bf16=False,
    disable_tqdm=True,
)
trainer = LfUSFTTrainer(
    model,
    config,
    train_dataset=Dataset.from_list(rows),  # prompt and completion
    processing_class=tokenizer,
    lfu={"auxiliary": "steering"},  # settings of LfURegularizer
)
trainer.train()
for row in trainer.state.log_history[:-1]:
    loss, ratio = row["lfu/sft_loss"], row["lfu/gradient_ratio"]
    print(f"loss {loss:.2f}, gradient ratio {ratio:.2f} (good: 0.1-10)")
