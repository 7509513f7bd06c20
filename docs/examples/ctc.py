"""A CTC model, as in speech recognition: lines of handwritten digits (scikit-learn's) are read column by column."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from lfu_reg import LfURegularizer

torch.manual_seed(0)
digits = load_digits()
pad = nn.utils.rnn.pad_sequence


class Reader(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.inward, self.head = nn.Linear(8, width), nn.Linear(width, 11)  # 10 digits, and 0 for blank
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)

    def forward(self, frames, attention_mask):
        return self.head(self.encoder(self.inward(frames), src_key_padding_mask=~attention_mask))


def collate(lines):  # each line is a list of row numbers
    frames = [torch.cat([torch.tensor(digits.images[n], dtype=torch.float32).T for n in line]) / 16 for line in lines]
    return {
        "frames": pad(frames, batch_first=True),  # [lines, columns, 8]
        "attention_mask": pad([torch.ones(len(frame), dtype=torch.bool) for frame in frames], batch_first=True),
        "targets": torch.tensor([digits.target[n] + 1 for line in lines for n in line]),
        "target_lengths": torch.tensor([len(line) for line in lines]),
    }


def ctc_loss(model, batch):
    scores = model(batch["frames"], batch["attention_mask"]).log_softmax(-1).transpose(0, 1)
    lengths = batch["attention_mask"].sum(1)
    return nn.functional.ctc_loss(scores, batch["targets"], lengths, batch["target_lengths"])


lines = [range(n, n + 3 + n % 3) for n in range(0, 640, 5)]
loader = DataLoader(lines, batch_size=16, shuffle=True, collate_fn=collate)
model = Reader().train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
with LfURegularizer(model, "steering") as reg:  # finds the mask of the frames by its name, attention_mask
    for batch in loader:
        loss = reg(model, batch, ctc_loss)  # was: loss = ctc_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {reg.metrics['sft_loss']:.2f}, gradient ratio {reg.metrics['gradient_ratio']:.2f} (good: 0.1-10)")
