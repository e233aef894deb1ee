"""Models from Hugging Face configs alone: small ones to train, and any size on the meta device."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from fxopt.errors import FxoptError, UnknownNameError

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "use_cache": False,
    # experts
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_hidden_size"), 128),
    **dict.fromkeys(EXPERTS, 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "moe_num_shared_experts"), 1),
    # attention over compressed keys and values
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 64),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 32),
    # encoders and decoders
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 1024),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 8),
}
"""About 10 M parameters with a vocabulary of 4096 in the Llama architecture."""

MOST_TOKENS = 4096

MOST_PARAMETERS = 25_000_000
"""The largest model that the demo calls small: each of its steps runs twice, maybe on a laptop's processor."""


def build_small_model(model_type: str, vocabulary_size: int) -> torch.nn.Module:
    """Return a randomly initialized causal LM of architecture `model_type`, on the CPU, in fp32.

    Raises:
        UnknownNameError: no such model type; the text lists the nearest.
        FxoptError: the architecture has no causal LM, or none this small can be built.
    """
    default = default_config(model_type)
    fields = {*default.to_dict(), *default.attribute_map}
    overrides = {name: value for name, value in SMALL.items() if name in fields}
    if fields.intersection(EXPERTS) and "moe_intermediate_size" not in fields:
        overrides["intermediate_size"] = SMALL["intermediate_size"] // SMALL["num_local_experts"]
    if "kv_lora_rank" in fields:  # compressed keys are one per query head
        overrides["num_key_value_heads"] = SMALL["num_attention_heads"]
    try:
        config = AutoConfig.for_model(model_type, **overrides, vocab_size=vocabulary_size)
        _check_size(model_type, config)
        model = build_model(config)
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    except FxoptError:
        raise
    except Exception as error:
        raise FxoptError(
            f"--arch {model_type}: no small model could be built with {_listed(overrides)}: {_first_line(error)}\n"
            "choose another architecture, such as llama, qwen2, gemma2 or olmo2"
        ) from error
    return model


def _check_size(model_type: str, config: PreTrainedConfig) -> None:
    """Raise where the model of `config` is no small one; nothing of its size is allocated."""
    number = sum(parameter.numel() for parameter in build_meta_model(config).parameters())
    if number > MOST_PARAMETERS:
        raise FxoptError(
            f"--arch {model_type}: the smallest model that the demo knows how to build has {number / 1e6:,.0f} M "
            f"parameters, expected at most {MOST_PARAMETERS / 1e6:.0f} M: its config "
            "names its sizes in ways of its own\n"
            f"choose another architecture, such as llama, qwen2, gemma2 or olmo2; fxopt report --arch {model_type} "
            "takes any size"
        )


def build_meta_model(config: PreTrainedConfig) -> torch.nn.Module:
    """Return the causal LM of `config` on the meta device: all shapes, no storage.

    Raises:
        FxoptError: the model's own code cannot make one of it.
    """
    try:
        with torch.device("meta"):
            return build_model(config)
    except FxoptError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {_first_line(error)}"
        raise FxoptError(
            f"{config.model_type}: cannot be built from this config, expected fields that it knows, got {told}\n"
            "change the config, or the field given by --set"
        ) from error


def find_config(source: str | None, model_type: str | None, fields: Sequence[str] = ()) -> PreTrainedConfig:
    """Return the config at `source`, else the default one of `model_type`, with `fields` as "name=value" over it.

    Raises:
        UnknownNameError: no such model type, or no such field; the text lists the nearest.
        FxoptError: no config there, a field without a value, or fields that do not go together.
    """
    config = default_config(model_type) if model_type is not None else load_config(str(source))
    if not fields:
        return config
    known = {**config.to_dict(), **config.attribute_map}
    given = dict(_read_field(text, known) for text in fields)
    written = PreTrainedConfig.get_config_dict(source)[0] if source is not None else {}
    try:
        made = type(config).from_dict({**written, **given})
    except Exception as error:
        told = ": ".join(line.strip(" :") for line in str(error).splitlines() if line.strip())
        raise FxoptError(
            f"--set: {config.model_type} takes no {', '.join(fields)}: {told[:300]}\ngive other values"
        ) from error
    for name, value in given.items():
        if isinstance(value, int) and value < 0 and _is_count(type(config), {**written, **given}, name):
            raise FxoptError(
                f"--set: {name} counts what {config.model_type} is made of, expected at least 0, got {value}\n"
                "give another value"
            )
    return made


