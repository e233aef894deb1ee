"""Sizes and contestants of `glu`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.cases.case import ROWS, Case, Function, Passes, find_liger, tensor
from fxopt.kernels import glu


def make_cases() -> list[Case]:
    """Return the sizes timed of `glu`."""

    def eager(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up

    def launches(tensors: list[torch.Tensor]) -> Passes:
        gate, up = tensors
        dy = torch.randn_like(gate)
        return (
            lambda: glu.launch_forward(gate, up, "silu"),
            lambda: glu.launch_backward(dy, gate, up, "silu", True, True),
        )

    liger = find_liger()
    cases = []
    for width in (8192, 18944):
        contestants: dict[str, Function] = {
            "fxopt": lambda gate, up: glu.glu(gate, up, act="silu"),
            "eager": eager,
            "compile": torch.compile(eager, dynamic=False),
        }
        if liger is not None:
            contestants["liger"] = liger.liger_swiglu
        size = ROWS * width * 2

        def make(rows: int, width: int = width) -> list[torch.Tensor]:
            return [tensor(rows, width), tensor(rows, width)]

        cases.append(
            Case("glu", f"{ROWS} x {width}", make, contestants, 3 * size, 5 * size, launches=launches)
        )
    return cases
