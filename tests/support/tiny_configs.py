"""How a published default config is made tiny: `RULES` by name, `FIX` for single model types."""

from __future__ import annotations

HIDDEN, INTER, MOE_INTER, SEQ, VOCAB = 64, 112, 48, 16, 128
LAYERS = 3
DROP = {
    "transformers_version",
    "model_type",
    "architectures",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "auto_map",
    "id2label",
    "label2id",
    "quantization_config",
    "problem_type",
    "_attn_implementation",
    "attn_implementation",
}
# name pattern -> value, or a function of the default; first match wins; None keeps the default
RULES = [
    (
        r"chunk_size_feed_forward|pretraining_tp|.*_layer_offset|.*_idx|.*_index(es)?$|seed|ngram|ngram_size|hc_.*|altup.*|.*type_vocab_size|num_channels|in_channels|.*conv_kernel.*|d_conv|mamba_d_conv",
        None,
    ),
    (r".*token_id|.*token_index|.*_idx", "token"),
    (r".*vocab_size.*|.*_vocab|codebook_size|vocab_offset|ngram_vocab.*", VOCAB),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", lambda v: min(v, 1)),
    (r"moe_layer_end_index", LAYERS - 1),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp.*", 0),
    (
        r"(num_|n_)?(hidden_|encoder_|decoder_|global_)?layers?|num_.*_layers|n_layers?|num_blocks|depth|num_layers_per_stack",
        lambda v: min(v, LAYERS),
    ),
    (r"max_window_layers", 1),
    (r".*top_?k_group|n_group|.*expert_group|num_limited_groups", lambda v: min(v, 1)),
    (r".*shared_experts?|num_shared_.*", lambda v: min(v, 1)),
    (r"zero_expert_num", 2),
    (r".*(num|n)_(routed_|local_)?experts|moe_num_experts|ffn_num_experts", lambda v: min(v, 4)),
    (
        r".*(moe|ffn|router|expert).*top_?k|num_experts_per_tok(en)?|top_?k|moe_k|.*num_selected.*",
        lambda v: min(v, 2),
    ),
    (r"index_topk.*", 8),
    (r"index_n_heads", 4),
    (r"index_block_size", 4),
    (
        r".*(num|n)_(key_value|kv|query)_(heads|groups)|kv_n_heads|num_kv_heads|.*key_value_heads|num_query_groups",
        lambda v: min(v, 2),
    ),
    (r"linear_num_key_heads", 2),
    (r"(linear_num_value_heads|linear_num_heads)", 4),
    (
        r".*(heads|n_head)(_per_layer)?|conf_num_attention_heads|attention_heads",
        lambda v: 4 if isinstance(v, int) else v,
    ),
    (r".*qk_head_dim", 24),
    (r"qk_rope_head_dim", 8),
    (r"qk_nope_head_dim|v_head_dim", 16),
    (r".*head_dim|attention_head_size|d_kv|d_head|dim_head|.*value_head_dim|kv_channels", 16),
    (r".*lora_rank|.*_rank", lambda v: min(v, 24)),
    (r"rotary_dim", 8),
    (r".*(moe|expert).*(intermediate|ffn).*", MOE_INTER),
    (
        r".*(intermediate|ffn_dim|ffn_hidden|mlp_dim|feed_forward_size|dim_ff|dff|inner|d_ff).*",
        lambda v: INTER if v else v,
    ),
    (r"conv_.*channel.*|base_channels|.*latent.*|channel_multiplier", None),
    (
        r".*(hidden|d_model|n_embd|embed_dim|embedding_(size|dim)|emb_dim|model_dim|hidden_dim|lru_width|word_embed|proj_dim|output_dim|out_dim|input_dim|dim_model).*|dim|width|embed_size",
        HIDDEN,
    ),
    (r".*(state_size|d_state)", 8),
    (r".*n_groups|.*ngroups", lambda v: min(v, 2)),
    (r".*chunk_(size|length)|chunk_length", lambda v: min(v, 8) if v else v),
    (
        r".*(positions|n_ctx|position_embeddings|max_seq_len|max_.*len.*|context_length|model_max_length|rel_extent)",
        lambda v: min(v, 64),
    ),
    (r".*(window|sliding).*", lambda v: min(v, 8) if v and v > 0 else v),
    (r"image_size|crop_size", 32),
    (r"patch_size", lambda v: min(v, 8)),
    (r"spatial_merge_size|temporal_patch_size", None),
    (r".*(interval|period|every_n_layers|pattern|layer_group_size)", lambda v: min(v, 2)),
]
# model type -> {dotted key: value}; "@key" is needed by the default config already
FIX = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
            },
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
            },
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": HIDDEN,
            "ffn_hidden_size": MOE_INTER,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_experts_per_tok": 2,
    },
    "dots3_note": {
        "text_config.num_key_value_heads": 4,
        "text_config.head_dim": 24,
        "text_config.swa_head_dim": 24,
    },
    "dots3_note_text": {"num_key_value_heads": 4, "head_dim": 24, "swa_head_dim": 24},
    "gemma4_assistant": {
        "@text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "hidden_size": HIDDEN,
            "intermediate_size": INTER,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "global_head_dim": 16,
            "vocab_size": VOCAB,
        }
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "musicgen": {"~": "decoder"},
    "musicgen_melody": {"~": "decoder"},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 4,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 8,
        "text_config.indexer_compress_ratio": 2,
        "text_config.layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
    },
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [32, 32],
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "attn_layers": ["local", "lsh", "local"],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "hybrid_layer_ids": [1, 2],
        "mamba_headdim": 32,
        "num_query_groups": 4,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 32,
    },
}