def _is_count(config_class: type[PreTrainedConfig], fields: dict[str, Any], name: str) -> bool:
    """Return whether a model takes the negative number of the field `name` for none of what a positive one counts."""
    forms = [_form_of(config_class, {**fields, name: value}) for value in (fields[name], 0, -fields[name])]
    return forms[0] is not None and forms[0] == forms[1] != forms[2]


def _form_of(config_class: type[PreTrainedConfig], fields: dict[str, Any]) -> Any:
    """Return the parameters' shapes by name of the model of these fields, None where none can be built."""
    try:
        model = build_meta_model(config_class.from_dict(fields))
    except Exception:  # the model's own code may raise anything
        return None
    return {key: parameter.shape for key, parameter in model.named_parameters()}


def _read_field(text: str, known: dict[str, Any]) -> tuple[str, Any]:
    """Return the name and the value of "name=value": a value in JSON, else the text as it is."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise FxoptError(
            f"--set: expected a field of the config and its value, got {text!r}\ntry --set num_hidden_layers=2"
        )
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=5, cutoff=0.0)
        raise UnknownNameError(
            f"--set: unknown field {name!r}, expected one of the config; the nearest are {', '.join(nearest)}"
        )
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def default_config(model_type: str) -> PreTrainedConfig:
    """Return the default config of `model_type`.

    Raises:
        UnknownNameError: no such model type; the text lists the nearest.
    """
    check_model_type("--arch", model_type)
    return AutoConfig.for_model(model_type)


def check_model_type(subject: str, model_type: str) -> None:
    """Check that the installed transformers has `model_type`; `subject` is what named it.

    Raises:
        UnknownNameError: it has not; the text lists the nearest.
    """
    known = list(CONFIG_MAPPING.keys())
    if model_type not in known:
        nearest = difflib.get_close_matches(model_type, known, n=5, cutoff=0.0)
        raise UnknownNameError(
            f"{subject}: unknown model type {model_type!r}, expected one that transformers knows; "
            f"the nearest are {', '.join(nearest)}"
        )


def default_tokens(config: PreTrainedConfig) -> int:
    """Return how many tokens a sequence has where nobody says: `MOST_TOKENS`, or the power of two that a model takes.

    >>> default_tokens(default_config("llama")), default_tokens(default_config("roberta"))
    (2048, 512)
    """
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or MOST_TOKENS
    return min(MOST_TOKENS, 1 << (positions.bit_length() - 1))


def load_config(source: str) -> PreTrainedConfig:
    """Return the config at `source`: a folder, a `config.json`, or a name on the Hugging Face hub.

    Raises:
        FxoptError: there is none, or it needs code of its own to be loaded.
    """
    is_path = Path(source).exists() or source.startswith(("/", ".", "~")) or source.count("/") > 1
    if is_path and not Path(source).exists():
        raise FxoptError(f"{source}: no such folder or file, expected one with a model config")
    if is_path and Path(source).suffix == ".py":
        raise FxoptError(
            f"{source}: a Python file, expected a folder with a config.json, a hub name, or --arch MODEL_TYPE\n"
            "of a model of your own, print fxopt.trace(model), fxopt.explain(model) or fxopt.plan(model) there"
        )
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # it logs each of its retries
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise FxoptError(
            f"{source}: no model config found {'there' if is_path else 'under this hub name'}: {_first_line(error)}\n"
            "give a folder with a config.json, a hub name, or --arch MODEL_TYPE"
        ) from error


def build_model(config: PreTrainedConfig) -> torch.nn.Module:
    """Return the causal LM of `config` on the default device."""
    logging.set_verbosity_error()
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise FxoptError(
                f"{config.model_type}: transformers has no causal language model of this type, expected a decoder "
                "with a language-model head\nchoose such a type: llama, qwen2, gemma2, olmo2 and others"
            ) from error
        raise


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _listed(overrides: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in overrides.items())
