"""What the Triton kernels of attention share: tiles of rows, scores, masks, and which keys a tile goes through.

Scores are kept times log2(e). A kernel bundles what belongs together (`Rows`, `Scores`, `Mask`, `Interval`) and hands
it on: these are named tuples to Triton and to its interpreter, and cost nothing once compiled. They are built where
they are handed on: Triton makes tensors of the constants of one that is assigned to a name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fxopt.kernels.launch import jit, tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LEVEL = tl.constexpr(2)
NAN = tl.constexpr(4)


class Rows(NamedTuple):
    """A matrix in memory, of one head of a tensor: [num_rows, WIDTH], read in tiles of BLOCK columns."""

    p_base: Any
    row_stride: Any
    num_rows: Any
    WIDTH: Any
    BLOCK: Any


class Scores(NamedTuple):
    """How products of queries and keys become scores; IS_EXACT asks for all digits of float32."""

    scale: Any
    softcap: Any
    HAS_SOFTCAP: Any
    IS_EXACT: Any


class Mask(NamedTuple):
    """The mask of one head: what it is, and where it lies if it has to be read."""

    p_base: Any
    row_stride: Any
    key_stride: Any
    lowest: Any
    num_queries: Any
    num_keys: Any
    CAUSAL: Any
    HAS_MASK: Any
    READS: Any
    IS_BOOL: Any


class Interval(NamedTuple):
    """The keys that queries see: first, one past the last, and what else a row needs."""

    b_start: Any
    b_end: Any
    b_kind: Any


@jit
def load_tile(rows, b_row):
    """Return [rows, BLOCK], zero beyond the last row and column."""
    b_column = tl.arange(0, rows.BLOCK)
    p_at = rows.p_base + b_row[:, None].to(tl.int64) * rows.row_stride + b_column[None, :]
    b_inside = b_row[:, None] < rows.num_rows
    if rows.WIDTH != rows.BLOCK:
        b_inside = b_inside & (b_column[None, :] < rows.WIDTH)
    return tl.load(p_at, mask=b_inside, other=0.0)


@jit
def store_tile(rows, b_value, b_row):
    """Write the first WIDTH columns of a tile, rounded to the dtype of the memory."""
    b_column = tl.arange(0, rows.BLOCK)
    p_at = rows.p_base + b_row[:, None].to(tl.int64) * rows.row_stride + b_column[None, :]
    b_inside = (b_row[:, None] < rows.num_rows) & (b_column[None, :] < rows.WIDTH)
    tl.store(p_at, b_value.to(rows.p_base.dtype.element_ty), mask=b_inside)


@jit
def _tanh(b_x):
    """Return tanh to two roundings relative to itself, however small it is (coefficients of Cephes' tanhf)."""
    b_square = b_x * b_x
    b_series = b_square * -5.70498872745e-3 + 2.06390887954e-2
    b_series = b_series * b_square - 5.37397155531e-2
    b_series = b_series * b_square + 1.33314422036e-1
    b_series = b_series * b_square - 3.33332819422e-1
    b_size = tl.abs(b_x)
    b_decay = tl.exp(-2.0 * b_size)
    b_far = 1.0 - 2.0 * b_decay / (1.0 + b_decay)
    return tl.where(b_size < 0.625, b_x + b_x * (b_square * b_series), tl.where(b_x < 0, -b_far, b_far))


@jit
def make_scores(b_product, scores):
    """Return the scores times log2(e) of products of queries and keys, and their derivative by scale * product."""
    if scores.HAS_SOFTCAP:
        if scores.IS_EXACT:
            b_tanh = _tanh(b_product * (scores.scale / scores.softcap))
        else:
            # Right to 2e-7 whatever its size: times a softcap of 50 that is far below the roundings of 16 bits.
            b_tanh = 2.0 * tl.sigmoid(b_product * (2.0 * scores.scale / scores.softcap)) - 1.0
        return b_tanh * (scores.softcap * LOG2_E), 1.0 - b_tanh * b_tanh
    else:  # noqa: RET505 (compiled apart: after a branch that returns nothing may follow)
        return b_product * (scores.scale * LOG2_E), 1.0


@jit
def load_interval(p_intervals, b_row, row_stride, kind_stride, mask):
    """Return the intervals of rows of queries, those beyond the last as the last; nothing of use without a mask."""
    if mask.HAS_MASK:
        p_at = p_intervals + tl.minimum(b_row, mask.num_queries - 1) * row_stride
        return Interval(tl.load(p_at), tl.load(p_at + kind_stride), tl.load(p_at + 2 * kind_stride))
    else:  # noqa: RET505 (as above)
        return Interval(b_row, b_row, b_row)


@jit
def as_column(interval):
    """Return intervals of queries that stand one below the other in a tile."""
    return Interval(interval.b_start[:, None], interval.b_end[:, None], interval.b_kind[:, None])


@jit
def as_row(interval):
    """Return intervals of queries that stand beside one another in a tile."""
    return Interval(interval.b_start[None, :], interval.b_end[None, :], interval.b_kind[None, :])


@jit
def hide(b_score, b_query, b_key, interval, mask):
    """Return the scores with the mask: all of a tile's indices come shaped so that they broadcast to it."""
    b_seen = b_key < mask.num_keys
    if mask.CAUSAL:
        b_seen = b_seen & (b_query >= b_key)
    if mask.HAS_MASK:
        b_seen = b_seen & (b_key >= interval.b_start) & (b_key < interval.b_end)
        b_is_level = (interval.b_kind & LEVEL) != 0
        b_is_nan = interval.b_kind == NAN
        b_score = tl.where(b_is_level, 0.0, tl.where(b_is_nan, float("nan"), b_score))
        if mask.READS:
            b_offset = b_query.to(tl.int64) * mask.row_stride + b_key.to(tl.int64) * mask.key_stride
            p_at = mask.p_base + b_offset
            b_inside = (b_query < mask.num_queries) & (b_key < mask.num_keys)
            if mask.IS_BOOL:
                b_value = tl.load(p_at, mask=b_inside, other=0)
                b_seen = b_seen & ((b_value != 0) | b_is_nan)
            else:
                b_value = tl.load(p_at, mask=b_inside, other=0.0).to(tl.float32)
                b_shut = b_value <= mask.lowest
                b_score += tl.where(b_shut, 0.0, b_value * LOG2_E)
                b_seen = b_seen & (b_is_nan | tl.where(b_is_level, b_value > float("-inf"), ~b_shut))
    return tl.where(b_seen, b_score, float("-inf"))


@jit
def find_spans(first_query, interval, mask, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Return where the keys of a tile of queries begin and end, and in between those that all rows see."""
    begin = first_query * 0
    end = begin + mask.num_keys
    whole_begin = begin
    whole_end = end // KEYS * KEYS
    if mask.CAUSAL:
        end = tl.minimum(end, first_query + QUERIES)
        whole_end = tl.minimum(whole_end, (first_query + 1) // KEYS * KEYS)
    if mask.HAS_MASK:
        b_first = tl.where(interval.b_end > interval.b_start, interval.b_start, mask.num_keys)
        begin = tl.min(b_first, 0) // KEYS * KEYS
        end = tl.max(interval.b_end, 0)
        if mask.READS:  # all keys of all tiles are in the last span
            whole_begin, whole_end = begin, begin
        else:
            whole_begin = (tl.max(interval.b_start, 0) + KEYS - 1) // KEYS * KEYS
            whole_end = tl.min(interval.b_end, 0) // KEYS * KEYS
            is_whole = (tl.max(interval.b_kind, 0) == 0) & (whole_end > whole_begin)
            whole_begin = tl.where(is_whole, whole_begin, begin)
            whole_end = tl.where(is_whole, whole_end, begin)
    return begin, whole_begin, whole_end, end


@jit
def pick_span(begin, whole_begin, whole_end, end, SPAN: tl.constexpr):
    """Return where span 0, 1 or 2 begins and ends: before the keys that all rows see, these, and after them."""
    if SPAN == 0:
        return begin, whole_begin
    elif SPAN == 1:  # noqa: RET505 (as above)
        return whole_begin, whole_end
    else:
        return whole_end, end
