"""Rotary position embedding of one or two tensors of heads: pairs of items turned by an angle per token.

    y1 = x1 cos1 - x2 sin1        x1, x2: the two items of a pair; a table holds a cosine and a sine for each
    y2 = x2 cos2 + x1 sin2        item of the output, or one of each per pair (then cos1 = cos2, sin1 = sin2)

A pair is (x[i], x[i + R/2]) or, interleaved, (x[2i], x[2i + 1]), in the R rotated items of a head; these are
its first or its last ones, and the others are passed on. Nothing is assumed about the tables: their two
halves may differ.

Source: Su et al. 2021, "RoFormer"; transformers `LlamaAttention`, `CohereAttention`, `Glm4Attention`,
`GptOssAttention`, `DeepseekV3Attention` and their `apply_rotary_pos_emb`.

Saved for backward: cos and sin, nothing of q and k: backward turns the gradients by the transposed matrix.

Numerics: products and their sum in fp32 (fp64 for fp64), rounded once; stock models in bf16 round three times.
"""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import (
    can_launch,
    ceil_div,
    jit,
    next_power_of_two,
    on_device,
    register_gradient,
    register_op,
    tl,
)

PAIRINGS = ("half", "interleaved")


def _items_of_pairs(x: Tensor, pairing: str) -> tuple[Tensor, Tensor]:
    """Return the first and the second item of every pair."""
    if pairing == "interleaved":
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _from_pairs(first: Tensor, second: Tensor, pairing: str) -> Tensor:
    if pairing == "interleaved":
        return torch.stack((first, second), dim=-1).flatten(-2)
    return torch.cat((first, second), dim=-1)


def _rotated(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    pairing: str,
    out_pairing: str,
    start: int,
    length: int,
    transposed: bool,
) -> Tensor:
    """Return `x` with `length` items of each head turned, in fp32 or fp64; `transposed` is the way back."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    tables: list[Tensor] = []
    for table in (cos, sin):
        table = table.to(wide).unsqueeze(-2)
        is_per_pair = table.shape[-1] < length
        tables.extend((table, table) if is_per_pair else _items_of_pairs(table, out_pairing))
    cos1, cos2, sin1, sin2 = tables
    if transposed:
        pairing, out_pairing, sin1, sin2 = out_pairing, pairing, -sin2, -sin1
    x1, x2 = _items_of_pairs(x[..., start : start + length].to(wide), pairing)
    turned = _from_pairs(x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2, out_pairing)
    if length == x.shape[-1]:
        return turned
    return torch.cat((x[..., :start].to(wide), turned, x[..., start + length :].to(wide)), dim=-1)


def rope_reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    pairing: str = "half",
    out_pairing: str = "",
    start: int = 0,
    length: int = 0,
    sign: int = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return `x`, [batch, tokens, heads, D], rotated, in plain torch: the specification.

    cos, sin: [batch or 1, tokens, R or R/2]; R is `length`, or D for 0.
    """
    turned = _rotated(
        x, cos, sin * sign, pairing, out_pairing or pairing, start, length or x.shape[-1], transposed=False
    )
    return turned.to(out_dtype or x.dtype)


def _new_like(x: Tensor, dtype: torch.dtype, head_major: bool) -> Tensor:
    """Return fresh memory of the shape of `x`; `head_major` lays the tokens of one head side by side."""
    if not head_major:
        return x.new_empty(x.shape, dtype=dtype)
    batch, tokens, heads, size = x.shape
    return x.new_empty((batch, heads, tokens, size), dtype=dtype).transpose(1, 2)


Pair = tuple[Tensor | None, Tensor | None]


def _plain(
    transposed: bool,
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    pairing: str,
    out_pairing: str,
    start: int,
    length: int,
    sign: int,
    head_major: list[bool],
    dtype: torch.dtype,
) -> Pair:
    def turn(x: Tensor | None, is_head_major: bool) -> Tensor | None:
        if x is None:
            return None
        turned = _rotated(x, cos, sin * sign, pairing, out_pairing, start, length, transposed)
        return _new_like(x, dtype, is_head_major).copy_(turned)

    return turn(q, head_major[0]), turn(k, head_major[1])


def plain_forward(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *attributes: Any) -> Pair:
    """Return q and k rotated, in plain torch."""
    return _plain(False, q, k, cos, sin, *attributes)


