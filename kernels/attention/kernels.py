"""The Triton kernels of attention: forward; the gradients of keys and values; the gradient of queries.

Each program of the first and last owns a tile of queries of one head and goes through tiles of keys; those of
the second own a tile of keys of one key head and go through the queries of all heads that read it, so that
nothing is summed by atomics. Tiles that all rows see whole skip the masking. Scores are kept times log2(e).

With a mask each kernel is launched twice, to go by intervals and to read the mask (READS): `p_reads` says on the
device which of the two is to do the work, and the other ends at once. In one kernel both would not fit in registers.
"""

from __future__ import annotations

from fxopt.kernels.launch import jit, tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LEVEL = tl.constexpr(2)
NAN = tl.constexpr(4)


@jit
def _load_tile(p_base, b_row, row_stride, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return [rows, BLOCK], zero beyond the last row and column."""
    b_column = tl.arange(0, BLOCK)
    p_at = p_base + b_row[:, None].to(tl.int64) * row_stride + b_column[None, :]
    b_inside = b_row[:, None] < num_rows
    if WIDTH != BLOCK:
        b_inside = b_inside & (b_column[None, :] < WIDTH)
    return tl.load(p_at, mask=b_inside, other=0.0)


@jit
def _store_tile(p_base, b_value, b_row, row_stride, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    b_column = tl.arange(0, BLOCK)
    p_at = p_base + b_row[:, None].to(tl.int64) * row_stride + b_column[None, :]
    b_inside = (b_row[:, None] < num_rows) & (b_column[None, :] < WIDTH)
    tl.store(p_at, b_value.to(p_base.dtype.element_ty), mask=b_inside)


@jit
def _scores(b_product, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return the scores times log2(e) of products of queries and keys, and their derivative by scale * product."""
    if HAS_SOFTCAP:
        b_tanh = 2.0 * tl.sigmoid(b_product * (2.0 * scale / softcap)) - 1.0
        return b_tanh * (softcap * LOG2_E), 1.0 - b_tanh * b_tanh
    else:  # noqa: RET505 (compiled apart: after a branch that returns nothing may follow)
        return b_product * (scale * LOG2_E), 1.0


@jit
def _load_interval(p_intervals, b_row, num_rows, row_stride, kind_stride):
    """Return start, end and kind of rows of queries; rows beyond the last are as the last."""
    p_at = p_intervals + tl.minimum(b_row, num_rows - 1) * row_stride
    return tl.load(p_at), tl.load(p_at + kind_stride), tl.load(p_at + 2 * kind_stride)


@jit
def _hide(
    b_score,
    b_query,
    b_key,
    num_queries,
    num_keys,
    b_start,
    b_end,
    b_kind,
    p_mask,
    mask_row_stride,
    mask_key_stride,
    lowest,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    READS: tl.constexpr,
    IS_BOOL: tl.constexpr,
):
    """Return the scores with the mask: all of a tile's indices come shaped so that they broadcast to it."""
    b_seen = b_key < num_keys
    if CAUSAL:
        b_seen = b_seen & (b_query >= b_key)
    if HAS_MASK:
        b_seen = b_seen & (b_key >= b_start) & (b_key < b_end)
        b_is_level = (b_kind & LEVEL) != 0
        b_is_nan = b_kind == NAN
        b_score = tl.where(b_is_level, 0.0, tl.where(b_is_nan, float("nan"), b_score))
        if READS:
            p_at = p_mask + b_query.to(tl.int64) * mask_row_stride + b_key.to(tl.int64) * mask_key_stride
            b_inside = (b_query < num_queries) & (b_key < num_keys)
            if IS_BOOL:
                b_value = tl.load(p_at, mask=b_inside, other=0)
                b_seen = b_seen & ((b_value != 0) | b_is_nan)
            else:
                b_value = tl.load(p_at, mask=b_inside, other=0.0).to(tl.float32)
                b_shut = b_value <= lowest
                b_score += tl.where(b_shut, 0.0, b_value * LOG2_E)
                b_seen = b_seen & (b_is_nan | tl.where(b_is_level, b_value > float("-inf"), ~b_shut))
    return tl.where(b_seen, b_score, float("-inf"))


@jit
def _find_spans(
    first_query,
    num_keys,
    b_start,
    b_end,
    b_kind,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    READS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return where the keys of a tile of queries begin and end, and in between those that all rows see."""
    begin = first_query * 0
    end = begin + num_keys
    whole_begin = begin
    whole_end = end // KEYS * KEYS
    if CAUSAL:
        end = tl.minimum(end, first_query + QUERIES)
        whole_end = tl.minimum(whole_end, (first_query + 1) // KEYS * KEYS)
    if HAS_MASK:
        begin = tl.min(tl.where(b_end > b_start, b_start, num_keys), 0) // KEYS * KEYS
        end = tl.max(b_end, 0)
        whole_begin = (tl.max(b_start, 0) + KEYS - 1) // KEYS * KEYS
        whole_end = tl.min(b_end, 0) // KEYS * KEYS
        is_whole = (tl.max(b_kind, 0) == 0) & (whole_end > whole_begin)
        whole_begin = tl.where(is_whole, whole_begin, begin)
        whole_end = tl.where(is_whole, whole_end, begin)
    return begin, whole_begin, whole_end, end


@jit
def _forward_span(
    b_acc,
    b_max,
    b_sum,
    b_q,
    p_k,
    p_v,
    k_row_stride,
    v_row_stride,
    begin,
    end,
    b_query,
    num_queries,
    num_keys,
    b_start,
    b_end,
    b_kind,
    p_mask,
    mask_row_stride,
    mask_key_stride,
    lowest,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    READS: tl.constexpr,
    IS_BOOL: tl.constexpr,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    for start in range(begin, end, KEYS):
        b_key = start + tl.arange(0, KEYS)
        b_k = _load_tile(p_k, b_key, k_row_stride, num_keys, WIDTH, BLOCK_WIDTH)
        b_product = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_score, _ = _scores(b_product, scale, softcap, HAS_SOFTCAP)
        if MASKED:
            b_score = _hide(
                b_score,
                b_query[:, None],
                b_key[None, :],
                num_queries,
                num_keys,
                b_start[:, None],
                b_end[:, None],
                b_kind[:, None],
                p_mask,
                mask_row_stride,
                mask_key_stride,
                lowest,
                CAUSAL,
                HAS_MASK,
                READS,
                IS_BOOL,
            )
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_weight = tl.exp2(b_score - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        b_v = _load_tile(p_v, b_key, v_row_stride, num_keys, VALUE_WIDTH, BLOCK_VALUE)
        b_acc = tl.dot(b_weight.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION)
        b_max = b_new_max
    return b_acc, b_max, b_sum


@jit
def attention_forward_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_intervals,
    p_reads,
    p_sinks,
    p_out,
    p_lse,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_key_stride,
    interval_kind_stride,
    interval_batch_stride,
    interval_head_stride,
    interval_row_stride,
    num_heads,
    num_groups,
    num_queries,
    num_keys,
    scale,
    softcap,
    lowest,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    READS: tl.constexpr,
    IS_BOOL: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the output and lse of QUERIES queries of one head; the last queries, which see most, come first."""
    if HAS_MASK:  # noqa: SIM102 (a constant; what follows is none)
        if (tl.load(p_reads) != 0) != READS:
            return
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    matrix = tl.program_id(1)
    batch = (matrix // num_heads).to(tl.int64)
    head = (matrix % num_heads).to(tl.int64)
    key_head = head // num_groups
    first_query = tile * QUERIES
    b_query = first_query + tl.arange(0, QUERIES)
    p_k += batch * k_batch_stride + key_head * k_head_stride
    p_v += batch * v_batch_stride + key_head * v_head_stride
    p_q += batch * q_batch_stride + head * q_head_stride
    b_q = _load_tile(p_q, b_query, q_row_stride, num_queries, WIDTH, BLOCK_WIDTH)
    b_start = b_query
    b_end = b_query
    b_kind = b_query
    if HAS_MASK:
        p_mask += batch * mask_batch_stride + head * mask_head_stride
        p_intervals += batch * interval_batch_stride + head * interval_head_stride
        b_start, b_end, b_kind = _load_interval(
            p_intervals, b_query, num_queries, interval_row_stride, interval_kind_stride
        )
    begin, whole_begin, whole_end, end = _find_spans(
        first_query, num_keys, b_start, b_end, b_kind, CAUSAL, HAS_MASK, READS, QUERIES, KEYS
    )
    b_max = tl.full((QUERIES,), float("-inf"), tl.float32)
    b_sum = tl.zeros((QUERIES,), tl.float32)
    b_acc = tl.zeros((QUERIES, BLOCK_VALUE), tl.float32)
    for span in tl.static_range(3):
        # Before the keys that all rows see, these, and after them.
        if span == 0:
            at, until = begin, whole_begin
        elif span == 1:
            at, until = whole_begin, whole_end
        else:
            at, until = whole_end, end
        if span == 2 or (not READS and (span == 1 or HAS_MASK)):
            b_acc, b_max, b_sum = _forward_span(
                b_acc,
                b_max,
                b_sum,
                b_q,
                p_k,
                p_v,
                k_row_stride,
                v_row_stride,
                at,
                until,
                b_query,
                num_queries,
                num_keys,
                b_start,
                b_end,
                b_kind,
                p_mask,
                mask_row_stride,
                mask_key_stride,
                lowest,
                scale,
                softcap,
                HAS_SOFTCAP,
                CAUSAL,
                HAS_MASK,
                READS,
                IS_BOOL,
                span != 1,
                KEYS,
                WIDTH,
                BLOCK_WIDTH,
                VALUE_WIDTH,
                BLOCK_VALUE,
                PRECISION,
            )
    if HAS_SINKS:
        sink = tl.load(p_sinks + head).to(tl.float32) * LOG2_E
        b_new_max = tl.maximum(b_max, sink)
        b_decay = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_decay + tl.exp2(sink - b_new_max)
        b_acc *= b_decay[:, None]
        b_max = b_new_max
    b_is_empty = b_sum == 0.0
    b_sum = tl.where(b_is_empty, 1.0, b_sum)
    b_max = tl.where(b_is_empty, 0.0, b_max)
    p_out += batch * out_batch_stride + head * out_head_stride
    b_out = b_acc / b_sum[:, None]
    _store_tile(p_out, b_out, b_query, out_row_stride, num_queries, VALUE_WIDTH, BLOCK_VALUE)
    b_lse = (b_max + tl.log2(b_sum)) * LN_2
    tl.store(p_lse + matrix.to(tl.int64) * num_queries + b_query, b_lse, mask=b_query < num_queries)


@jit
def attention_delta_kernel(
    p_dout,
    p_out,
    p_lse,
    p_sinks,
    p_delta,
    p_dsinks,
    dout_batch_stride,
    dout_head_stride,
    dout_row_stride,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    num_heads,
    num_queries,
    HAS_SINKS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Write the product of the output and its gradient, row by row, and a tile's part of the sink's gradient."""
    matrix = tl.program_id(1)
    batch = (matrix // num_heads).to(tl.int64)
    head = (matrix % num_heads).to(tl.int64)
    b_query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    b_inside = b_query < num_queries
    p_dout += batch * dout_batch_stride + head * dout_head_stride
    p_out += batch * out_batch_stride + head * out_head_stride
    b_dout = _load_tile(p_dout, b_query, dout_row_stride, num_queries, VALUE_WIDTH, BLOCK_VALUE)
    b_out = _load_tile(p_out, b_query, out_row_stride, num_queries, VALUE_WIDTH, BLOCK_VALUE)
    b_delta = tl.sum(b_dout.to(tl.float32) * b_out.to(tl.float32), 1)
    at = matrix.to(tl.int64) * num_queries
    tl.store(p_delta + at + b_query, b_delta, mask=b_inside)
    if HAS_SINKS:
        sink = tl.load(p_sinks + head).to(tl.float32)
        b_lse = tl.load(p_lse + at + b_query, mask=b_inside, other=0.0)
        b_share = tl.where(b_inside, tl.exp2((sink - b_lse) * LOG2_E) * b_delta, 0.0)
        tl.store(p_dsinks + matrix * tl.num_programs(0) + tl.program_id(0), -tl.sum(b_share, 0))


@jit
def _key_span(
    b_dk,
    b_dv,
    b_k,
    b_v,
    p_q,
    p_dout,
    p_lse,
    p_delta,
    q_row_stride,
    dout_row_stride,
    begin,
    end,
    b_key,
    num_queries,
    num_keys,
    p_intervals,
    interval_row_stride,
    interval_kind_stride,
    p_mask,
    mask_row_stride,
    mask_key_stride,
    lowest,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    READS: tl.constexpr,
    IS_BOOL: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One loop for tiles that all see whole and those that not: two would not fit in registers.
    for start in range(begin, end, QUERIES):
        b_query = start + tl.arange(0, QUERIES)
        b_inside = b_query < num_queries
        b_q = _load_tile(p_q, b_query, q_row_stride, num_queries, WIDTH, BLOCK_WIDTH)
        b_lse = tl.load(p_lse + b_query, mask=b_inside, other=0.0) * LOG2_E
        b_product = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_score, b_slope = _scores(b_product, scale, softcap, HAS_SOFTCAP)
        if CAUSAL or HAS_MASK:
            b_start = b_query
            b_end = b_query
            b_kind = b_query
            if HAS_MASK:
                b_start, b_end, b_kind = _load_interval(
                    p_intervals, b_query, num_queries, interval_row_stride, interval_kind_stride
                )
            b_score = _hide(
                b_score,
                b_query[None, :],
                b_key[:, None],
                num_queries,
                num_keys,
                b_start[None, :],
                b_end[None, :],
                b_kind[None, :],
                p_mask,
                mask_row_stride,
                mask_key_stride,
                lowest,
                CAUSAL,
                HAS_MASK,
                READS,
                IS_BOOL,
            )
        b_weight = tl.exp2(b_score - b_lse[None, :])
        b_dout = _load_tile(p_dout, b_query, dout_row_stride, num_queries, VALUE_WIDTH, BLOCK_VALUE)
        b_dv = tl.dot(b_weight.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
        b_delta = tl.load(p_delta + b_query, mask=b_inside, other=0.0)
        b_dweight = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)
        b_dscore = b_weight * (b_dweight - b_delta[None, :])
        if HAS_SOFTCAP:
            b_dscore *= b_slope
        b_dk = tl.dot(b_dscore.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@jit
def attention_backward_keys_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_lse,
    p_delta,
    p_mask,
    p_intervals,
    p_reads,
    p_ranges,
    p_dk,
    p_dv,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
    dout_batch_stride,
    dout_head_stride,
    dout_row_stride,
    dk_batch_stride,
    dk_head_stride,
    dk_row_stride,
    dv_batch_stride,
    dv_head_stride,
    dv_row_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_key_stride,
    interval_kind_stride,
    interval_batch_stride,
    interval_head_stride,
    interval_row_stride,
    range_end_stride,
    range_batch_stride,
    range_head_stride,
    num_key_heads,
    num_groups,
    num_queries,
    num_keys,
    scale,
    softcap,
    lowest,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    READS: tl.constexpr,
    IS_BOOL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradients of KEYS keys and values of one key head, summed over the heads that read it."""
    if HAS_MASK:  # noqa: SIM102 (a constant; what follows is none)
        if (tl.load(p_reads) != 0) != READS:
            return
    tile = tl.program_id(0)
    matrix = tl.program_id(1)
    batch = (matrix // num_key_heads).to(tl.int64)
    key_head = (matrix % num_key_heads).to(tl.int64)
    first_key = tile * KEYS
    b_key = first_key + tl.arange(0, KEYS)
    p_k += batch * k_batch_stride + key_head * k_head_stride
    p_v += batch * v_batch_stride + key_head * v_head_stride
    b_k = _load_tile(p_k, b_key, k_row_stride, num_keys, WIDTH, BLOCK_WIDTH)
    b_v = _load_tile(p_v, b_key, v_row_stride, num_keys, VALUE_WIDTH, BLOCK_VALUE)
    b_dk = tl.zeros((KEYS, BLOCK_WIDTH), tl.float32)
    b_dv = tl.zeros((KEYS, BLOCK_VALUE), tl.float32)
    for member in range(num_groups):
        head = key_head * num_groups + member
        row = (batch * num_key_heads * num_groups + head) * num_queries
        p_rows = p_intervals + (batch * interval_batch_stride + head * interval_head_stride)
        p_masks = p_mask + (batch * mask_batch_stride + head * mask_head_stride)
        begin = first_key * 0
        end = begin + num_queries
        if CAUSAL:
            begin = tl.minimum(first_key // QUERIES * QUERIES, end)
        if HAS_MASK:
            p_range = p_ranges + (batch * range_batch_stride + head * range_head_stride) + tile
            begin = tl.load(p_range) // QUERIES * QUERIES
            end = tl.load(p_range + range_end_stride)
        b_dk, b_dv = _key_span(
            b_dk,
            b_dv,
            b_k,
            b_v,
            p_q + (batch * q_batch_stride + head * q_head_stride),
            p_dout + (batch * dout_batch_stride + head * dout_head_stride),
            p_lse + row,
            p_delta + row,
            q_row_stride,
            dout_row_stride,
            begin,
            end,
            b_key,
            num_queries,
            num_keys,
            p_rows,
            interval_row_stride,
            interval_kind_stride,
            p_masks,
            mask_row_stride,
            mask_key_stride,
            lowest,
            scale,
            softcap,
            HAS_SOFTCAP,
            CAUSAL,
            HAS_MASK,
            READS,
            IS_BOOL,
            QUERIES,
            WIDTH,
            BLOCK_WIDTH,
            VALUE_WIDTH,
            BLOCK_VALUE,
            PRECISION,
        )
    p_dk += batch * dk_batch_stride + key_head * dk_head_stride
    p_dv += batch * dv_batch_stride + key_head * dv_head_stride
    _store_tile(p_dk, b_dk * scale, b_key, dk_row_stride, num_keys, WIDTH, BLOCK_WIDTH)
    _store_tile(p_dv, b_dv, b_key, dv_row_stride, num_keys, VALUE_WIDTH, BLOCK_VALUE)


@jit
def _query_span(
    b_dq,
    b_q,
    b_dout,
    b_lse,
    b_delta,
    p_k,
    p_v,
    k_row_stride,
    v_row_stride,
    begin,
    end,
    b_query,
    num_queries,
    num_keys,
    b_start,
    b_end,
    b_kind,
    p_mask,
    mask_row_stride,
    mask_key_stride,
    lowest,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    READS: tl.constexpr,
    IS_BOOL: tl.constexpr,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    for start in range(begin, end, KEYS):
        b_key = start + tl.arange(0, KEYS)
        b_k = _load_tile(p_k, b_key, k_row_stride, num_keys, WIDTH, BLOCK_WIDTH)
        b_product = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_score, b_slope = _scores(b_product, scale, softcap, HAS_SOFTCAP)
        if MASKED:
            b_score = _hide(
                b_score,
                b_query[:, None],
                b_key[None, :],
                num_queries,
                num_keys,
                b_start[:, None],
                b_end[:, None],
                b_kind[:, None],
                p_mask,
                mask_row_stride,
                mask_key_stride,
                lowest,
                CAUSAL,
                HAS_MASK,
                READS,
                IS_BOOL,
            )
        b_weight = tl.exp2(b_score - b_lse[:, None])
        b_v = _load_tile(p_v, b_key, v_row_stride, num_keys, VALUE_WIDTH, BLOCK_VALUE)
        b_dweight = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
        b_dscore = b_weight * (b_dweight - b_delta[:, None])
        if HAS_SOFTCAP:
            b_dscore *= b_slope
        b_dq = tl.dot(b_dscore.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@jit
def attention_backward_queries_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_lse,
    p_delta,
    p_mask,
    p_intervals,
    p_reads,
    p_dq,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
    dout_batch_stride,
    dout_head_stride,
    dout_row_stride,
    dq_batch_stride,
    dq_head_stride,
    dq_row_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_key_stride,
    interval_kind_stride,
    interval_batch_stride,
    interval_head_stride,
    interval_row_stride,
    num_heads,
    num_groups,
    num_queries,
    num_keys,
    scale,
    softcap,
    lowest,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    READS: tl.constexpr,
    IS_BOOL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient of QUERIES queries of one head."""
    if HAS_MASK:  # noqa: SIM102 (a constant; what follows is none)
        if (tl.load(p_reads) != 0) != READS:
            return
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    matrix = tl.program_id(1)
    batch = (matrix // num_heads).to(tl.int64)
    head = (matrix % num_heads).to(tl.int64)
    key_head = head // num_groups
    first_query = tile * QUERIES
    b_query = first_query + tl.arange(0, QUERIES)
    p_k += batch * k_batch_stride + key_head * k_head_stride
    p_v += batch * v_batch_stride + key_head * v_head_stride
    p_q += batch * q_batch_stride + head * q_head_stride
    p_dout += batch * dout_batch_stride + head * dout_head_stride
    b_q = _load_tile(p_q, b_query, q_row_stride, num_queries, WIDTH, BLOCK_WIDTH)
    b_dout = _load_tile(p_dout, b_query, dout_row_stride, num_queries, VALUE_WIDTH, BLOCK_VALUE)
    at = matrix.to(tl.int64) * num_queries
    b_lse = tl.load(p_lse + at + b_query, mask=b_query < num_queries, other=0.0) * LOG2_E
    b_delta = tl.load(p_delta + at + b_query, mask=b_query < num_queries, other=0.0)
    b_start = b_query
    b_end = b_query
    b_kind = b_query
    if HAS_MASK:
        p_mask += batch * mask_batch_stride + head * mask_head_stride
        p_intervals += batch * interval_batch_stride + head * interval_head_stride
        b_start, b_end, b_kind = _load_interval(
            p_intervals, b_query, num_queries, interval_row_stride, interval_kind_stride
        )
    begin, whole_begin, whole_end, end = _find_spans(
        first_query, num_keys, b_start, b_end, b_kind, CAUSAL, HAS_MASK, READS, QUERIES, KEYS
    )
    b_dq = tl.zeros((QUERIES, BLOCK_WIDTH), tl.float32)
    for span in tl.static_range(3):
        # As in forward.
        if span == 0:
            at_key, until = begin, whole_begin
        elif span == 1:
            at_key, until = whole_begin, whole_end
        else:
            at_key, until = whole_end, end
        if span == 2 or (not READS and (span == 1 or HAS_MASK)):
            b_dq = _query_span(
                b_dq,
                b_q,
                b_dout,
                b_lse,
                b_delta,
                p_k,
                p_v,
                k_row_stride,
                v_row_stride,
                at_key,
                until,
                b_query,
                num_queries,
                num_keys,
                b_start,
                b_end,
                b_kind,
                p_mask,
                mask_row_stride,
                mask_key_stride,
                lowest,
                scale,
                softcap,
                HAS_SOFTCAP,
                CAUSAL,
                HAS_MASK,
                READS,
                IS_BOOL,
                span != 1,
                KEYS,
                WIDTH,
                BLOCK_WIDTH,
                VALUE_WIDTH,
                BLOCK_VALUE,
                PRECISION,
            )
    p_dq += batch * dq_batch_stride + head * dq_head_stride
    _store_tile(p_dq, b_dq * scale, b_query, dq_row_stride, num_queries, WIDTH, BLOCK_WIDTH)
