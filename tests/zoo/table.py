"""The exceptions of the zoo, by name and with reasons: data, so that no test has an if for a model."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Of every other task: all model types.
SAMPLES: dict[str, tuple[str, ...]] = {
    "classification": (
        "albert", "bert", "canine", "deberta", "deberta-v2", "distilbert", "electra", "funnel", "gpt2",
        "ibert", "layoutlm", "led", "llama", "longformer", "mistral", "mobilebert", "modernbert", "mpnet",
        "nystromformer", "qwen3", "roberta", "squeezebert", "xlnet", "yoso",
    ),
    "image": (
        "beit", "bit", "convnext", "convnextv2", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers",
        "focalnet", "hiera", "levit", "mobilenet_v2", "mobilevit", "poolformer", "pvt", "pvt_v2", "regnet", "resnet",
        "segformer", "swin", "swinv2", "vit", "vit_msn",
    ),
    "audio": (
        "audio-spectrogram-transformer", "data2vec-audio", "hubert", "sew", "sew-d", "unispeech", "unispeech-sat",
        "wav2vec2", "wav2vec2-bert", "wav2vec2-conformer", "wavlm",
    ),
    "speech": ("whisper",),
    "seq2seq": (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "fsmt", "led", "longt5", "m2m_100", "marian",
        "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet", "seamless_m4t",
        "switch_transformers", "t5", "t5gemma", "t5gemma2", "umt5",
    ),
}  # fmt: skip

# Layers whose output is [batch, channels, ...], as a regular expression of their names.
CHANNELS_FIRST: dict[tuple[str, str], str] = {
    **{
        ("image", name): r".*"
        for name in (
            "bit", "convnext", "convnextv2", "mobilenet_v2", "mobilevit", "poolformer", "regnet", "resnet",
            "segformer",
        )
    },
    **{
        ("audio", name): r".*(feature_extractor\.conv_layers|pos_conv_embed\.layers)\.\d+"
        for name in (
            "data2vec-audio", "hubert", "sew", "sew-d", "unispeech", "unispeech-sat", "wav2vec2",
            "wav2vec2-conformer", "wavlm",
        )
    },
}  # fmt: skip


def channel_axis(task: str, model_type: str, layer: str) -> int:
    """The hidden axis of a layer's output."""
    return 1 if re.fullmatch(CHANNELS_FIRST.get((task, model_type), r"(?!)"), layer) else -1


@dataclass(frozen=True)
class Expected:
    """What is expected of a species instead of exact gradients.

    Attributes:
        outcome: "refused" (a clear error of the library for every auxiliary), "partly" (for some), "warned" (an
            LfUWarning), "not built" (it cannot be built or trained here at all), "wrong".
        says: part of the message.
        reason: for the reader.
    """

    outcome: str
    says: str
    reason: str


_SHARED_CACHE = Expected("not built", "", "takes the key/value states of another model")
_WITHOUT_GRADIENTS = Expected("refused", "returned nothing to the regularizer", "its blocks run without gradients")
_NOT_CALLED = Expected("refused", "returned nothing to the regularizer", "calls `layer.forward(x)`, past all hooks")
_NO_LINEAR = Expected("partly", "There is no linear map", "no linear map for LoRA: an error says so")
_NORMALISED = "batch normalisation takes out steering vectors, so that their gradient is rounding"

EXCEPTIONS: dict[tuple[str, str], Expected] = {
    ("causal", "gemma3n"): Expected("not built", "timm", "needs the package timm"),
    ("causal", "gemma4_assistant"): _SHARED_CACHE,
    ("causal", "gemma4_unified_assistant"): _SHARED_CACHE,
    ("causal", "reformer"): _WITHOUT_GRADIENTS,
    ("masked", "reformer"): _WITHOUT_GRADIENTS,
    ("causal", "xlstm"): Expected("not built", "inplace", "its backward pass fails without its kernels"),
    ("masked", "perceiver"): Expected("not built", "parameters", "its sizes have names of their own"),
    ("masked", "squeezebert"): _NOT_CALLED,
    ("classification", "squeezebert"): _NOT_CALLED,
    ("image", "bit"): _NO_LINEAR,
    ("image", "poolformer"): _NO_LINEAR,
    ("image", "regnet"): _NO_LINEAR,
    ("image", "resnet"): _NO_LINEAR,
    ("image", "levit"): Expected("warned", "no direction", f"{_NORMALISED}: a warning says so"),
    ("image", "mobilevit"): Expected("warned", "no direction", f"{_NORMALISED}: a warning says so"),
    ("image", "mobilenet_v2"): Expected("partly", "l_cons is off", f"{_NORMALISED}: a warning says so"),
}

# Warnings that name what is left out, or that lambda (here one for all models) is far from where it helps, and what
# the page says of it; such a step is exact otherwise.
NAMED = {
    "LfU outweighs the SFT loss": "the lambda of this table is too large for it: a warning says so",
    "LfU has no effect: the gradient of lam": "the lambda of this table is too small for it: a warning says so",
    "These stages of": "stages of a single block are left out: a warning names them",
    "never ran although their layers did": "linear maps that are never called get no delta: a warning names them",
    "Every position counts": "no mask fits its hidden states, so every position counts: a warning says so",
}


def is_named(remark: str) -> bool:
    """Whether a remark is one of these warnings."""
    return remark.startswith("warns") and any(part in remark for part in NAMED)


def exception_of(task: str, model_type: str) -> Expected | None:
    """The exception for a species, None where it has to be exact."""
    return EXCEPTIONS.get((task, model_type))