def plain_backward(dq: Tensor | None, dk: Tensor | None, cos: Tensor, sin: Tensor, *attributes: Any) -> Pair:
    """Return the gradients of q and k, in plain torch."""
    return _plain(True, dq, dk, cos, sin, *attributes)


TILE_ELEMENTS = 4096
"""Of 28 + 4 heads of 128 one token. With 4 warps a thread has 4 loads of 16 bytes in flight, and it keeps the
32 table values that all its heads share."""
NUM_WARPS = 4


@jit
def _load_pairs(p_row, b_mask_row, PAIRS: tl.constexpr, BLOCK_HALF: tl.constexpr, HALF: tl.constexpr):
    """Load the items of pairs: "interleaved", "half", or "single" where both are the same one."""
    b_column = tl.arange(0, BLOCK_HALF)[None, None, :]
    if PAIRS == "interleaved":
        b_wide = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        b_both = tl.load(p_row + b_wide, mask=b_mask_row & (b_wide < 2 * HALF), other=0.0)
        b_pairs = tl.reshape(b_both, [b_both.shape[0], b_both.shape[1], BLOCK_HALF, 2])
        b_first, b_second = tl.split(b_pairs)
    else:
        b_mask = b_mask_row & (b_column < HALF)
        b_first = tl.load(p_row + b_column, mask=b_mask, other=0.0)
        b_second = b_first
        if PAIRS == "half":
            b_second = tl.load(p_row + HALF + b_column, mask=b_mask, other=0.0)
    return b_first.to(tl.float32), b_second.to(tl.float32)


