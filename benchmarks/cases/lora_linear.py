"""Sizes and contestants of `lora_linear`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.cases.case import ROWS, Case, Function, tensor
from fxopt.kernels.lora_linear import lora_linear

RANK, SCALE = 16, 2.0
FEW_ROWS = 512
FORMS: dict[str, tuple[int, tuple[int, ...]]] = {
    "q, k, v": (3584, (3584, 512, 512)),
    "o": (3584, (3584,)),
    "gate, up": (3584, (18944, 18944)),
    "down": (18944, (3584,)),
}
"""The projections of Qwen2.5-7B that share an input."""


def make_cases() -> list[Case]:
    """Return the projections with adapters of rank 16, for many and for few tokens."""
    return [make_case(name, rows) for rows in (ROWS, FEW_ROWS) for name in FORMS]


def make_case(name: str, rows: int) -> Case:
    """Return the case of layers that share x, their weights frozen; what is left over the base's products is seen."""
    in_width, widths = FORMS[name]
    count = len(widths)

    def make(rows: int) -> list[torch.Tensor]:
        weights = [tensor(width, in_width, scale=in_width**-0.5, grad=False) for width in widths]
        a = [tensor(RANK, in_width, scale=in_width**-0.5) for _ in widths]
        return [tensor(rows, in_width), *weights, *a, *(tensor(width, RANK) for width in widths)]

    def split(rest: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, ...]]:
        return [rest[start : start + count] for start in range(0, 3 * count, count)]

    def fxopt(x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights, a, b = split(rest)
        none = [None] * count
        return lora_linear(x, weights, none, none, a, b, owners=range(count), scales=[SCALE] * count)

    def eager(x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layers = zip(*split(rest), strict=True)
        return tuple(F.linear(x, w) + F.linear(F.linear(x, a), b) * SCALE for w, a, b in layers)

    def gemms(tensors: list[torch.Tensor]) -> Callable[[], None]:
        x, *rest = tensors
        weights, *_ = split(tuple(rest))
        results = [torch.mm(x.detach(), weight.t()) for weight in weights]

        def run() -> None:
            for weight, result in zip(weights, results, strict=True):
                torch.mm(x.detach(), weight.t())
                torch.mm(result, weight)

        return run

    contestants: dict[str, Function] = {
        "fxopt": fxopt,
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    return Case("lora_linear", f"{rows} x {in_width} {name}", make, contestants, rows=rows, gemms=gemms)
