"""What the sizes by name get wrong, per model type, as data.

`CHANGES`: configuration fields. Ratios that a model insists on, fields without a usable default, lists whose length is
that of a default stack, sizes that no other model has.
"""

from __future__ import annotations

from typing import Any

FULL = ["full_attention"] * 4
GEMMA4 = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0, "global_head_dim": 8}
UNSHARED_NESTED = {f"text_config.{name}": value for name, value in GEMMA4.items()}
ASSISTANT = {
    "text_config.hidden_size_per_layer_input": 0,
    "text_config.vocab_size_per_layer_input": 0,
    "text_config.num_kv_shared_layers": 4,
    "text_config.layer_types": ["sliding_attention", "full_attention"] * 2,
    "backbone_hidden_size": 32,
    "num_centroids": 4,
    "centroid_intermediate_top_k": 2,
}
QSA = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "output_gate_type": "silu",
}

ATTENTION = {"layer_types": ["linear_attention", "full_attention"] * 2}
LATENT = {"qk_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4}
SLIDING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}

CHANGES: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": {**LATENT, **ATTENTION},
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},  # block sparse attention replaces itself in the first forward
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {
        "use_cache": False,
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3, 4],
        "vocab_size": 260,
        "patcher_config.vocab_size": 260,
        "encoder_config.vocab_size": 260,
        "decoder_config.vocab_size": 260,
        "local_attention_window_len": 8,
        "global_config.hidden_size": 64,
        "encoder_config.hidden_size_global": 64,
        "decoder_config.hidden_size_global": 64,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "deepseek_v2": {**LATENT, "num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        **{f"text_config.{name}": value for name, value in {**LATENT, **SLIDING}.items()},
        "vision_config.pyramid_num_routed": [-1, -1, 4, 4],
        "vision_config.adapter_in_dim": 32,
        "audio_config.adapter_input_size": 32,
    },
    "dots3_note_text": {**LATENT, **SLIDING},
    "distilbert": {"dim": 32, "hidden_dim": 40},
    "esm": {"vocab_size": 67, "mask_token_id": 5},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {"intermediate_size": [40] * 4, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gemma4_text": GEMMA4,
    "gemma4_assistant": ASSISTANT,
    "gemma4_unified_text": GEMMA4,
    "gemma4_unified_assistant": ASSISTANT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "granitemoehybrid": ATTENTION,
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**LATENT, **ATTENTION},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": LATENT,
    "luke": {"entity_vocab_size": 50},
    "mamba2": {"head_dim": 16},
    "minicpm3": LATENT,
    "ministral": {"head_dim": 8},
    "musicgen": {"decoder.num_codebooks": 1},
    "musicgen_melody": {"decoder.num_codebooks": 1},
    "neomme": {"head_dim": 16},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp": {f"text_config.{name}": value for name, value in QSA.items()},
    "qwen4_exp_text": QSA,
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (2, 4),
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
    "masked/reformer": {
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (2, 4),
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    # Images.
    "beit": {"image_size": 8, "out_indices": [1, 2, 3, 4]},
    "bit": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_groups": 4},
    "convnext": {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 2, 1], "image_size": 64},
    "convnextv2": {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 2, 1], "image_size": 64},
    "focalnet": {
        "image_size": 16,
        "embed_dim": 8,
        "depths": [1, 2, 1],
        "hidden_sizes": [8, 16, 32],
        "focal_levels": [1, 1, 1],
        "focal_windows": [3, 3, 3],
    },
    "hiera": {
        "image_size": [16, 16],
        "embed_dim": 8,
        "depths": [1, 2, 1],
        "num_heads": [1, 2, 2],
        "patch_stride": [2, 2],
        "patch_size": [3, 3],
        "patch_padding": [1, 1],
        "masked_unit_size": [4, 4],
        "num_query_pool": 2,
        "query_stride": [2, 2],
        "masked_unit_attention": [True, True, False],
    },
    "led": {"attention_window": 4},
    "longformer": {"attention_window": 4},
    "levit": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [8, 12, 16],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 2, 1],
        "key_dim": [4, 4, 4],
    },
    "mobilenet_v2": {"image_size": 32, "depth_multiplier": 0.25},
    "mobilevit": {"image_size": 64, "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 8, 12, 16, 20, 24, 28]},
    "poolformer": {"image_size": 64, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1]},
    "pvt": {
        "image_size": 64,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 2, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "patch_sizes": [4, 2, 2, 2],
    },
    "pvt_v2": {
        "image_size": 64,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 2, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
    },
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "groups_width": 4},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1]},
    "segformer": {"image_size": 64, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1]},
    "swin": {"image_size": 16, "embed_dim": 8, "depths": [1, 2, 1], "num_heads": [2, 2, 2], "window_size": 2},
    "swinv2": {"image_size": 16, "embed_dim": 8, "depths": [1, 2, 1], "num_heads": [2, 2, 2], "window_size": 2},
    # Sound.
    **{
        name: {
            "conv_dim": (8, 8),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        }
        for name in (
            "data2vec-audio",
            "hubert",
            "unispeech",
            "unispeech-sat",
            "wav2vec2",
            "wav2vec2-conformer",
            "wavlm",
            "sew",
            "sew-d",
        )
    },
    "audio-spectrogram-transformer": {
        "patch_size": 2,
        "num_mel_bins": 8,
        "max_length": 16,
        "frequency_stride": 2,
        "time_stride": 2,
    },
    "wav2vec2-bert": {"feature_projection_input_dim": 8},
}
