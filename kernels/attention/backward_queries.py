"""The Triton kernel of attention's gradients of queries: a tile of one head goes through its keys, as in forward."""

from __future__ import annotations

from fxopt.kernels.attention.backward import find_score_gradients, recompute_weights
from fxopt.kernels.attention.tiles import (
    LOG2_E,
    Mask,
    Rows,
    Scores,
    as_column,
    find_spans,
    load_interval,
    load_tile,
    pick_span,
    store_tile,
)
from fxopt.kernels.launch import jit, tl


@jit
def _query_span(
    b_dq,
    b_q,
    b_dout,
    b_lse,
    b_delta,
    k,
    v,
    begin,
    end,
    b_query,
    interval,
    mask,
    scores,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    for start in range(begin, end, KEYS):
        b_key = start + tl.arange(0, KEYS)
        b_k = load_tile(k, b_key)
        b_weight, b_slope = recompute_weights(
            b_q,
            b_k,
            b_query[:, None],
            b_key[None, :],
            b_lse[:, None],
            as_column(interval),
            mask,
            scores,
            MASKED,
            PRECISION,
        )
        b_v = load_tile(v, b_key)
        b_dscore = find_score_gradients(b_weight, b_slope, b_dout, b_v, b_delta[:, None], scores, PRECISION)
        b_dq = tl.dot(b_dscore.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@jit
def _query_tile(
    q,
    k,
    v,
    dout,
    p_lse,
    p_delta,
    p_intervals,
    interval_row_stride,
    interval_kind_stride,
    first_query,
    mask,
    scores,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b_query = first_query + tl.arange(0, QUERIES)
    b_q = load_tile(q, b_query)
    b_dout = load_tile(dout, b_query)
    b_lse = tl.load(p_lse + b_query, mask=b_query < mask.num_queries, other=0.0) * LOG2_E
    b_delta = tl.load(p_delta + b_query, mask=b_query < mask.num_queries, other=0.0)
    interval = load_interval(p_intervals, b_query, interval_row_stride, interval_kind_stride, mask)
    begin, whole_begin, whole_end, end = find_spans(first_query, interval, mask, QUERIES, KEYS)
    b_dq = tl.zeros((QUERIES, q.BLOCK), tl.float32)
    for span in tl.static_range(3):
        if span == 2 or (not mask.READS and (span == 1 or mask.HAS_MASK)):
            at, until = pick_span(begin, whole_begin, whole_end, end, span)
            b_dq = _query_span(
                b_dq,
                b_q,
                b_dout,
                b_lse,
                b_delta,
                k,
                v,
                at,
                until,
                b_query,
                interval,
                mask,
                scores,
                span != 1,
                KEYS,
                PRECISION,
            )
    return b_dq * scores.scale


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
    p_q += batch * q_batch_stride + head * q_head_stride
    p_k += batch * k_batch_stride + key_head * k_head_stride
    p_v += batch * v_batch_stride + key_head * v_head_stride
    p_dout += batch * dout_batch_stride + head * dout_head_stride
    p_mask += batch * mask_batch_stride + head * mask_head_stride
    p_intervals += batch * interval_batch_stride + head * interval_head_stride
    at = matrix.to(tl.int64) * num_queries
    b_dq = _query_tile(
        Rows(p_q, q_row_stride, num_queries, WIDTH, BLOCK_WIDTH),
        Rows(p_k, k_row_stride, num_keys, WIDTH, BLOCK_WIDTH),
        Rows(p_v, v_row_stride, num_keys, VALUE_WIDTH, BLOCK_VALUE),
        Rows(p_dout, dout_row_stride, num_queries, VALUE_WIDTH, BLOCK_VALUE),
        p_lse + at,
        p_delta + at,
        p_intervals,
        interval_row_stride,
        interval_kind_stride,
        tile * QUERIES,
        Mask(
            p_mask,
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
        KEYS,
        PRECISION,
    )
    b_query = tile * QUERIES + tl.arange(0, QUERIES)
    p_dq += batch * dq_batch_stride + head * dq_head_stride
    store_tile(Rows(p_dq, dq_row_stride, num_queries, WIDTH, BLOCK_WIDTH), b_dq, b_query)
