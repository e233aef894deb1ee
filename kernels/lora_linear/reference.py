"""What a layer with adapters is, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[tuple[Tensor, Tensor, Tensor, float]],
) -> Tensor:
    """Return one layer in plain torch: the specification. `adapters` are (input, A, B, scale)."""
    y = torch.nn.functional.linear(x, weight, bias)
    for own, a, b, scale in adapters:
        y = y + (own.to(a.dtype) @ a.t() @ b.t()) * scale
    return y.to(x.dtype)