@jit
def rope_kernel(
    p_q,
    p_k,
    p_cos,
    p_sin,
    p_q_out,
    p_k_out,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    q_out_batch_stride,
    q_out_token_stride,
    q_out_head_stride,
    k_out_batch_stride,
    k_out_token_stride,
    k_out_head_stride,
    table_batch_stride,
    table_token_stride,
    num_tokens,
    num_rows,
    num_q_heads,
    num_heads,
    sign,
    IN_PAIRS: tl.constexpr,
    OUT_PAIRS: tl.constexpr,
    TABLE_PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    NUM_PASSED: tl.constexpr,
    START: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASSED: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Rotate BLOCK_HEADS heads, q's and then k's, of BLOCK_TOKENS tokens; TRANSPOSED is backward."""
    b_row = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS))[:, None, None]
    b_is_row = b_row < num_rows
    b_batch, b_token = (b_row // num_tokens).to(tl.int64), (b_row % num_tokens).to(tl.int64)
    b_head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[None, :, None]
    b_is_q = b_head < num_q_heads
    b_k_head = b_head - num_q_heads
    b_mask = b_is_row & (b_head < num_heads)
    p_x = tl.where(
        b_is_q,
        p_q + (b_batch * q_batch_stride + b_token * q_token_stride + b_head * q_head_stride),
        p_k + (b_batch * k_batch_stride + b_token * k_token_stride + b_k_head * k_head_stride),
    )
    p_y = tl.where(
        b_is_q,
        p_q_out + (b_batch * q_out_batch_stride + b_token * q_out_token_stride + b_head * q_out_head_stride),
        p_k_out
        + (b_batch * k_out_batch_stride + b_token * k_out_token_stride + b_k_head * k_out_head_stride),
    )
    b_x1, b_x2 = _load_pairs(p_x + START, b_mask, IN_PAIRS, BLOCK_HALF, HALF)
    if NUM_PASSED > 0:
        b_passed = tl.arange(0, BLOCK_PASSED)[None, None, :]
        b_mask_passed = b_mask & (b_passed < NUM_PASSED)
        if START == 0:
            b_passed += 2 * HALF
        b_items = tl.load(p_x + b_passed, mask=b_mask_passed, other=0.0)
        tl.store(p_y + b_passed, b_items.to(p_q_out.dtype.element_ty), mask=b_mask_passed)

    b_at_table = b_batch * table_batch_stride + b_token * table_token_stride
    if SPREAD:
        # As large as x, so that no layout has to change: the heads of a token read the same lines of cache.
        b_at_table += tl.zeros([1, BLOCK_HEADS, 1], tl.int64)
        b_is_row &= b_head >= 0
    b_cos1, b_cos2 = _load_pairs(p_cos + b_at_table, b_is_row, TABLE_PAIRS, BLOCK_HALF, HALF)
    b_sin1, b_sin2 = _load_pairs(p_sin + b_at_table, b_is_row, TABLE_PAIRS, BLOCK_HALF, HALF)
    if TRANSPOSED:
        b_y1 = b_x1 * b_cos1 + b_x2 * (b_sin2 * sign)
        b_y2 = b_x2 * b_cos2 - b_x1 * (b_sin1 * sign)
    else:
        b_y1 = b_x1 * b_cos1 - b_x2 * (b_sin1 * sign)
        b_y2 = b_x2 * b_cos2 + b_x1 * (b_sin2 * sign)
    b_y1 = b_y1.to(p_q_out.dtype.element_ty)
    b_y2 = b_y2.to(p_q_out.dtype.element_ty)
    if OUT_PAIRS == "interleaved":
        b_wide = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        b_both = tl.reshape(tl.join(b_y1, b_y2), [BLOCK_TOKENS, BLOCK_HEADS, 2 * BLOCK_HALF])
        tl.store(p_y + START + b_wide, b_both, mask=b_mask & (b_wide < 2 * HALF))
    else:
        b_column = tl.arange(0, BLOCK_HALF)[None, None, :]
        b_mask_half = b_mask & (b_column < HALF)
        tl.store(p_y + START + b_column, b_y1, mask=b_mask_half)
        tl.store(p_y + START + HALF + b_column, b_y2, mask=b_mask_half)


def _tile(num_heads: int, size: int, length: int, table_pairs: str) -> dict[str, int]:
    """Return the sizes of the kernel's tile: the heads of one token, of several where these are few.

    Triton loads a table in the layout of x (16 bytes a thread) only where it has fewer items than the program
    has threads; a larger one is given the size of x instead (SPREAD), else x itself would change its layout.
    """
    columns = next_power_of_two(size)
    heads = min(next_power_of_two(num_heads), max(1, TILE_ELEMENTS // columns))
    tokens = max(1, TILE_ELEMENTS // (heads * columns))
    table_items = tokens * next_power_of_two(length if table_pairs == "interleaved" else length // 2)
    return {
        "BLOCK_TOKENS": tokens,
        "BLOCK_HEADS": heads,
        "BLOCK_HALF": next_power_of_two(length // 2),
        "BLOCK_PASSED": next_power_of_two(size - length),
        "SPREAD": table_items >= 32 * NUM_WARPS,
    }


def _launch(
    transposed: bool,
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    pairing: str,
    out_pairing: str,
    start: int,
    length: int,
    sign: int,
    head_major: list[bool],
    dtype: torch.dtype,
) -> Pair:
    """Run the kernel on what there is of q and k: one launch for both."""
    given = [
        (_dense_heads(x), _new_like(x, dtype, is_head_major))
        for x, is_head_major in zip((q, k), head_major, strict=True)
        if x is not None
    ]
    (x, y), (other, other_y) = given[0], given[-1]
    batch, tokens, heads, size = x.shape
    num_heads = sum(each.shape[2] for each, _ in given)
    if batch * tokens * num_heads * size:
        table_pairs = "single" if cos.shape[-1] < length else out_pairing
        tile = _tile(num_heads, size, length, table_pairs)
        if cos.stride() != sin.stride() or cos.stride(-1) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        grid = (ceil_div(batch * tokens, tile["BLOCK_TOKENS"]), ceil_div(num_heads, tile["BLOCK_HEADS"]))
        with on_device(x):
            rope_kernel[grid](
                x,
                other,
                cos,
                sin,
                y,
                other_y,
                *x.stride()[:3],
                *other.stride()[:3],
                *y.stride()[:3],
                *other_y.stride()[:3],
                cos.stride(0) if cos.shape[0] > 1 else 0,
                cos.stride(1),
                tokens,
                batch * tokens,
                heads,
                num_heads,
                sign,
                IN_PAIRS=out_pairing if transposed else pairing,
                OUT_PAIRS=pairing if transposed else out_pairing,
                TABLE_PAIRS=table_pairs,
                HALF=length // 2,
                NUM_PASSED=size - length,
                START=start,
                TRANSPOSED=transposed,
                **tile,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,  # two products and their sum: a fused multiply-add only rounds less
            )
    return None if q is None else y, None if k is None else other_y


def _dense_heads(x: Tensor) -> Tensor:
    """Return `x` with the items of a head side by side: itself wherever a model made it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_forward(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *attributes: Any) -> Pair:
    """Return q and k rotated, by the kernel."""
    return _launch(False, q, k, cos, sin, *attributes)


def launch_backward(dq: Tensor | None, dk: Tensor | None, cos: Tensor, sin: Tensor, *attributes: Any) -> Pair:
    """Return the gradients of q and k, by the kernel."""
    return _launch(True, dq, dk, cos, sin, *attributes)


def _fused_forward(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *attributes: Any) -> Pair:
    run = launch_forward if can_launch(q, k, cos, sin, out_dtype=attributes[-1]) else plain_forward
    return run(q, k, cos, sin, *attributes)


def _fused_backward(dq: Tensor | None, dk: Tensor | None, cos: Tensor, sin: Tensor, *attributes: Any) -> Pair:
    run = launch_backward if can_launch(dq, dk, cos, sin, out_dtype=attributes[-1]) else plain_backward
    return run(dq, dk, cos, sin, *attributes)


def _fake(q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor, *attributes: Any) -> Pair:
    head_major, dtype = attributes[-2:]
    made = [
        None if x is None else _new_like(x, dtype, is_head_major)
        for x, is_head_major in zip((q, k), head_major, strict=True)
    ]
    return made[0], made[1]


_ATTRIBUTES = (
    "Tensor cos, Tensor sin, str pairing, str out_pairing, int start, int length, int sign, bool[2] head_major, "
    "ScalarType dtype"
)
_forward_op = register_op(
    f"rope(Tensor q, Tensor? k, {_ATTRIBUTES}) -> (Tensor, Tensor)",
    plain=plain_forward,
    fused=_fused_forward,
    fake=_fake,
)
_backward_op = register_op(
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
        gradients = _backward_op(dq, dk, *ctx.saved_tensors, *ctx.attributes)
    return *gradients, *(None,) * 9


_apply = register_gradient("rope", _forward_op, _setup_context, _backward)


def _tokens_first(x: Tensor, heads: int) -> Tensor:
    """Return `x` as a view of [batch, tokens, heads, D]."""
    x = x.unsqueeze(0) if x.dim() == 3 else x
    return x.transpose(-3, -2) if heads == -3 else x


def _as_given(y: Tensor, x: Tensor, heads: int) -> Tensor:
    """Return `y` with its dims in the order of `x`."""
    y = y.transpose(-3, -2) if heads == -3 else y
    return y.squeeze(0) if x.dim() == 3 else y


def _is_head_major(x: Tensor) -> bool:
    return bool(x.stride(2) > x.stride(1))


def _table_of(table: Tensor, x: Tensor, heads: int) -> Tensor:
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
            f"rope: cos and sin, expected to broadcast over {batch} batch items of {tokens} tokens and over the "
            f"heads at {heads}, got {shape}"
        )
    return by_heads.squeeze(2)


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
    for name, x in (("q", q), ("k", k)):
        if x is not None and (x.dim() not in (3, 4) or x.shape[-1] != q.shape[-1] or x.dtype != q.dtype):
            raise ValueError(
                f"rope: {name}, expected 3 or 4 dims, the last {q.shape[-1]}, in {q.dtype}, "
                f"got {tuple(x.shape)} in {x.dtype}"
            )
    if pairing not in PAIRINGS or out_pairing not in PAIRINGS or heads not in (-3, -2) or sign not in (-1, 1):
        raise ValueError(
            f"rope: expected pairings of {PAIRINGS}, heads -3 or -2 and sign 1 or -1, "
            f"got {pairing!r}, {out_pairing!r}, {heads} and {sign}"
        )
    if length % 2 or length <= 0 or start not in (0, q.shape[-1] - length):
        raise ValueError(
            f"rope: start and length, expected an even number of first or last items of {q.shape[-1]}, "
            f"got {length} at {start}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if (
            table.shape[-1] not in (length, length // 2)
            or table.shape != cos.shape
            or table.dtype != cos.dtype
        ):
            raise ValueError(
                f"rope: {name}, expected {length} or {length // 2} items and {tuple(cos.shape)} in {cos.dtype}, "
                f"got {tuple(table.shape)} in {table.dtype}"
            )
    q_rows, k_rows = _tokens_first(q, heads), None if k is None else _tokens_first(k, heads)
    y, k_y = _apply(
        q_rows,
        k_rows,
        _table_of(cos, q_rows, heads),
        _table_of(sin, q_rows, heads),
        pairing,
        out_pairing,
        start,
        length,
        sign,
        [_is_head_major(q_rows), k_rows is not None and _is_head_major(k_rows)],
        out_dtype or q.dtype,
    )
    return _as_given(y, q, heads), None if k is None else _as_given(k_y, k, heads)
