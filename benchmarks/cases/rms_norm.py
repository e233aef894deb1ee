"""Sizes and contestants of `rms_norm`."""

from __future__ import annotations

import torch

from benchmarks.cases.case import ROWS, Case, Function, find_liger, tensor
from fxopt.kernels import rms_norm


def make_cases() -> list[Case]:
    """Return the sizes timed of `rms_norm`."""

    def eager(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * wide.to(x.dtype)

    liger = find_liger()
    cases = []
    for width in (2048, 4096, 8192, 16384):
        contestants: dict[str, Function] = {
            "fxopt": lambda x, weight: rms_norm.rms_norm(x, weight, eps=1e-6),
            "eager": eager,
            "compile": torch.compile(eager, dynamic=False),
        }
        if liger is not None:
            contestants["liger"] = lambda x, weight: liger.liger_rms_norm(x, weight, 1e-6)
        size = ROWS * width * 2

        def make(rows: int, width: int = width) -> list[torch.Tensor]:
            return [tensor(rows, width), tensor(width)]

        cases.append(Case("rms_norm", f"{ROWS} x {width}", make, contestants, 2 * size, 3 * size))
    return cases
