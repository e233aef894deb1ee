"""The Triton kernel of attention forward: each program owns a tile of queries of one head and goes through the keys.

Tiles that all rows see whole skip the masking.

With a mask each kernel, here and backward, is launched twice, to go by intervals and to read the mask (READS):
`p_reads` says on the device which of the two is to do the work, and the other ends at once. In one kernel both would
not fit in registers.
"""

from __future__ import annotations

from fxopt.kernels.attention.tiles import (
    LN_2,
    LOG2_E,
    Mask,
    Rows,
    Scores,
    as_column,
    find_spans,
    hide,
    load_interval,
    load_tile,
    make_scores,
    pick_span,
    store_tile,
)
from fxopt.kernels.launch import jit, tl


@jit
def _forward_span(
    b_acc,
    b_max,
    b_sum,
    b_q,
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
        b_product = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_score, _ = make_scores(b_product, scores)
        if MASKED:
            b_score = hide(b_score, b_query[:, None], b_key[None, :], as_column(interval), mask)
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_weight = tl.exp2(b_score - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        b_v = load_tile(v, b_key)
        b_acc = tl.dot(b_weight.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION)
        b_max = b_new_max
    return b_acc, b_max, b_sum


@jit
def _forward_tile(
    q,
    k,
    v,
    p_sinks,
    head,
    p_intervals,
    interval_row_stride,
    interval_kind_stride,
    first_query,
    mask,
    scores,
    HAS_SINKS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b_query = first_query + tl.arange(0, QUERIES)
    b_q = load_tile(q, b_query)
    interval = load_interval(p_intervals, b_query, interval_row_stride, interval_kind_stride, mask)
    begin, whole_begin, whole_end, end = find_spans(first_query, interval, mask, QUERIES, KEYS)
    b_max = tl.full((QUERIES,), float("-inf"), tl.float32)
    b_sum = tl.zeros((QUERIES,), tl.float32)
    b_acc = tl.zeros((QUERIES, v.BLOCK), tl.float32)
    for span in tl.static_range(3):
        if span == 2 or (not mask.READS and (span == 1 or mask.HAS_MASK)):
            at, until = pick_span(begin, whole_begin, whole_end, end, span)
            b_acc, b_max, b_sum = _forward_span(
                b_acc,
                b_max,
                b_sum,
                b_q,
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
    return b_acc / b_sum[:, None], (b_max + tl.log2(b_sum)) * LN_2


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
    p_q += batch * q_batch_stride + head * q_head_stride
    p_k += batch * k_batch_stride + key_head * k_head_stride
    p_v += batch * v_batch_stride + key_head * v_head_stride
    p_mask += batch * mask_batch_stride + head * mask_head_stride
    p_intervals += batch * interval_batch_stride + head * interval_head_stride
    b_out, b_lse = _forward_tile(
        Rows(p_q, q_row_stride, num_queries, WIDTH, BLOCK_WIDTH),
        Rows(p_k, k_row_stride, num_keys, WIDTH, BLOCK_WIDTH),
        Rows(p_v, v_row_stride, num_keys, VALUE_WIDTH, BLOCK_VALUE),
        p_sinks,
        head,
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
        HAS_SINKS,
        QUERIES,
        KEYS,
        PRECISION,
    )
    # Only now, so that these pointers take no registers before.
    b_query = tile * QUERIES + tl.arange(0, QUERIES)
    p_out += batch * out_batch_stride + head * out_head_stride
    store_tile(Rows(p_out, out_row_stride, num_queries, VALUE_WIDTH, BLOCK_VALUE), b_out, b_query)
    tl.store(p_lse + matrix.to(tl.int64) * num_queries + b_query, b_lse, mask=b_query < num_queries)
