"""A model with four-bit weights, as bitsandbytes makes them; on the meta device all forms of these and no value."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxopt.errors import FxoptError

BLOCKSIZE = 64
"""Weights that share a scale, and scales that share one of their own: bitsandbytes' defaults."""
NESTED_BLOCKSIZE = 256
LEVELS = 16
NESTED_LEVELS = 256


def quantize(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give the linear layers of `model` NF4 weights with nested scales that compute in `dtype`, in place.

    The layer that makes the logits stays as it is, as transformers has it.

    Raises:
        FxoptError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise FxoptError(
            f"--4bit: bitsandbytes is not installed ({error})\npip install bitsandbytes"
        ) from error
    library: Any = bitsandbytes
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer is not head:
                setattr(parent, name, _quantized(library, layer, dtype))
    marked: Any = model
    marked.is_loaded_in_4bit = True  # peft adds four-bit adapters to a model that says so
    return model


def _quantized(library: Any, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    has_bias = layer.bias is not None  # pyright: ignore[reportUnnecessaryComparison]
    made = library.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=has_bias,
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )
    weight = layer.weight.detach()
    made.weight = (
        _packed_form(library, made, weight, dtype) if weight.is_meta else _packed(library, made, weight)
    )
    made.quant_state = made.weight.quant_state
    if has_bias:
        made.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return made


def _packed(library: Any, made: nn.Module, weight: torch.Tensor) -> Any:
    """Return the weight in four bits, its scales in eight."""
    packed = library.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
    )
    return packed.to(weight.device)


def _packed_form(library: Any, made: nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> Any:
    """Return the form of the weight in four bits, its scales in eight; nothing of it has a value."""

    def on_meta(size: int, of: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    num_scales = -(-weight.numel() // BLOCKSIZE)
    nested = library.functional.QuantState(
        absmax=on_meta(-(-num_scales // NESTED_BLOCKSIZE), torch.float32),
        code=on_meta(NESTED_LEVELS, torch.float32),
        blocksize=NESTED_BLOCKSIZE,
        dtype=torch.float32,
    )
    state = library.functional.QuantState(
        absmax=on_meta(num_scales, torch.uint8),
        shape=weight.shape,
        code=on_meta(LEVELS, torch.float32),
        blocksize=BLOCKSIZE,
        quant_type="nf4",
        dtype=dtype,
        offset=on_meta(1, torch.float32)[0],
        state2=nested,
    )
    packed = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
    return library.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=made
    )
