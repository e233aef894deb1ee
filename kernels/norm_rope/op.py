"""The op `fxopt::norm_rope`, its backward op, and the function that patterns call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import can_launch, next_power_of_two, register_gradient, register_op, wide_dtype
from fxopt.kernels.norm_rope.launches import launch_backward, launch_forward
from fxopt.kernels.norm_rope.reference import Form, Four, plain_backward, plain_forward
from fxopt.kernels.rms_norm.reference import promoted
from fxopt.kernels.rope.op import as_given, check_arguments, is_head_major, table_of, tokens_first
from fxopt.kernels.rope.reference import Pair, new_like

MOST_ITEMS = 8192
"""Of what is normalized together, its dims rounded up to powers of two: what a program of 16 warps holds."""


def fits(heads: int, size: int) -> bool:
    """Return whether a program holds what is normalized together where that is all heads of a token."""
    return next_power_of_two(heads) * next_power_of_two(size) <= MOST_ITEMS


def _fused_forward(q: Tensor, k: Tensor | None, *rest: Any) -> Pair:
    can = can_launch(q, k, *rest[:4], out_dtype=rest[-1])
    return (launch_forward if can else plain_forward)(q, k, *rest)


def _fused_backward(dq: Tensor | None, dk: Tensor | None, *rest: Any) -> Four:
    return (launch_backward if can_launch(dq, dk, *rest[:6]) else plain_backward)(dq, dk, *rest)


def _fake_forward(q: Tensor, k: Tensor | None, *rest: Any) -> Pair:
    *values, dtype = rest[4:]
    q_is_major, k_is_major = Form(*values).head_major
    return new_like(q, dtype, q_is_major), None if k is None else new_like(k, dtype, k_is_major)


def _fake_backward(
    dq: Tensor | None,
    dk: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *rest: Any,
) -> Four:
    *values, need_weight = rest[2:]
    head_major = Form(*values).head_major

    def made(dy: Tensor | None, x: Tensor | None, weight: Tensor | None, is_major: bool) -> Pair:
        if dy is None or x is None:
            return None, None
        dweight = None if weight is None or not need_weight else weight.new_empty(weight.shape)
        return new_like(x, x.dtype, is_major), dweight

    of_q = made(dq, q, q_weight, head_major[0])
    of_k = made(dk, k, k_weight, head_major[1])
    return of_q[0], of_k[0], of_q[1], of_k[1]


_TENSORS = "Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin"
_ATTRIBUTES = (
    "float eps, float offset, bool cast_first, bool per_head, ScalarType norm_dtype, str pairing, str out_pairing, "
    "int start, int length, int sign, bool[2] head_major"
)
forward_op = register_op(
    f"norm_rope(Tensor q, Tensor? k, {_TENSORS}, {_ATTRIBUTES}, ScalarType dtype) -> (Tensor, Tensor)",
    plain=plain_forward,
    fused=_fused_forward,
    fake=_fake_forward,
    tags=(torch.Tag.pointwise,),
)
backward_op = register_op(
    f"norm_rope_backward(Tensor? dq, Tensor? dk, Tensor q, Tensor? k, {_TENSORS}, {_ATTRIBUTES}, bool need_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    plain=plain_backward,
    fused=_fused_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    q, k, q_weight, k_weight, cos, sin, *attributes, _ = inputs
    ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
    ctx.set_materialize_grads(False)
    needs = ctx.needs_input_grad
    of_each = zip(output, (needs[0] or needs[2], needs[1] or needs[3]), strict=True)
    ctx.mark_non_differentiable(*(y for y, needed in of_each if y is not None and not needed))
    ctx.attributes = attributes


def _backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Any, ...]:
    need_q, need_k, need_q_weight, need_k_weight = needs = ctx.needs_input_grad[:4]
    dq = dq if need_q or need_q_weight else None
    dk = dk if need_k or need_k_weight else None
    gradients: Four = (None, None, None, None)
    if dq is not None or dk is not None:
        need_weight = need_q_weight or need_k_weight
        gradients = backward_op(dq, dk, *ctx.saved_tensors, *ctx.attributes, need_weight)
    wanted = (value if needed else None for value, needed in zip(gradients, needs, strict=True))
    return *wanted, *(None,) * 14


_apply = register_gradient("norm_rope", forward_op, _setup_context, _backward)


def norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
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
    heads: int = -3,
    out_dtype: torch.dtype | None = None,
) -> Pair:
    """Return `q` and `k` normalized and rotated, each in the memory layout that it came in; k may be None.

    q, k, cos, sin and the attributes from `pairing` on: as `rope` takes them. q_weight, k_weight: [D], or [heads * D]
    where the norm is over all heads of a token (not `per_head`), one dtype, or both None. `norm_dtype` is that of the
    normalized values, the dtype of q or float32 (float64 for a float64 q); by default the promotion of those of q and
    its weight. cos and sin get no gradient.

    >>> norm_rope(torch.tensor([[[3.0, 4.0]]]), None, None, None, torch.zeros(1, 1), torch.ones(1, 1), eps=0.0)
    (tensor([[[-1.1314,  0.8485]]]), None)
    """
    length, out_pairing = length or q.shape[-1], out_pairing or pairing
    check_arguments("norm_rope", q, k, cos, sin, pairing, out_pairing, start, length, sign, heads)
    q_rows, k_rows = tokens_first(q, heads), None if k is None else tokens_first(k, heads)
    norm_dtype = norm_dtype or promoted(q, q_weight)
    wide = wide_dtype(q.dtype)
    if norm_dtype not in (q.dtype, wide):
        raise ValueError(f"norm_rope: norm_dtype, expected {q.dtype} or {wide}, got {norm_dtype}")
    for name, x, weight in (("q_weight", q_rows, q_weight), ("k_weight", k_rows, k_weight)):
        if x is not None:
            _check_weight(name, x, weight, q_weight, per_head)
    y, k_y = _apply(
        q_rows,
        k_rows,
        q_weight,
        k_weight,
        table_of(cos, q_rows, heads, "norm_rope"),
        table_of(sin, q_rows, heads, "norm_rope"),
        eps,
        offset,
        cast_first,
        per_head,
        norm_dtype,
        pairing,
        out_pairing,
        start,
        length,
        sign,
        [is_head_major(q_rows), k_rows is not None and is_head_major(k_rows)],
        out_dtype or norm_dtype,
    )
    return as_given(y, q, heads), None if k is None else as_given(k_y, k, heads)


def _check_weight(name: str, x: Tensor, weight: Tensor | None, first: Tensor | None, per_head: bool) -> None:
    heads, size = x.shape[-2:]
    expected = (size if per_head else heads * size,)
    if (weight is None) != (first is None):
        raise ValueError(f"norm_rope: {name}, expected a weight of both or of neither")
    if (
        weight is not None
        and first is not None
        and (tuple(weight.shape) != expected or weight.dtype != first.dtype)
    ):
        raise ValueError(
            f"norm_rope: {name}, expected shape {expected} in {first.dtype}, "
            f"got {tuple(weight.shape)} in {weight.dtype}"
        )
    if not per_head and not fits(heads, size):
        raise ValueError(
            f"norm_rope: {heads} heads of {size}, expected at most {MOST_ITEMS} items of one norm, both "
            "rounded up to powers of two"
        )
