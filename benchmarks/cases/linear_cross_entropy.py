"""Sizes and contestants of `linear_cross_entropy`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.cases.case import CLASSES, ROWS, Case, Function, find_cce, find_liger, tensor
from fxopt.kernels.linear_cross_entropy import chunks, linear_cross_entropy


def make_cases() -> list[Case]:
    """Return the sizes timed of `linear_cross_entropy`."""

    def eager(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(h, weight).float(), labels)

    def gemms(tensors: list[torch.Tensor]) -> Callable[[], None]:
        h, weight, _ = (value.detach() for value in tensors)
        most = chunks.plan_chunk_bytes(CLASSES, 2, trains_weight=tensors[1].requires_grad)
        chunk = chunks.plan_chunk_rows(h.shape[0], CLASSES * 2, most)
        logits, dh = h.new_empty(chunk, CLASSES), torch.empty_like(h)
        dweight = torch.empty_like(weight) if tensors[1].requires_grad else None

        def products() -> None:
            for start in range(0, h.shape[0], chunk):
                part = h[start : start + chunk]
                out = logits[: part.shape[0]]
                torch.mm(part, weight.t(), out=out)
                torch.mm(out, weight, out=dh[start : start + chunk])
                if dweight is not None:
                    dweight.addmm_(out.t(), part)

        return products

    liger, cce = find_liger(), find_cce()
    cases = []
    for width in (2048, 4096):
        for trainable in (False, True):
            contestants: dict[str, Function] = {
                "fxopt": linear_cross_entropy,
                "eager": eager,
                "compile": torch.compile(eager, dynamic=False),
            }
            if liger is not None:
                contestants["liger"] = liger.liger_fused_linear_cross_entropy
            if cce is not None:
                contestants["cce"] = lambda h, weight, labels: cce(h, weight, labels, filter_eps=None)

            def make(rows: int, width: int = width, trainable: bool = trainable) -> list[torch.Tensor]:
                weight = tensor(CLASSES, width, scale=width**-0.5, grad=trainable)
                return [tensor(rows, width), weight, torch.randint(CLASSES, (rows,), device="cuda")]

            head = "trainable" if trainable else "frozen"
            size = f"{ROWS} x {width} x {CLASSES}, {head} head"
            cases.append(Case("linear_cross_entropy", size, make, contestants, gemms=gemms))
    return cases
