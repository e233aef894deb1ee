"""The kernel: it turns heads of q and of k, or their gradients back."""

from fxopt.kernels.launch import jit, tl


@jit
def _load(p_items, b_mask, IS_LAST: tl.constexpr, OTHER: tl.constexpr):
    if IS_LAST:
        b_items = tl.load(p_items, mask=b_mask, other=OTHER, eviction_policy="evict_first")
    else:
        b_items = tl.load(p_items, mask=b_mask, other=OTHER)
    return b_items


@jit
def load_pairs(
    p_row,
    b_mask_row,
    PAIRS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HALF: tl.constexpr,
    IS_LAST: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Load the items of pairs: "interleaved", "half", or "single" where both are the same one.

    What is read for the last time (IS_LAST) leaves the L2 cache first: the room is for what is written, which
    attention reads next. OTHER is what masked items are, None where nothing reads them.
    """
    b_column = tl.arange(0, BLOCK_HALF)[None, None, :]
    if PAIRS == "interleaved":
        b_wide = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        b_both = _load(p_row + b_wide, b_mask_row & (b_wide < 2 * HALF), IS_LAST, OTHER)
        b_pairs = tl.reshape(b_both, [b_both.shape[0], b_both.shape[1], BLOCK_HALF, 2])
        b_first, b_second = tl.split(b_pairs)
    else:
        b_mask = b_mask_row & (b_column < HALF)
        b_first = _load(p_row + b_column, b_mask, IS_LAST, OTHER)
        b_second = b_first
        if PAIRS == "half":
            b_second = _load(p_row + HALF + b_column, b_mask, IS_LAST, OTHER)
    return b_first.to(tl.float32), b_second.to(tl.float32)


@jit
def turn(b_x1, b_x2, b_cos1, b_cos2, b_sin1, b_sin2, SIGN: tl.constexpr):
    """Return pairs turned; the way back has the other sign, and the two sines change places."""
    if SIGN > 0:
        b_y1 = b_x1 * b_cos1 - b_x2 * b_sin1
        b_y2 = b_x2 * b_cos2 + b_x1 * b_sin2
    else:
        b_y1 = b_x1 * b_cos1 + b_x2 * b_sin1
        b_y2 = b_x2 * b_cos2 - b_x1 * b_sin2
    return b_y1, b_y2


@jit
def store_pairs(
    p_row, b_mask_row, b_y1, b_y2, PAIRS: tl.constexpr, BLOCK_HALF: tl.constexpr, HALF: tl.constexpr
):
    """Store the items of pairs, rounded to the dtype of the memory."""
    b_y1 = b_y1.to(p_row.dtype.element_ty)
    b_y2 = b_y2.to(p_row.dtype.element_ty)
    if PAIRS == "interleaved":
        b_wide = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        b_both = tl.reshape(tl.join(b_y1, b_y2), [b_y1.shape[0], b_y1.shape[1], 2 * BLOCK_HALF])
        tl.store(p_row + b_wide, b_both, mask=b_mask_row & (b_wide < 2 * HALF))
    else:
        b_column = tl.arange(0, BLOCK_HALF)[None, None, :]
        b_mask = b_mask_row & (b_column < HALF)
        tl.store(p_row + b_column, b_y1, mask=b_mask)
        tl.store(p_row + HALF + b_column, b_y2, mask=b_mask)


@jit(do_not_specialize=["num_tokens", "num_token_tiles"])
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
    num_token_tiles,
    num_q_heads,
    num_heads,
    IN_PAIRS: tl.constexpr,
    OUT_PAIRS: tl.constexpr,
    TABLE_PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    NUM_PASSED: tl.constexpr,
    START: tl.constexpr,
    SIGN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASSED: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Rotate BLOCK_HEADS heads, q's and then k's, of BLOCK_TOKENS tokens; TRANSPOSED is backward."""
    # A program's tokens are of one batch item: where it starts is a matter of scalars, not of every thread.
    batch = (tl.program_id(0) // num_token_tiles).to(tl.int64)
    start = ((tl.program_id(0) % num_token_tiles) * BLOCK_TOKENS).to(tl.int64)
    b_token = tl.arange(0, BLOCK_TOKENS).to(tl.int64)[:, None, None]
    b_is_row = start + b_token < num_tokens
    b_head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[None, :, None]
    b_mask = b_is_row & (b_head < num_heads)
    b_is_q = b_head < num_q_heads
    b_own_head = tl.where(b_is_q, b_head, b_head - num_q_heads).to(tl.int64)
    p_q += batch * q_batch_stride + start * q_token_stride
    p_k += batch * k_batch_stride + start * k_token_stride
    p_q_out += batch * q_out_batch_stride + start * q_out_token_stride
    p_k_out += batch * k_out_batch_stride + start * k_out_token_stride
    p_x = tl.where(b_is_q, p_q, p_k) + b_own_head * tl.where(b_is_q, q_head_stride, k_head_stride)
    p_y = tl.where(b_is_q, p_q_out, p_k_out) + b_own_head * tl.where(
        b_is_q, q_out_head_stride, k_out_head_stride
    )
    if BLOCK_TOKENS > 1:
        p_x += b_token * tl.where(b_is_q, q_token_stride, k_token_stride)
        p_y += b_token * tl.where(b_is_q, q_out_token_stride, k_out_token_stride)
    b_x1, b_x2 = load_pairs(p_x + START, b_mask, IN_PAIRS, BLOCK_HALF, HALF, True, None)
    if NUM_PASSED > 0:
        b_passed = tl.arange(0, BLOCK_PASSED)[None, None, :]
        b_mask_passed = b_mask & (b_passed < NUM_PASSED)
        if START == 0:
            b_passed += 2 * HALF
        b_items = tl.load(p_x + b_passed, mask=b_mask_passed, eviction_policy="evict_first")
        tl.store(p_y + b_passed, b_items.to(p_q_out.dtype.element_ty), mask=b_mask_passed)

    p_cos += batch * table_batch_stride + start * table_token_stride
    p_sin += batch * table_batch_stride + start * table_token_stride
    b_at_table = b_token * table_token_stride
    if SPREAD:
        # As large as x, so that no layout has to change: the heads of a token read the same lines of cache.
        b_at_table += tl.zeros([1, BLOCK_HEADS, 1], tl.int64)
        b_is_row &= b_head >= 0
    b_cos1, b_cos2 = load_pairs(p_cos + b_at_table, b_is_row, TABLE_PAIRS, BLOCK_HALF, HALF, False, None)
    b_sin1, b_sin2 = load_pairs(p_sin + b_at_table, b_is_row, TABLE_PAIRS, BLOCK_HALF, HALF, False, None)
    if TRANSPOSED:
        b_sin1, b_sin2 = b_sin2, b_sin1
    b_y1, b_y2 = turn(b_x1, b_x2, b_cos1, b_cos2, b_sin1, b_sin2, SIGN)
    store_pairs(p_y + START, b_mask, b_y1, b_y2, OUT_PAIRS, BLOCK_HALF, HALF)
