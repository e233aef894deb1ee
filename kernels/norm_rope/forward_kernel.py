"""The forward kernel, and what it shares with backward: where a program's heads lie, and how they are read."""

from fxopt.kernels.launch import jit, tl
from fxopt.kernels.rope.kernels import load_pairs, store_pairs, turn


@jit
def place_of(
    tile,
    num_token_tiles,
    num_tokens,
    num_heads,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Return batch item and first token of a tile, its tokens and heads, and which of them exist."""
    num_head_tiles = tl.cdiv(num_heads, BLOCK_HEADS)
    row = tile // num_head_tiles
    batch = (row // num_token_tiles).to(tl.int64)
    start = ((row % num_token_tiles) * BLOCK_TOKENS).to(tl.int64)
    b_token = tl.arange(0, BLOCK_TOKENS).to(tl.int64)[:, None, None]
    b_head = ((tile % num_head_tiles) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[None, :, None]
    b_is_token = start + b_token < num_tokens
    return batch, start, b_token, b_head, b_is_token, b_is_token & (b_head < num_heads)


@jit
def load_passed(
    p_row, b_mask_row, START: tl.constexpr, HALF: tl.constexpr, NUM_PASSED: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the items that are not turned, and their places."""
    b_column = tl.arange(0, BLOCK)[None, None, :]
    b_mask = b_mask_row & (b_column < NUM_PASSED)
    if START == 0:
        b_column += 2 * HALF
    return tl.load(p_row + b_column, mask=b_mask, other=0.0).to(tl.float32), b_column, b_mask


@jit
def load_tables(
    p_cos,
    p_sin,
    b_at,
    b_is_token,
    b_head,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Return the cosines of both items of pairs, then the sines; SPREAD over all heads, as `rope` does."""
    if SPREAD:
        b_at += tl.zeros([1, BLOCK_HEADS, 1], tl.int64)
        b_is_token &= b_head >= 0
    b_cos1, b_cos2 = load_pairs(p_cos + b_at, b_is_token, PAIRS, BLOCK_HALF, HALF, False, 0.0)
    b_sin1, b_sin2 = load_pairs(p_sin + b_at, b_is_token, PAIRS, BLOCK_HALF, HALF, False, 0.0)
    return b_cos1, b_cos2, b_sin1, b_sin2


@jit
def weights_at(
    p_weight,
    b_token,
    b_head,
    num_heads,
    SIZE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Return pointers to the weights of each head, and which heads exist; SPREAD over the tile as tables are."""
    p_row = p_weight + (b_head * 0 if PER_HEAD else b_head * SIZE)
    b_mask = b_head < num_heads
    if PER_HEAD and not SPREAD:
        p_row = p_weight + tl.zeros([1, 1, 1], tl.int64)
        b_mask = tl.full([1, 1, 1], True, tl.int1)
    if SPREAD:
        p_row += b_token * 0
        b_mask &= b_token >= 0
    return p_row, b_mask


@jit
def rstd_of(b_squares, b_is_head, num_heads, eps, SIZE: tl.constexpr, PER_HEAD: tl.constexpr):
    """Return the reciprocal roots, [tokens, heads or 1, 1], of sums of squares by head; 0 where there is no head."""
    if PER_HEAD:
        b_rstd = tl.rsqrt(b_squares / SIZE + eps)[:, :, None]
    else:
        b_rstd = tl.rsqrt(tl.sum(b_squares, 1) / (SIZE * num_heads) + eps)[:, None, None]
    return tl.where(b_is_head, b_rstd, 0.0)


@jit
def scaled(b_x, b_rstd, b_weight, offset, x_type: tl.constexpr, HAS_WEIGHT: tl.constexpr, CAST_FIRST: tl.constexpr,
           ROUND: tl.constexpr):  # fmt: skip
    """Return x normalized, times its weight, rounded where the model rounds."""
    b_n = b_x * b_rstd
    if CAST_FIRST:
        b_n = b_n.to(x_type).to(tl.float32)
    if HAS_WEIGHT:
        b_n *= b_weight + offset
    if ROUND:
        b_n = b_n.to(x_type).to(tl.float32)
    return b_n


@jit(do_not_specialize=["num_tokens", "num_token_tiles", "num_q_tiles"])
def norm_rope_forward_kernel(
    p_q,
    p_k,
    p_q_weight,
    p_k_weight,
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
    num_token_tiles,
    num_q_heads,
    num_k_heads,
    num_q_tiles,
    eps,
    offset,
    IN_PAIRS: tl.constexpr,
    OUT_PAIRS: tl.constexpr,
    TABLE_PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    NUM_PASSED: tl.constexpr,
    START: tl.constexpr,
    SIGN: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASSED: tl.constexpr,
    SPREAD: tl.constexpr,
    SPREAD_WEIGHT: tl.constexpr,
):
    """Normalize and turn BLOCK_HEADS heads of BLOCK_TOKENS tokens: of q in the first programs, of k in the others."""
    SIZE: tl.constexpr = 2 * HALF + NUM_PASSED
    is_q = tl.program_id(0) < num_q_tiles
    tile = tl.where(is_q, tl.program_id(0), tl.program_id(0) - num_q_tiles)
    num_heads = tl.where(is_q, num_q_heads, num_k_heads)
    batch, start, b_token, b_head, b_is_token, b_mask = place_of(
        tile, num_token_tiles, num_tokens, num_heads, BLOCK_TOKENS, BLOCK_HEADS
    )
    p_x = tl.where(is_q, p_q, p_k) + batch * tl.where(is_q, q_batch_stride, k_batch_stride)
    p_y = tl.where(is_q, p_q_out, p_k_out) + batch * tl.where(is_q, q_out_batch_stride, k_out_batch_stride)
    p_x = p_x + (start + b_token) * tl.where(is_q, q_token_stride, k_token_stride)
    p_y = p_y + (start + b_token) * tl.where(is_q, q_out_token_stride, k_out_token_stride)
    p_x += b_head * tl.where(is_q, q_head_stride, k_head_stride)
    p_y += b_head * tl.where(is_q, q_out_head_stride, k_out_head_stride)
    x_type: tl.constexpr = p_q.dtype.element_ty

    b_x1, b_x2 = load_pairs(p_x + START, b_mask, IN_PAIRS, BLOCK_HALF, HALF, True, 0.0)
    b_squares = tl.sum(b_x1 * b_x1 + b_x2 * b_x2, 2)
    if NUM_PASSED > 0:
        b_passed, b_column, b_mask_passed = load_passed(p_x, b_mask, START, HALF, NUM_PASSED, BLOCK_PASSED)
        b_squares += tl.sum(b_passed * b_passed, 2)
    b_rstd = rstd_of(b_squares, b_mask, num_heads, eps, SIZE, PER_HEAD)

    b_w1, b_w2 = b_x1, b_x2
    p_w, b_mask_w = weights_at(
        tl.where(is_q, p_q_weight, p_k_weight), b_token, b_head, num_heads, SIZE, PER_HEAD, SPREAD_WEIGHT
    )
    if HAS_WEIGHT:
        b_w1, b_w2 = load_pairs(p_w + START, b_mask_w, IN_PAIRS, BLOCK_HALF, HALF, False, 0.0)
    if NUM_PASSED > 0:
        b_w = b_passed
        if HAS_WEIGHT:
            b_w, _, _ = load_passed(p_w, b_mask_w, START, HALF, NUM_PASSED, BLOCK_PASSED)
        b_passed = scaled(b_passed, b_rstd, b_w, offset, x_type, HAS_WEIGHT, CAST_FIRST, ROUND)
        tl.store(p_y + b_column, b_passed.to(p_q_out.dtype.element_ty), mask=b_mask_passed)
    b_n1 = scaled(b_x1, b_rstd, b_w1, offset, x_type, HAS_WEIGHT, CAST_FIRST, ROUND)
    b_n2 = scaled(b_x2, b_rstd, b_w2, offset, x_type, HAS_WEIGHT, CAST_FIRST, ROUND)
    b_at_table = batch * table_batch_stride + (start + b_token) * table_token_stride
    b_cos1, b_cos2, b_sin1, b_sin2 = load_tables(
        p_cos, p_sin, b_at_table, b_is_token, b_head, TABLE_PAIRS, HALF, BLOCK_HEADS, BLOCK_HALF, SPREAD
    )
    b_y1, b_y2 = turn(b_n1, b_n2, b_cos1, b_cos2, b_sin1, b_sin2, SIGN)
    store_pairs(p_y + START, b_mask, b_y1, b_y2, OUT_PAIRS, BLOCK_HALF, HALF)
