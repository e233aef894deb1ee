"""What a benchmarked kernel is made of, and the peers where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Function = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
ROWS = 8192
CLASSES = 128256


@dataclass
class Case:
    """One kernel at one size; the functions take the tensors that `make(rows)` returns."""

    kernel: str
    size: str
    make: Callable[[int], list[torch.Tensor]]
    contestants: dict[str, Function]
    forward_bytes: int = 0
    backward_bytes: int = 0
    rows: int = ROWS
    gemms: Callable[[list[torch.Tensor]], Callable[[], None]] | None = None
    checked_rows: int = 0
    """Rows the op is checked with, where those that are timed would not fit in float64."""


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensor(*shape: int, scale: float = 1.0, grad: bool = True) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(torch.bfloat16).requires_grad_(grad)


def find_liger() -> Any | None:
    try:
        from liger_kernel.transformers import functional  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return functional


def find_cce() -> Function | None:
    try:
        from cut_cross_entropy import linear_cross_entropy as cce  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return cce
