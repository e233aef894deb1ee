"""What the two steps are together: the reference in plain torch, and its gradients written out."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import wide_dtype
from fxopt.kernels.rms_norm.reference import plain_backward as plain_norm_backward
from fxopt.kernels.rms_norm.reference import rms_norm_reference
from fxopt.kernels.rope.reference import new_like, rope_reference, rotated

Four = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclasses.dataclass(frozen=True)
class Form:
    """What is computed besides the tensors, in the order of the op's arguments."""

    eps: float
    offset: float
    cast_first: bool
    per_head: bool
    norm_dtype: torch.dtype
    pairing: str
    out_pairing: str
    start: int
    length: int
    sign: int
    head_major: list[bool]

    def astuple(self) -> tuple[Any, ...]:
        """Return the values as the ops take them."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def norm_rope_reference(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
    per_head: bool = True,
    norm_dtype: torch.dtype | None = None,
    pairing: str = "half",
    out_pairing: str = "",
    start: int = 0,
    length: int = 0,
    sign: int = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return `x`, [batch, tokens, heads, D], normalized and rotated, in plain torch: the specification.

    weight: [D], or [heads * D] where not `per_head`; cos, sin: [batch or 1, tokens, R or R/2].
    """
    rows = x if per_head else x.flatten(-2)
    n = rms_norm_reference(
        rows, weight, eps=eps, offset=offset, cast_first=cast_first, out_dtype=norm_dtype
    ).reshape(x.shape)
    return rope_reference(
        n,
        cos,
        sin,
        pairing=pairing,
        out_pairing=out_pairing,
        start=start,
        length=length,
        sign=sign,
        out_dtype=out_dtype,
    )


def plain_forward(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *attributes: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """Return q and k normalized and rotated, in plain torch."""
    *values, dtype = attributes
    form = Form(*values)
    given = dict(zip((field.name for field in dataclasses.fields(form)), form.astuple(), strict=True))
    head_major = given.pop("head_major")

    def run(x: Tensor | None, weight: Tensor | None, is_head_major: bool) -> Tensor | None:
        if x is None:
            return None
        y = norm_rope_reference(x, weight, cos, sin, **given, out_dtype=dtype)
        return new_like(x, dtype, is_head_major).copy_(y)

    return run(q, q_weight, head_major[0]), run(k, k_weight, head_major[1])


def plain_backward(
    dq: Tensor | None,
    dk: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *attributes: Any,
) -> Four:
    """Return the gradients of q, k and of their weights, in plain torch; None where that of the result is None."""
    *values, need_weight = attributes
    form = Form(*values)

    def run(
        dy: Tensor | None, x: Tensor | None, weight: Tensor | None, is_head_major: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if dy is None or x is None:
            return None, None
        dn = rotated(
            dy, cos, sin * form.sign, form.pairing, form.out_pairing, form.start, form.length, transposed=True
        )
        wide = wide_dtype(x.dtype)
        rows, dn = x.to(wide), dn.to(wide)
        if not form.per_head:
            rows, dn = rows.flatten(-2), dn.flatten(-2)
        rstd = torch.rsqrt(rows.pow(2).mean(-1) + form.eps).reshape(1, -1)
        dx, dweight, _ = plain_norm_backward(
            dn, rows, weight, None, rstd, form.offset, False, "silu", False, 1,
            True, need_weight and weight is not None, False,
        )  # fmt: skip
        assert dx is not None
        return new_like(x, x.dtype, is_head_major).copy_(dx.reshape(x.shape)), dweight

    (dq, dq_weight), (dk, dk_weight) = (
        run(dy, x, weight, is_head_major)
        for dy, x, weight, is_head_major in zip(
            (dq, dk), (q, k), (q_weight, k_weight), form.head_major, strict=True
        )
    )
    return dq, dk, dq_weight, dk_weight
