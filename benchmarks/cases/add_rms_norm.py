"""Sizes and contestants of `add_rms_norm`."""

from __future__ import annotations

import torch

from benchmarks.cases.case import ROWS, Case, Function, find_liger, tensor
from fxopt.kernels import add_rms_norm

Pair = tuple[torch.Tensor, torch.Tensor]


def make_cases() -> list[Case]:
    """Return the sizes timed of `add_rms_norm`."""

    def eager(x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor) -> Pair:
        h = skip + x
        wide = h.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return h, weight * wide.to(h.dtype)

    fused_by_liger = getattr(find_liger(), "liger_fused_add_rms_norm", None)

    def liger(x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor) -> Pair:
        assert fused_by_liger is not None
        y, h = fused_by_liger(x, skip, weight, 1e-6)
        return h, y

    cases = []
    for width in (2048, 4096, 8192, 16384):
        contestants: dict[str, Function] = {
            "fxopt": lambda x, skip, weight: add_rms_norm.add_rms_norm(x, skip, weight, eps=1e-6),
            "eager": eager,
            "compile": torch.compile(eager, dynamic=False),
        }
        if fused_by_liger is not None:
            contestants["liger"] = liger
        size = ROWS * width * 2

        def make(rows: int, width: int = width) -> list[torch.Tensor]:
            return [tensor(rows, width), tensor(rows, width), tensor(width)]

        cases.append(Case("add_rms_norm", f"{ROWS} x {width}", make, contestants, 4 * size, 4 * size))
    return cases
