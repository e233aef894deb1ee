"""What is doubtful about the libraries that a model's layers come from, and about what its config says of them."""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from torch import nn

from fxopt.capture.modules import tensors_of, walk

OLDEST = {"bitsandbytes": "0.50", "peft": "0.19"}
"""The oldest releases whose layers fxopt is tested on; those before spell them in ways that it does not read."""


def find_doubts(model: nn.Module) -> tuple[str, ...]:
    """Return one line per library of `model`'s layers that is too old, and one if its weights are not quantized.

    None of it makes a result wrong: what is not recognized stays stock.
    """
    packages = {type(module).__module__.partition(".")[0] for module in walk(model)}
    lines: list[str] = []
    for package, oldest in OLDEST.items():
        version = str(getattr(sys.modules.get(package), "__version__", ""))
        if package in packages and version and _numbers(version) < _numbers(oldest):
            lines.append(
                f"{package} {version}: its layers are not recognized and stay stock, "
                f"expected {oldest} or newer: pip install -U {package}"
            )
    if _is_said_to_be_quantized(model) and not any(map(_is_quantized, tensors_of(model))):
        lines.append(
            "the config says that the weights are quantized, but all of them are plain floating-point numbers: "
            "a copy of the quantized base is trained, in full size"
        )
    return tuple(lines)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _is_said_to_be_quantized(model: nn.Module) -> bool:
    """Return whether a config of `model` has the settings of a quantization, as transformers puts them there."""
    return any(_settings_in(getattr(module, "config", None)) for module in walk(model))


def _settings_in(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _is_quantized(tensor: torch.Tensor) -> bool:
    """Return whether `tensor` holds codes, or is of a class made of other tensors."""
    is_code = isinstance(tensor, nn.Parameter) and (not tensor.is_floating_point() or tensor.itemsize < 2)
    return is_code or hasattr(tensor, "__tensor_flatten__") or hasattr(tensor, "quant_state")
