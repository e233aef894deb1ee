"""The Triton kernels of attention backward: products with the output, and the gradients of keys and values.

The second owns a tile of keys of one key head and goes through the queries of all heads that read it; the kernel of the
queries' gradients, in `backward_queries`, a tile of queries of one head as in forward. So nothing is summed by atomics.
All compute the weights again from lse.
"""

from __future__ import annotations

from fxopt.kernels.attention.tiles import (
    LOG2_E,
    Mask,
    Rows,
    Scores,
    as_row,
    hide,
    load_interval,
    load_tile,
    make_scores,
    store_tile,
)
from fxopt.kernels.launch import jit, tl


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
    b_dout = load_tile(Rows(p_dout, dout_row_stride, num_queries, VALUE_WIDTH, BLOCK_VALUE), b_query)
    b_out = load_tile(Rows(p_out, out_row_stride, num_queries, VALUE_WIDTH, BLOCK_VALUE), b_query)
    b_delta = tl.sum(b_dout.to(tl.float32) * b_out.to(tl.float32), 1)
    at = matrix.to(tl.int64) * num_queries
    tl.store(p_delta + at + b_query, b_delta, mask=b_inside)
    if HAS_SINKS:
        sink = tl.load(p_sinks + head).to(tl.float32)
        b_lse = tl.load(p_lse + at + b_query, mask=b_inside, other=0.0)
        b_share = tl.where(b_inside, tl.exp2((sink - b_lse) * LOG2_E) * b_delta, 0.0)
        tl.store(p_dsinks + matrix * tl.num_programs(0) + tl.program_id(0), -tl.sum(b_share, 0))


@jit
def recompute_weights(b_rows, b_columns, b_query, b_key, b_lse, interval, mask, scores, MASKED, PRECISION):
    """Return the weights of a tile, and the derivative of its scores by scale * product.

    `b_rows` and `b_columns` are queries and keys in the order of the tile; the rest comes shaped to broadcast to it.
    """
    b_product = tl.dot(b_rows, tl.trans(b_columns), input_precision=PRECISION)
    b_score, b_slope = make_scores(b_product, scores)
    if MASKED:
        b_score = hide(b_score, b_query, b_key, interval, mask)
    return tl.exp2(b_score - b_lse), b_slope


@jit
def find_score_gradients(b_weight, b_slope, b_rows, b_columns, b_delta, scores, PRECISION):
    """Return the gradients by scale * product; `b_rows` and `b_columns` are values and gradients of the output."""
    b_dweight = tl.dot(b_rows, tl.trans(b_columns), input_precision=PRECISION)
    b_dscore = b_weight * (b_dweight - b_delta)
    if scores.HAS_SOFTCAP:
        b_dscore *= b_slope
    return b_dscore


@jit
def _key_span(
    b_dk,
    b_dv,
    b_k,
    b_v,
    q,
    dout,
    p_lse,
    p_delta,
    begin,
    end,
    b_key,
    p_intervals,
    interval_row_stride,
    interval_kind_stride,
    mask,
    scores,
    QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One loop for tiles that all see whole and those that not: two would not fit in registers.
    for start in range(begin, end, QUERIES):
        b_query = start + tl.arange(0, QUERIES)
        b_inside = b_query < mask.num_queries
        b_q = load_tile(q, b_query)
        b_lse = tl.load(p_lse + b_query, mask=b_inside, other=0.0) * LOG2_E
        interval = load_interval(p_intervals, b_query, interval_row_stride, interval_kind_stride, mask)
        b_weight, b_slope = recompute_weights(
            b_k,
            b_q,
            b_query[None, :],
            b_key[:, None],
            b_lse[None, :],
            as_row(interval),
            mask,
            scores,
            mask.CAUSAL or mask.HAS_MASK,
            PRECISION,
        )
        b_dout = load_tile(dout, b_query)
        b_dv = tl.dot(b_weight.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
        b_delta = tl.load(p_delta + b_query, mask=b_inside, other=0.0)
        b_dscore = find_score_gradients(b_weight, b_slope, b_v, b_dout, b_delta[None, :], scores, PRECISION)
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
    p_dk += batch * dk_batch_stride + key_head * dk_head_stride
    p_dv += batch * dv_batch_stride + key_head * dv_head_stride
    b_k = load_tile(Rows(p_k, k_row_stride, num_keys, WIDTH, BLOCK_WIDTH), b_key)
    b_v = load_tile(Rows(p_v, v_row_stride, num_keys, VALUE_WIDTH, BLOCK_VALUE), b_key)
    b_dk = tl.zeros((KEYS, BLOCK_WIDTH), tl.float32)
    b_dv = tl.zeros((KEYS, BLOCK_VALUE), tl.float32)
    for member in range(num_groups):
        head = key_head * num_groups + member
        row = (batch * num_key_heads * num_groups + head) * num_queries
        p_head = p_q + (batch * q_batch_stride + head * q_head_stride)
        p_dhead = p_dout + (batch * dout_batch_stride + head * dout_head_stride)
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
            Rows(p_head, q_row_stride, num_queries, WIDTH, BLOCK_WIDTH),
            Rows(p_dhead, dout_row_stride, num_queries, VALUE_WIDTH, BLOCK_VALUE),
            p_lse + row,
            p_delta + row,
            begin,
            end,
            b_key,
            p_intervals + (batch * interval_batch_stride + head * interval_head_stride),
            interval_row_stride,
            interval_kind_stride,
            Mask(
                p_mask + (batch * mask_batch_stride + head * mask_head_stride),
                mask_row_stride,
                mask_key_stride,
                lowest,
                num_queries,
                num_keys,
                CAUSAL,
                HAS_MASK,
                READS,
                IS_BOOL,
            ),
            Scores(scale, softcap, HAS_SOFTCAP, PRECISION == "ieee"),
            QUERIES,
            PRECISION,
        )
    store_tile(Rows(p_dk, dk_row_stride, num_keys, WIDTH, BLOCK_WIDTH), b_dk * scale, b_key)
    store_tile(Rows(p_dv, dv_row_stride, num_keys, VALUE_WIDTH, BLOCK_VALUE), b_dv, b_key)
