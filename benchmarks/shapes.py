"""Models of real width and random weights, trained whole or by adapters: what the scripts that predict build."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks import stacks

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-7b": (
        "qwen2",
        {
            "num_hidden_layers": 28,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
    ),
    "llama3.2-1b": (
        "llama",
        {
            "num_hidden_layers": 16,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2-2b": (
        "gemma2",
        {
            "num_hidden_layers": 26,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 256000,
        },
    ),
    "olmo2-1b": (
        "olmo2",
        {
            "num_hidden_layers": 16,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 100352,
            "tie_word_embeddings": False,
        },
    ),
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
MODES = ("full", "lora", "qlora")


def build(
    name: str, mode: str, device: str, *, tiny: bool = False, layers: int | None = None, length: int = 8192
) -> nn.Module:
    """Return the model in training mode, made on `device`, for up to `length` tokens; all its layers, or so many."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, sizes = SHAPES[name]
    sizes = {**sizes, **(TINY if tiny else {}), "max_position_embeddings": length}
    sizes |= {} if layers is None else {"num_hidden_layers": layers}
    config = AutoConfig.for_model(model_type, **sizes, use_cache=False)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if mode == "qlora":
        quantize(model, device)
    if mode != "full":
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(
            r=stacks.RANK,
            lora_alpha=stacks.RANK,
            target_modules=stacks.PROJECTIONS,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, adapters)
    return model.train()


def quantize(model: Any, device: str) -> None:
    """Put NF4 weights with nested scales in the place of all linear layers but the head."""
    import bitsandbytes

    library: Any = bitsandbytes.nn
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer is head:
                continue
            made = library.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
            made.weight = library.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", module=made
            )
            made.bias = layer.bias
            setattr(parent, name, made.to(device))
    model.is_loaded_in_4bit = True
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def make_batch(model: nn.Module, length: int, device: str, count: int = 1) -> dict[str, torch.Tensor]:
    """Return `count` sequences, each token a label."""
    ids = torch.randint(0, model.config.vocab_size, (count, length), device=device)  # pyright: ignore
    return {"input_ids": ids, "labels": ids}
