"""Sizes and contestants of `cross_entropy`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.cases.case import CLASSES, Case, Function, find_liger, tensor
from fxopt.kernels.cross_entropy import cross_entropy


def make_cases() -> list[Case]:
    """Return the sizes timed of `cross_entropy`."""

    def eager(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float(), labels)

    rows = 4096
    contestants: dict[str, Function] = {
        "fxopt": cross_entropy,
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    liger = find_liger()
    if liger is not None:
        contestants["liger"] = liger.liger_cross_entropy

    def make(rows: int) -> list[torch.Tensor]:
        return [tensor(rows, CLASSES), torch.randint(CLASSES, (rows,), device="cuda")]

    size = rows * CLASSES * 2
    return [Case("cross_entropy", f"{rows} x {CLASSES}", make, contestants, size, 2 * size, rows=rows)]
