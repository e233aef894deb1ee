"""The op `fxopt::rope`, its backward op, and the function that patterns call."""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import can_launch, register_gradient, register_op
from fxopt.kernels.rope.launches import launch_backward, launch_forward
from fxopt.kernels.rope.reference import PAIRINGS, Pair, new_like, plain_backward, plain_forward


def _fused_forward(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *attributes: Any) -> Pair:
    run = launch_forward if can_launch(q, k, cos, sin, out_dtype=attributes[-1]) else plain_forward
    return run(q, k, cos, sin, *attributes)


def _fused_backward(dq: Tensor | None, dk: Tensor | None, cos: Tensor, sin: Tensor, *attributes: Any) -> Pair:
    run = launch_backward if can_launch(dq, dk, cos, sin, out_dtype=attributes[-1]) else plain_backward
    return run(dq, dk, cos, sin, *attributes)


def _fake(q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor, *attributes: Any) -> Pair:
    head_major, dtype = attributes[-2:]
    made = [
        None if x is None else new_like(x, dtype, is_head_major)
        for x, is_head_major in zip((q, k), head_major, strict=True)
    ]
    return made[0], made[1]


_ATTRIBUTES = (
    "Tensor cos, Tensor sin, str pairing, str out_pairing, int start, int length, int sign, bool[2] head_major, "
    "ScalarType dtype"
)
forward_op = register_op(
    f"rope(Tensor q, Tensor? k, {_ATTRIBUTES}) -> (Tensor, Tensor)",
    plain=plain_forward,
    fused=_fused_forward,
    fake=_fake,
)
backward_op = register_op(
    f"rope_backward(Tensor? dq, Tensor? dk, {_ATTRIBUTES}) -> (Tensor, Tensor)",
    plain=plain_backward,
    fused=_fused_backward,
    fake=_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    q, _, cos, sin, *attributes, _ = inputs
    ctx.save_for_backward(cos, sin)
    ctx.set_materialize_grads(False)
    # Where q is frozen, nothing behind it should compute a gradient for it because k has one.
    pairs = zip(output, ctx.needs_input_grad[:2], strict=True)
    ctx.mark_non_differentiable(*(y for y, needed in pairs if y is not None and not needed))
    ctx.attributes = (*attributes, q.dtype)


def _backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Any, ...]:
    need_q, need_k = ctx.needs_input_grad[:2]
    dq, dk = dq if need_q else None, dk if need_k else None
    gradients: Pair = (None, None)
    if dq is not None or dk is not None:
        gradients = backward_op(dq, dk, *ctx.saved_tensors, *ctx.attributes)
    return *gradients, *(None,) * 9


_apply = register_gradient("rope", forward_op, _setup_context, _backward)


def tokens_first(x: Tensor, heads: int) -> Tensor:
    """Return `x` as a view of [batch, tokens, heads, D]."""
    x = x.unsqueeze(0) if x.dim() == 3 else x
    return x.transpose(-3, -2) if heads == -3 else x


def as_given(y: Tensor, x: Tensor, heads: int) -> Tensor:
    """Return `y` with its dims in the order of `x`."""
    y = y.transpose(-3, -2) if heads == -3 else y
    return y.squeeze(0) if x.dim() == 3 else y


def is_head_major(x: Tensor) -> bool:
    """Return whether the tokens of one head lie side by side in `x`, [batch, tokens, heads, D]."""
    return bool(x.stride(2) > x.stride(1))


def table_of(table: Tensor, x: Tensor, heads: int, op: str = "rope") -> Tensor:
    """Return `table` as [batch or 1, tokens, items]."""
    shape = tuple(table.shape)
    while table.dim() < 4:
        table = table.unsqueeze(0)
    batch, tokens = x.shape[:2]
    by_heads = table.transpose(-3, -2) if heads == -3 else table
    if (
        table.dim() > 4
        or by_heads.shape[2] != 1
        or by_heads.shape[1] != tokens
        or (by_heads.shape[0] != 1 and by_heads.shape[0] != batch)
    ):
        raise ValueError(
            f"{op}: cos and sin, expected to broadcast over {batch} batch items of {tokens} tokens and over the "
            f"heads at {heads}, got {shape}"
        )
    return by_heads.squeeze(2)


def check_arguments(
    op: str,
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    pairing: str,
    out_pairing: str,
    start: int,
    length: int,
    sign: int,
    heads: int,
) -> None:
    """Raise ValueError, in the name of `op`, where these are nothing that a rotation is made of."""
    for name, x in (("q", q), ("k", k)):
        if x is not None and (x.dim() not in (3, 4) or x.shape[-1] != q.shape[-1] or x.dtype != q.dtype):
            raise ValueError(
                f"{op}: {name}, expected 3 or 4 dims, the last {q.shape[-1]}, in {q.dtype}, "
                f"got {tuple(x.shape)} in {x.dtype}"
            )
    if pairing not in PAIRINGS or out_pairing not in PAIRINGS or heads not in (-3, -2) or sign not in (-1, 1):
        raise ValueError(
            f"{op}: expected pairings of {PAIRINGS}, heads -3 or -2 and sign 1 or -1, "
            f"got {pairing!r}, {out_pairing!r}, {heads} and {sign}"
        )
    if length % 2 or length <= 0 or start not in (0, q.shape[-1] - length):
        raise ValueError(
            f"{op}: start and length, expected an even number of first or last items of {q.shape[-1]}, "
            f"got {length} at {start}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if (
            table.shape[-1] not in (length, length // 2)
            or table.shape != cos.shape
            or table.dtype != cos.dtype
        ):
            raise ValueError(
                f"{op}: {name}, expected {length} or {length // 2} items and {tuple(cos.shape)} in {cos.dtype}, "
                f"got {tuple(table.shape)} in {table.dtype}"
            )


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    pairing: str = "half",
    out_pairing: str = "",
    start: int = 0,
    length: int = 0,
    sign: int = 1,
    heads: int = -3,
    out_dtype: torch.dtype | None = None,
) -> Pair:
    """Return `q` and `k` rotated, each in the memory layout that it came in; None for a `k` that is None.

    q, k: [batch, heads, tokens, D], any strides, one float dtype; [batch, tokens, heads, D] with `heads` -2;
    the numbers of heads may differ, the batch may be missing. cos, sin: one dtype, they broadcast to q with one
    head and have R or R/2 items; R is `length`, or D for 0, and the rotated items begin at `start`, which is 0
    or D - R. `out_pairing`, where given, is how the output lies. cos and sin get no gradient.

    >>> rope(torch.tensor([[[1.0, 0.0]]]), None, torch.zeros(1, 1), torch.ones(1, 1))
    (tensor([[[0., 1.]]]), None)
    """
    length, out_pairing = length or q.shape[-1], out_pairing or pairing
    check_arguments("rope", q, k, cos, sin, pairing, out_pairing, start, length, sign, heads)
    q_rows, k_rows = tokens_first(q, heads), None if k is None else tokens_first(k, heads)
    y, k_y = _apply(
        q_rows,
        k_rows,
        table_of(cos, q_rows, heads),
        table_of(sin, q_rows, heads),
        pairing,
        out_pairing,
        start,
        length,
        sign,
        [is_head_major(q_rows), k_rows is not None and is_head_major(k_rows)],
        out_dtype or q.dtype,
    )
    return as_given(y, q, heads), None if k is None else as_given(k_y, k, heads)
