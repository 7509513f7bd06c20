"""A vision-language model (LLaVA, second stage: the tower is frozen) reads handwritten digits (scikit-learn's)."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lfu_reg import LfURegularizer

torch.manual_seed(0)
IMAGE = 63  # the token that patches take the place of
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
config = LlavaConfig(  # or LlavaForConditionalGeneration.from_pretrained("llava-hf/llava-1.5-7b-hf")
    vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32),
    text_config=LlamaConfig(**sizes, vocab_size=64),
    image_token_index=IMAGE,
    image_seq_length=4,
)
model = LlavaForConditionalGeneration(config).train()
for parameter_name, parameter in model.named_parameters():
    parameter.requires_grad_("vision_tower" not in parameter_name)

digits = load_digits()
images = interpolate(torch.tensor(digits.images[:256], dtype=torch.float32)[:, None] / 16, size=16)
answers = torch.tensor(digits.target[:256])


def collate(numbers):  # four patches, a token for "which digit?", and the digit
    ids = torch.tensor([[IMAGE] * 4 + [10, answers[number]] for number in numbers])
    labels = ids.masked_fill(torch.arange(6) < 5, -100)
    pixels = images[numbers].expand(-1, 3, -1, -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": labels}


def sft_loss_fn(model, batch):
    return model(**batch).loss


optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
loader = DataLoader(range(256), batch_size=32, shuffle=True, collate_fn=collate)
with LfURegularizer(model, layers=r"(.*\.)?language_model\.(.*\.)?layers\.\d+") as reg:  # "all" has the tower's, too
    for batch in loader:
        loss = reg(model, batch, sft_loss_fn)  # was: loss = sft_loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {reg.metrics['sft_loss']:.2f}, gradient ratio {reg.metrics['gradient_ratio']:.2f} (good: 0.1-10)")
