"""Sizes and contestants of `glu`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.cases.case import ROWS, Case, Function, find_liger, tensor
from fxopt.kernels import glu

SPLIT = glu.Form("silu")
PACKED = glu.Form("silu", layout="packed")
INTERLEAVED = glu.Form(
    "sigmoid_alpha", alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0, layout="interleaved"
)


def eager_split(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def eager_packed(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return up * F.silu(gate)


def eager_interleaved(both: torch.Tensor) -> torch.Tensor:
    gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def make_cases() -> list[Case]:
    """Return the sizes timed of `glu`: two tensors, the halves of one, and the columns of one."""
    return [
        make_case("", SPLIT, eager_split, 8192),
        make_case("", SPLIT, eager_split, 18944),
        make_case(" packed", PACKED, eager_packed, 8192),
        make_case(" packed", PACKED, eager_packed, 18944),
        make_case(" interleaved", INTERLEAVED, eager_interleaved, 2880),
    ]


def make_case(name: str, form: glu.Form, eager: Function, width: int) -> Case:
    """Return the case of one layout; what it reads and writes are three tensors forward and five backward."""

    def fxopt(*tensors: torch.Tensor) -> torch.Tensor:
        return glu.glu(*tensors, **vars(form))

    def make(rows: int) -> list[torch.Tensor]:
        if form.layout != "split":
            return [tensor(rows, 2 * width)]
        return [tensor(rows, width), tensor(rows, width)]

    contestants: dict[str, Function] = {
        "fxopt": fxopt,
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    liger = find_liger()
    if liger is not None and form.act == "silu":
        swiglu = liger.liger_swiglu
        contestants["liger"] = swiglu if form.layout == "split" else lambda both: swiglu(*both.chunk(2, -1))
    size = ROWS * width * 2
    return Case("glu", f"{ROWS} x {width}{name}", make, contestants, 3 * size, 5 * size)
