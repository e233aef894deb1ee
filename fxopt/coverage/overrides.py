"""What configs of single types ask beyond the sizes all share: test data, read by nothing but the shrinking."""

from __future__ import annotations

from typing import Any

MOE_OF_DEEPSEEK = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
NGRAMS = {"ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 4}
BLT = {"hidden_size_global": 64}
DOTS3 = {"head_dim": 20}
STARTS = {"decoder_start_token_id": 0}
MROPE = {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}}
"""Sections that the models take by default are those of heads of 128."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        **dict.fromkeys(("encoder_config", "decoder_config"), BLT),
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "convnext": {"hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"head_dim": 32, "index_head_dim": 32},  # two rotary pairs: of one, pairings are equal
    "dots3_note": {"text_config": DOTS3},
    "dots3_note_text": DOTS3,
    "dots1": MOE_OF_DEEPSEEK,
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 32},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    "gemma3": {"mm_tokens_per_image": 16},
    "glm4v": MROPE,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longt5": STARTS,
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "mllama": {"vision_config": {"intermediate_layers_indices": [1, 2], "vision_output_dim": 192}},
    "moonshine": {"pad_token_id": 0},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {
        "audio_config": {
            "ext_pw_out_channel": 64,
            "nemo_conv_channels": 64,
            "depthwise_separable_out_channel": 64,
        }
    },
    "qwen2_5_vl": {**MROPE, "vision_config": {"window_size": 32}},
    "qwen2_vl": MROPE,
    "qwen4_exp": {"text_config": {**INDEXER, **NGRAMS}},
    "qwen4_exp_text": {**INDEXER, **NGRAMS},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "roc_bert": {"shape_vocab_size": 64, "shape_embed_dim": 16, "pronunciation_embed_dim": 16},
    "swin": {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
    "switch_transformers": STARTS,
    "t5": STARTS,
    "wav2vec2-conformer": {"vocab_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "num_query_groups": 4},
}
