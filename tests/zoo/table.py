"""The exceptions of the zoo, by name and with reasons: data, so that no test has an if for a model."""

from __future__ import annotations

import re

# Of every other task: all model types.
SAMPLES: dict[str, tuple[str, ...]] = {
    "classification": (
        "albert", "bart", "bert", "canine", "deberta", "deberta-v2", "distilbert", "electra", "funnel", "gpt2",
        "ibert", "layoutlm", "led", "llama", "longformer", "mistral", "mobilebert", "modernbert", "mpnet", "mt5",
        "nystromformer", "qwen3", "roberta", "squeezebert", "t5", "xlnet", "yoso",
    ),
    "image": (
        "beit", "bit", "convnext", "convnextv2", "cvt", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers",
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
            "bit", "convnext", "convnextv2", "cvt", "mobilenet_v2", "mobilevit", "poolformer", "regnet", "resnet",
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
