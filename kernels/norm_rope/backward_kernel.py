"""The backward kernel, which walks tiles of heads, and the sum of its programs' parts of the gradients of weights."""

from fxopt.kernels.launch import jit, tl
from fxopt.kernels.norm_rope.forward_kernel import load_passed, load_tables, place_of, rstd_of, weights_at
from fxopt.kernels.rope.kernels import load_pairs, store_pairs, turn


@jit
def _store_weight(p_row, b_mask, b_dweight, b_column, PER_HEAD: tl.constexpr):
    """Store the sum over tokens, and over heads where these share their weight."""
    b_sum = tl.sum(b_dweight, 0)[None, :, :]
    if PER_HEAD:
        b_sum = tl.sum(b_sum, 1)[:, None, :]
    tl.store(p_row + b_column, b_sum, mask=b_mask)


@jit(do_not_specialize=["num_tokens", "num_token_tiles", "num_q_tiles", "num_k_tiles", "num_q_programs"])
def norm_rope_backward_kernel(
    p_dq_out,
    p_dk_out,
    p_q,
    p_k,
    p_q_weight,
    p_k_weight,
    p_cos,
    p_sin,
    p_dq,
    p_dk,
    p_partial,
    dq_out_batch_stride,
    dq_out_token_stride,
    dq_out_head_stride,
    dk_out_batch_stride,
    dk_out_token_stride,
    dk_out_head_stride,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    dq_batch_stride,
    dq_token_stride,
    dq_head_stride,
    dk_batch_stride,
    dk_token_stride,
    dk_head_stride,
    table_batch_stride,
    table_token_stride,
    partial_row_stride,
    num_tokens,
    num_token_tiles,
    num_q_heads,
    num_k_heads,
    num_q_tiles,
    num_k_tiles,
    num_q_programs,
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
    NEED_WEIGHT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASSED: tl.constexpr,
    SPREAD: tl.constexpr,
    SPREAD_WEIGHT: tl.constexpr,
):
    """Write the gradients of every n-th tile of heads, and the program's part of the gradient of their weight.

    The first programs walk q, the others k. OUT_PAIRS is how dq_out and dk_out lie, IN_PAIRS how q and k do.
    """
    SIZE: tl.constexpr = 2 * HALF + NUM_PASSED
    is_q = tl.program_id(0) < num_q_programs
    first = tl.where(is_q, tl.program_id(0), tl.program_id(0) - num_q_programs)
    step = tl.where(is_q, num_q_programs, tl.num_programs(0) - num_q_programs)
    num_tiles = tl.where(is_q, num_q_tiles, num_k_tiles)
    num_heads = tl.where(is_q, num_q_heads, num_k_heads)
    p_weight = tl.where(is_q, p_q_weight, p_k_weight)
    # Over all heads, a tile has all of them; by head, all have one weight: either way it is that of every tile.
    b_slot = tl.arange(0, BLOCK_HEADS).to(tl.int64)[None, :, None]
    b_turn = tl.arange(0, BLOCK_TOKENS)[:, None, None]
    p_w, b_mask_w = weights_at(p_weight, b_turn, b_slot, num_heads, SIZE, PER_HEAD, SPREAD_WEIGHT)
    b_dw1 = tl.zeros([BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HALF], tl.float32)
    b_dw2 = tl.zeros([BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HALF], tl.float32)
    b_dw = tl.zeros([BLOCK_TOKENS, BLOCK_HEADS, BLOCK_PASSED], tl.float32)
    b_w1, b_w2, b_w = b_dw1, b_dw2, b_dw
    if HAS_WEIGHT:
        b_w1, b_w2 = load_pairs(p_w + START, b_mask_w, IN_PAIRS, BLOCK_HALF, HALF, False, 0.0)
        if NUM_PASSED > 0:
            b_w, _b_place, _b_mask_place = load_passed(p_w, b_mask_w, START, HALF, NUM_PASSED, BLOCK_PASSED)

    for tile in tl.range(first, num_tiles, step, num_stages=1):
        batch, start, b_token, b_head, b_is_token, b_mask = place_of(
            tile, num_token_tiles, num_tokens, num_heads, BLOCK_TOKENS, BLOCK_HEADS
        )
        b_tokens = start + b_token
        p_dy = tl.where(is_q, p_dq_out, p_dk_out) + batch * tl.where(
            is_q, dq_out_batch_stride, dk_out_batch_stride
        )
        p_dy = p_dy + b_tokens * tl.where(is_q, dq_out_token_stride, dk_out_token_stride)
        p_dy += b_head * tl.where(is_q, dq_out_head_stride, dk_out_head_stride)
        p_x = tl.where(is_q, p_q, p_k) + batch * tl.where(is_q, q_batch_stride, k_batch_stride)
        p_x = p_x + b_tokens * tl.where(is_q, q_token_stride, k_token_stride)
        p_x += b_head * tl.where(is_q, q_head_stride, k_head_stride)
        b_x1, b_x2 = load_pairs(p_x + START, b_mask, IN_PAIRS, BLOCK_HALF, HALF, True, 0.0)
        b_dy1, b_dy2 = load_pairs(p_dy + START, b_mask, OUT_PAIRS, BLOCK_HALF, HALF, True, 0.0)
        b_at_table = batch * table_batch_stride + b_tokens * table_token_stride
        b_cos1, b_cos2, b_sin1, b_sin2 = load_tables(
            p_cos, p_sin, b_at_table, b_is_token, b_head, TABLE_PAIRS, HALF, BLOCK_HEADS, BLOCK_HALF, SPREAD
        )
        b_dn1, b_dn2 = turn(b_dy1, b_dy2, b_cos1, b_cos2, b_sin2, b_sin1, -SIGN)
        b_squares = tl.sum(b_x1 * b_x1 + b_x2 * b_x2, 2)
        if NUM_PASSED > 0:
            b_x, b_column, b_mask_passed = load_passed(p_x, b_mask, START, HALF, NUM_PASSED, BLOCK_PASSED)
            b_dn, b_column, b_mask_passed = load_passed(p_dy, b_mask, START, HALF, NUM_PASSED, BLOCK_PASSED)
            b_squares += tl.sum(b_x * b_x, 2)
        b_rstd = rstd_of(b_squares, b_mask, num_heads, eps, SIZE, PER_HEAD)

        b_n1, b_n2 = b_x1 * b_rstd, b_x2 * b_rstd
        if NEED_WEIGHT:
            b_dw1 += b_dn1 * b_n1
            b_dw2 += b_dn2 * b_n2
        if HAS_WEIGHT:
            b_dn1 *= b_w1 + offset
            b_dn2 *= b_w2 + offset
        b_inner = tl.sum(b_dn1 * b_n1 + b_dn2 * b_n2, 2)
        if NUM_PASSED > 0:
            b_n = b_x * b_rstd
            if NEED_WEIGHT:
                b_dw += b_dn * b_n
            if HAS_WEIGHT:
                b_dn *= b_w + offset
            b_inner += tl.sum(b_dn * b_n, 2)
        if PER_HEAD:
            b_mean = b_inner[:, :, None] / SIZE
        else:
            b_mean = tl.sum(b_inner, 1)[:, None, None] / (SIZE * num_heads)

        p_dx = tl.where(is_q, p_dq, p_dk) + batch * tl.where(is_q, dq_batch_stride, dk_batch_stride)
        p_dx = p_dx + b_tokens * tl.where(is_q, dq_token_stride, dk_token_stride)
        p_dx += b_head * tl.where(is_q, dq_head_stride, dk_head_stride)
        b_dx1 = b_rstd * (b_dn1 - b_n1 * b_mean)
        b_dx2 = b_rstd * (b_dn2 - b_n2 * b_mean)
        store_pairs(p_dx + START, b_mask, b_dx1, b_dx2, IN_PAIRS, BLOCK_HALF, HALF)
        if NUM_PASSED > 0:
            b_dx = b_rstd * (b_dn - b_n * b_mean)
            tl.store(p_dx + b_column, b_dx.to(p_dq.dtype.element_ty), mask=b_mask_passed)

    if NEED_WEIGHT:
        p_row = p_partial + tl.program_id(0).to(tl.int64) * partial_row_stride
        b_is_head = b_slot < num_heads
        if PER_HEAD:
            p_row = p_row + tl.zeros([1, 1, 1], tl.int64)
            b_is_head = tl.full([1, 1, 1], True, tl.int1)
        else:
            p_row = p_row + b_slot * SIZE
        b_half = tl.arange(0, BLOCK_HALF)[None, None, :]
        b_mask_half = b_is_head & (b_half < HALF)
        if IN_PAIRS == "interleaved":
            _store_weight(p_row + START, b_mask_half, b_dw1, 2 * b_half, PER_HEAD)
            _store_weight(p_row + START, b_mask_half, b_dw2, 2 * b_half + 1, PER_HEAD)
        else:
            _store_weight(p_row + START, b_mask_half, b_dw1, b_half, PER_HEAD)
            _store_weight(p_row + START, b_mask_half, b_dw2, HALF + b_half, PER_HEAD)
        if NUM_PASSED > 0:
            b_rest = tl.arange(0, BLOCK_PASSED)[None, None, :]
            b_mask_rest = b_is_head & (b_rest < NUM_PASSED)
            if START == 0:
                b_rest += 2 * HALF
            _store_weight(p_row, b_mask_rest, b_dw, b_rest, PER_HEAD)


@jit(do_not_specialize=["num_q_programs", "num_programs"])
def norm_rope_sum_kernel(
    p_partial,
    p_dq_weight,
    p_dk_weight,
    partial_row_stride,
    num_q_programs,
    num_programs,
    num_q_columns,
    num_k_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sum the programs' parts of one weight's gradient in a fixed order, and round once."""
    is_q = tl.program_id(1) == 0
    first = tl.where(is_q, 0, num_q_programs)
    last = tl.where(is_q, num_q_programs, num_programs)
    num_columns = tl.where(is_q, num_q_columns, num_k_columns)
    b_columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    b_rows = tl.arange(0, BLOCK_ROWS)[:, None]
    b_total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        b_mask = (start + b_rows < last) & (b_columns < num_columns)
        b_total += tl.load(
            p_partial + (start + b_rows) * partial_row_stride + b_columns, mask=b_mask, other=0.0
        )
    b_sum = tl.sum(b_total, 0)[None, :].to(p_dq_weight.dtype.element_ty)
    tl.store(tl.where(is_q, p_dq_weight, p_dk_weight) + b_columns, b_sum, mask=b_columns < num_columns)
