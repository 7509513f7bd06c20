"""Tiny random models of many kinds, without downloads."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import peft
import transformers as tf
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba.modeling_mamba import MambaMixer, MambaRMSNorm
from transformers.models.mixtral import modeling_mixtral
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm, T5Stack

from tests.support.float64 import keep_float64

# Before 4.53, which wrote masks anew.
IS_OLDER = find_spec("transformers.masking_utils") is None
SWIN_KNOWS_SDPA = getattr(tf.SwinPreTrainedModel, "_supports_sdpa", False)
# As old ones do: past the hooks on the layers, so that there is nothing to regularize.
T5_CHECKPOINTS_FORWARD = "layer_module.forward" in inspect.getsource(T5Stack)
# Newer ones lend its weight to a function.
MAMBA_CALLS_DT_PROJ = "self.dt_proj(" in inspect.getsource(MambaMixer)

# The router was part of the sparse block before transformers 5.
MIXTRAL_ROUTER = getattr(modeling_mixtral, "MixtralTopKRouter", None) or modeling_mixtral.MixtralSparseMoeBlock
EXPERTS_ARE_LINEAR = MIXTRAL_ROUTER is modeling_mixtral.MixtralSparseMoeBlock

keep_float64(LlamaRMSNorm, Gemma2RMSNorm, Gemma2Attention, modeling_mixtral.MixtralRMSNorm, MIXTRAL_ROUTER)
keep_float64(T5Attention, T5LayerNorm, MambaRMSNorm, MambaMixer)

VOCAB, WIDTH = 29, 16
DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "attn_implementation": "sdpa",
    "tie_word_embeddings": False,
}


def llama(**changes: Any) -> tf.LlamaForCausalLM:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**DECODER, **changes}))


def peft_llama(**changes: Any) -> peft.PeftModel:
    """LoRA tuning of some of the linear maps; both of its matrices away from zero."""
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(llama(**changes), config)


def freeze_lower_half(model: tf.LlamaForCausalLM) -> tf.LlamaForCausalLM:
    for part in (model.model.embed_tokens, *model.model.layers[: len(model.model.layers) // 2]):
        part.requires_grad_(False)
    return model


def gemma() -> nn.Module:
    """Sliding windows and whole attention in turn, each with a mask of its own."""
    own = {"head_dim": 8, "sliding_window": 3, "attn_implementation": "eager"}
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**{**DECODER, **own}))


def gpt2(dropout: float = 0.0) -> nn.Module:
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCAB,
            n_positions=32,
            n_embd=WIDTH,
            n_layer=3,
            n_head=2,
            attn_implementation="eager" if IS_OLDER else "sdpa",  # whose mask was float32 at first
            **rates,
        )
    )


def mixtral() -> nn.Module:
    own = {"intermediate_size": 12, "num_hidden_layers": 3, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = tf.MixtralConfig(**{**DECODER, **own})
    config._experts_implementation = "eager"
    return tf.MixtralForCausalLM(config)


def t5(dropout: float = 0.0) -> nn.Module:
    config = tf.T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=2,
        dropout_rate=dropout,
        decoder_start_token_id=0,
    )
    return tf.T5ForConditionalGeneration(config)


def bert(dropout: float = 0.0) -> nn.Module:
    config = tf.BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=4,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return tf.BertForSequenceClassification(config)


def vit() -> nn.Module:
    config = tf.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return tf.ViTForImageClassification(config)


def albert() -> nn.Module:
    """One layer, called three times per forward."""
    config = tf.AlbertConfig(
        vocab_size=VOCAB,
        embedding_size=8,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
    )
    return tf.AlbertForSequenceClassification(config)


def mamba() -> nn.Module:
    config = tf.MambaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        state_size=4,
        num_hidden_layers=3,
        intermediate_size=24,
        time_step_rank=4,
        residual_in_fp32=False,
        use_cache=False,
    )
    return tf.MambaForCausalLM(config)


def swin() -> nn.Module:
    """The width doubles between stages."""
    config = tf.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1, 1],
        num_heads=[2, 2, 2],
        window_size=2,
        num_labels=4,
        drop_path_rate=0.0,
        attn_implementation="sdpa" if SWIN_KNOWS_SDPA else "eager",
    )
    return tf.SwinForImageClassification(config)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
    )
