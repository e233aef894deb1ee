"""Sizes and contestants of `layer_norm`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.cases.case import ROWS, Case, Function, find_liger, tensor
from fxopt.kernels import layer_norm


def make_cases() -> list[Case]:
    """Return the sizes timed of `layer_norm`."""

    def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, 1e-5)

    liger = find_liger()
    cases = []
    for width in (2048, 4096, 8192, 16384):
        contestants: dict[str, Function] = {
            "fxopt": lambda x, weight, bias: layer_norm.layer_norm(x, weight, bias, eps=1e-5),
            "eager": eager,
            "compile": torch.compile(eager, dynamic=False),
        }
        if liger is not None:
            contestants["liger"] = lambda x, weight, bias: liger.liger_layer_norm(x, weight, bias, 1e-5)
        size = ROWS * width * 2

        def make(rows: int, width: int = width) -> list[torch.Tensor]:
            return [tensor(rows, width), tensor(width), tensor(width)]

        cases.append(Case("layer_norm", f"{ROWS} x {width}", make, contestants, 2 * size, 3 * size))
    return cases
