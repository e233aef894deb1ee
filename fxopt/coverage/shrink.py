"""A tiny config of any model type that keeps every kind of layer the type has by default.

Sizes shrink by the names that configs share (`SIZES`); per-layer lists shrink to one layer of each kind that
occurs; sub-configs shrink the same way. `OVERRIDES` holds only what configs ask beyond that.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from transformers import CONFIG_MAPPING, PreTrainedConfig

from fxopt.coverage.overrides import OVERRIDES
from fxopt.demo.models import check_model_type

LAYERS = 4
"""At least; more where a type has more kinds of layers."""
VOCABULARY = 256
WIDTH, HEADS, HEAD_DIM = 64, 4, 16

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim", "dim_model"), WIDTH),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "attention_hidden_size", "lru_width"), WIDTH),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "embed_dim", "hidden_dim", "dim"), WIDTH),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "backbone_hidden_size"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dff", "dim_ff", "d_inner"), 2 * WIDTH
    ),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "mlp_dim"), 2 * WIDTH),
    **dict.fromkeys(("feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size"), 2 * WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_value_heads", "index_n_heads"), HEADS),
    **dict.fromkeys(("linear_num_key_heads",), HEADS // 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "dim_head", "swa_head_dim", "v_head_dim"), HEAD_DIM),
    **dict.fromkeys(("kv_channels", "linear_head_dim", "linear_key_head_dim"), HEAD_DIM),
    **dict.fromkeys(("linear_value_head_dim", "attention_head_size", "index_head_dim"), HEAD_DIM),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), HEAD_DIM // 2),
    **dict.fromkeys(("qk_head_dim",), HEAD_DIM),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    **dict.fromkeys(("topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("zero_expert_num",), 2),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), 128
    ),
    **dict.fromkeys(("model_max_length",), 128),
    **dict.fromkeys(("original_max_position_embeddings",), 64),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "local_attention"), 8),
    **dict.fromkeys(("window_size", "attention_chunk_size", "index_topk"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "linear_chunk_size"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), HEAD_DIM),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), HEAD_DIM),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("n_groups", "o_groups"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "router_hidden_size"), 8),
    **dict.fromkeys(("type_vocab_size",), 2),
    **dict.fromkeys(("block_size",), 16),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("num_mel_bins", "feature_size"), 16),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 32),
    **dict.fromkeys(("query_pre_attn_scalar",), HEAD_DIM),
}
"""What a field of this name is at most."""

LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    *("num_encoder_layers", "num_decoder_layers", "num_blocks", "depth", "conf_num_hidden_layers"),
    *("num_layers_per_stack", "num_global_layers"),
)
INTERVALS = (
    *("full_attention_interval", "sliding_window_pattern", "no_rope_layer_interval", "layer_group_size"),
    *("global_attn_every_n_layers", "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval"),
    *("attn_layer_period", "expert_layer_period", "_sliding_window_pattern", "global_attn_every_n_layers"),
)
"""Every how many layers another kind comes."""
FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "attn_layer_offset")
KEY_VALUE_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "swa_num_key_value_heads",
    "kv_n_heads",
    "num_query_groups",
)
QUERY_HEADS = {"swa_num_key_value_heads": "swa_num_attention_heads"}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a config of `model_type` for a model of some 100,000 parameters, dropout off.

    Raises:
        UnknownNameError: the installed transformers has no such type.
        Exception: whatever the config raises that cannot be built with these sizes.
    """
    check_model_type("coverage", model_type)
    own = OVERRIDES.get(model_type, {})
    config_class = CONFIG_MAPPING[model_type]
    try:
        default = config_class()
    except Exception:  # some take no defaults
        return config_class(**own)
    return shrink(default, own)


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return `config` with small sizes, and all else as it is."""
    return shrink(config, _changed_fields(config))


def _changed_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of `config` that differ from its class's defaults and that shrinking leaves alone."""
    try:
        default = type(config)().to_dict()
    except Exception:  # some take no defaults
        default = {}
    small = small_fields(config)
    changed: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        inner = vars(config).get(name)
        if isinstance(inner, PreTrainedConfig):
            changed[name] = _changed_fields(inner)
        elif name not in small and (name not in default or default[name] != value):
            changed[name] = value
    return changed


def shrink(config: PreTrainedConfig, own: dict[str, Any]) -> PreTrainedConfig:
    """Return a new config of the same class with small sizes, `own` over all of these."""
    return type(config)(**{**small_fields(config), **own_fields(config, own)})


def own_fields(config: PreTrainedConfig, own: dict[str, Any]) -> dict[str, Any]:
    """Return the overrides of `config` itself; a dict for a sub-config goes over that one's small fields."""
    fields: dict[str, Any] = {}
    for name, value in own.items():
        inner = vars(config).get(name)
        if isinstance(inner, PreTrainedConfig) and isinstance(value, dict):
            value = shrink(inner, value)
        fields[name] = value
    return fields


