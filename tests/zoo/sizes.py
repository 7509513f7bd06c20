"""The size that a configuration field of a given name gets in the zoo.

Every name that transformers' configurations use for a size, so that a model type that is added tomorrow shrinks without
an entry of its own. Sizes of different things are different numbers wherever they can be: a hidden state is then
matched to a mask by its shape alone, without a doubt.
"""

from __future__ import annotations

import re
from typing import Any

VOCAB = 67
WIDTH = 32
DEPTH = 4  # hybrids mix their kinds of blocks within four
HEADS = 4
POSITIONS = 64

SIZES: tuple[tuple[int, str], ...] = (
    (
        VOCAB,
        """
        vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size encoder_vocab_size
        src_vocab_size tgt_vocab_size
        """,
    ),
    (
        WIDTH,
        """
        hidden_size d_model n_embd emb_dim embedding_dim embedding_size embed_dim adapter_out_dim
        out_hidden_size word_embed_proj_dim input_embedding_size output_embedding_size vision_output_dim
        hidden_size_global lru_width attention_hidden_size embed_dims q_lora_rank kv_lora_rank o_lora_rank
        projector_input_dim projector_output_dim router_hidden_size output_dim projection_dim entity_emb_size
        emb_size num_position_embeddings hidden_dim conv_dim encoder_hidden_size decoder_hidden_size
        text_hidden_size vision_hidden_size pooler_output_size
        """,
    ),
    (
        40,
        """
        intermediate_size moe_intermediate_size shared_expert_intermediate_size
        moe_shared_expert_intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff dff dim_ff n_inner
        d_inner shared_intermediate_size shared_experts_intermediate_size ffn_hidden_size
        expert_ffn_hidden_size dense_intermediate_size intermediate_size_mlp mlp_dim feed_forward_size
        adapter_in_dim prompt_mid_dim
        """,
    ),
    (
        DEPTH,
        """
        num_hidden_layers n_layer n_layers num_layers depth num_blocks num_layers_per_stack
        """,
    ),
    (
        3,
        """
        encoder_layers decoder_layers num_decoder_layers num_encoder_layers num_global_layers num_channels
        in_channels conv_num_hidden_layers conf_num_hidden_layers
        """,
    ),
    (
        HEADS,
        """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads index_n_heads
        linear_num_value_heads n_mamba_heads mamba_n_heads mamba_num_heads swa_num_attention_heads
        linear_num_heads linear_num_key_heads num_experts n_routed_experts num_local_experts moe_num_experts
        conf_num_attention_heads num_query_groups num_attention_head
        """,
    ),
    (
        2,
        """
        num_key_value_heads kv_n_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok
        num_experts_per_token moe_topk moe_top_k moe_k top_k_experts n_shared_experts num_shared_experts
        moe_num_shared_experts cross_attn_k num_codebooks zero_expert_num num_kv_shared_layers num_mem_blocks
        mamba_n_groups mamba_ngroups n_groups type_vocab_size num_lstm_layers o_groups topk_group n_group
        num_expert_group ngram patch_size index_topk_blocks index_block_size index_topk
        """,
    ),
    (
        8,
        """
        head_dim attention_head_dim dim_head d_kv d_head qk_head_dim qk_nope_head_dim qk_rope_head_dim
        v_head_dim index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim swa_head_dim
        kv_channels attention_head_size rotary_dim mamba_d_state state_size ssm_state_size laurel_rank
        time_step_rank mamba_dt_rank hidden_size_per_layer_input chunk_size mamba_chunk_size sliding_window
        sliding_window_size image_size attention_window_size gated_norm_rank hc_lowrank adapter_rank d_rel
        pronunciation_embed_dim shape_embed_dim attention_chunk_size local_attention
        local_attention_window_len
        """,
    ),
    (
        16,
        """
        mamba_d_head mamba_headdim mamba_head_dim ple_embed_dim rel_extent
        """,
    ),
    (
        POSITIONS,
        """
        max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions
        context_length pronunciation_vocab_size shape_vocab_size mamba_d_ssm max_position_embedding
        max_sequence_length
        """,
    ),
)

BY_NAME: dict[str, int] = {name: size for size, names in SIZES for name in names.split()}

RATE = re.compile(r".*(dropout|layerdrop|pdrop|drop_path|drop_rate|dropout_p|dropout_prob|jitter_noise|jitter)")
SPECIAL_TOKEN = re.compile(r"(.*_)?token_(id|index)")
MASKED_AT_RANDOM = ("mask_time_prob", "mask_feature_prob")


def size_of(name: str, value: Any) -> Any:
    """What a field gets instead of its default; the default itself where it says nothing about size."""
    if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
        return value
    if SPECIAL_TOKEN.fullmatch(name):
        # Distinct small numbers: a special token that happens to be in a batch has its embedding, and nothing else.
        known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        return known.get(name, value if value is None else VOCAB - 1 - sum(map(ord, name)) % 20)
    if value is not None and (RATE.fullmatch(name) or name in MASKED_AT_RANDOM):
        return 0.0
    if name in BY_NAME and (isinstance(value, int) or value is None):
        return BY_NAME[name] if value is not None and value != 0 else value
    return value