def small_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of `config` that a tiny model has otherwise."""
    fields = config.to_dict()
    num_layers, lists = _shrink_lists(fields)
    small: dict[str, Any] = dict(lists)
    for name, value in fields.items():
        if name in small or name == "model_type":
            continue
        inner = vars(config).get(name)
        if isinstance(inner, PreTrainedConfig):
            small[name] = shrink(inner, {})
        elif name == "head_dim" and value is not None and value == fields.get("qk_rope_head_dim"):
            small[name] = SIZES["qk_rope_head_dim"]  # what rotary tables are made from
        elif name in LAYER_COUNTS and _is_int(value):
            small[name] = min(value, num_layers) if value == 1 else num_layers
        elif name in KEY_VALUE_HEADS and _is_int(value):
            queries = fields.get(QUERY_HEADS.get(name, ""), fields.get("num_attention_heads"))
            small[name] = min(value, HEADS if value == queries else HEADS // 2)
        elif name in SIZES and _is_int(value):
            small[name] = min(value, SIZES[name])
        elif name in SIZES and isinstance(value, list | tuple) and all(map(_is_int, value)):
            small[name] = [min(item, SIZES[name]) for item in value]
        elif name in INTERVALS and _is_int(value):
            small[name] = min(value, 2)
        elif name in FIRST_LAYERS and _is_int(value):
            small[name] = min(value, 1)
        elif name == "num_kv_shared_layers" and _is_int(value):
            small[name] = min(value, num_layers // 2)
        elif name == "moe_layer_end_index" and _is_int(value):
            small[name] = num_layers - 1
        elif _is_random(name) and isinstance(value, int | float) and not isinstance(value, bool):
            small[name] = type(value)(0)
        elif name.endswith(("token_id", "token_index")) and _is_int(value) and value >= VOCABULARY:
            small[name] = VOCABULARY - 1 - len([n for n in small if n.endswith(("token_id", "token_index"))])
        elif isinstance(value, dict) and name.startswith("rope_"):
            small[name] = _shrink_rope(value, fields)
    if "use_cache" in fields:
        small["use_cache"] = False
    if "per_layer_config" in small:
        small["per_layer_config"] = {
            str(layer): {name: _in_ratio(small[name], value, fields[name]) for name, value in own.items()}
            for layer, own in enumerate(small["per_layer_config"])
            if own
        }
    return small


def _in_ratio(small: Any, value: Any, default: Any) -> Any:
    """Return what one layer has in place of `small`, in the ratio that `value` has to the default."""
    return max(1, small * value // default) if _is_int(small) and _is_int(value) else value


def _shrink_lists(fields: dict[str, Any]) -> tuple[int, dict[str, list[Any]]]:
    """Return the number of layers, and the per-layer lists with one layer of each kind, repeated up to that."""
    count = next((fields[name] for name in LAYER_COUNTS if _is_int(fields.get(name))), 0)
    lists = {name: list(value) for name, value in fields.items() if isinstance(value, list | tuple)}
    if fields.get("per_layer_config"):
        own = {int(layer): values for layer, values in fields["per_layer_config"].items()}
        lists["per_layer_config"] = [own.get(layer, {}) for layer in range(count)]
    per_layer = {name: value for name, value in lists.items() if len(value) == count > 1}
    indices = {name: value for name, value in lists.items() if _is_index_list(name, value)}
    columns = {name: value for name, value in per_layer.items() if name not in indices}
    kinds = list(dict.fromkeys(zip(*map(_hashable, columns.values()), strict=True))) if columns else []
    where = [list(zip(*map(_hashable, columns.values()), strict=True)).index(kind) for kind in kinds]
    num_layers = max(LAYERS, len(kinds))
    small: dict[str, list[Any]] = {}
    for name, value in columns.items():
        most = SIZES.get(name)
        row = [value[where[layer % len(kinds)]] for layer in range(num_layers)]
        small[name] = [min(item, most) for item in row] if most and all(map(_is_int, row)) else row
    for name, value in indices.items():
        covers_all = len(value) == count
        small[name] = list(range(num_layers)) if covers_all else list(range(1, num_layers, 2))
    return num_layers, small


def _is_index_list(name: str, value: list[Any]) -> bool:
    """Return whether a list names layers by number: increasing integers under such a name."""
    named = any(part in name for part in ("layers", "layer_ids", "idxs", "indexes"))
    return (
        named
        and len(value) > 1
        and all(map(_is_int, value))
        and value == sorted(set(value))
        and value != [0, 1]
    )


def _shrink_rope(value: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return rotary parameters whose sections and positions fit the small head."""
    small: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            small[name] = _shrink_rope(item, fields)
        elif name == "mrope_section":
            half = int(HEAD_DIM * value.get("partial_rotary_factor", 1.0)) // 2
            rest = [max(1, half * size // sum(item)) for size in item[1:]]
            small[name] = [half - sum(rest), *rest]
        elif name == "original_max_position_embeddings" and _is_int(item):
            small[name] = min(item, 64)
        else:
            small[name] = item
    return small


def _hashable(values: list[Any]) -> list[Any]:
    return [str(value) if isinstance(value, list | dict) else value for value in values]


def _is_random(name: str) -> bool:
    """Return whether a field makes training draw random numbers: two models would draw others."""
    return name in ("mask_time_prob", "mask_feature_prob") or any(
        part in name for part in ("dropout", "pdrop", "drop_path", "layerdrop", "jitter")
    )


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
