"""What is done row by row: the sum over a token's choices, and the gradients of the unit and of its weight."""

from fxopt.kernels.glu.kernels import leave_tile, load_pair
from fxopt.kernels.launch import jit, tl


@jit(do_not_specialize=["num_choices"])
def experts_sum_kernel(
    p_values,
    p_weights,
    p_bias,
    p_y,
    p_places,
    p_ends,
    num_experts,
    num_columns,
    num_choices,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write some columns of one token's sum of the rows of its choices, in their order.

    A choice without an expert has no row that was computed: its place lies after the last end.
    """
    token = tl.program_id(0)
    b_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_is_column = b_column < num_columns
    num_computed = tl.load(p_ends + num_experts - 1)
    if HAS_BIAS:
        b_expert = tl.arange(0, BLOCK_EXPERTS)
        b_ends = tl.load(p_ends + b_expert, mask=b_expert < num_experts, other=num_computed)
    b_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for number in range(num_choices):
        choice = token.to(tl.int64) * num_choices + number
        place = tl.load(p_places + choice)
        is_computed = place < num_computed
        b_mask = b_is_column & is_computed
        b_value = tl.load(p_values + place.to(tl.int64) * num_columns + b_column, mask=b_mask, other=0.0)
        b_value = b_value.to(tl.float32)
        if HAS_BIAS:
            expert = tl.sum(tl.where(b_ends <= place, 1, 0), 0).to(tl.int64)
            b_value += tl.load(p_bias + expert * num_columns + b_column, mask=b_mask, other=0.0).to(
                tl.float32
            )
        if HAS_WEIGHTS:
            b_value *= tl.load(p_weights + choice, mask=is_computed, other=0.0).to(tl.float32)
        b_sum += b_value
    tl.store(
        p_y + token.to(tl.int64) * num_columns + b_column, b_sum.to(p_y.dtype.element_ty), mask=b_is_column
    )


@jit
def experts_unit_backward_kernel(
    p_dunit,
    p_a,
    p_weights,
    p_da,
    p_unit,
    p_dweights,
    p_rows,
    p_ends,
    num_experts,
    num_columns,
    alpha,
    gate_scale,
    gate_limit,
    up_limit,
    up_offset,
    scale,
    ACT: tl.constexpr,
    HAS_GATE_SCALE: tl.constexpr,
    HAS_UP_OFFSET: tl.constexpr,
    HAS_GATE_LIMIT: tl.constexpr,
    HAS_UP_LIMIT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    PASSES_AT_LIMIT: tl.constexpr,
    NEED_A: tl.constexpr,
    NEED_UNIT: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row of the gradient of a and of weight * unit, and the gradient of the row's weight.

    `p_dunit` holds the gradient of the unit before the weight. Rows after the last end become zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    is_row = row < tl.load(p_ends + num_experts - 1)
    choice = tl.load(p_rows + row)
    weight = tl.load(p_weights + choice).to(tl.float32)
    b_at = tl.arange(0, BLOCK)
    b_total = tl.zeros((BLOCK,), dtype=tl.float32)
    p_row = p_a + row * (2 * num_columns)
    p_drow = p_da + row * (2 * num_columns)
    for start in range(0, num_columns, BLOCK):
        num_left = tl.where(is_row, num_columns - start, 0)
        b_mask = b_at < num_columns - start
        if INTERLEAVED:
            b_gate, b_up = load_pair(p_row + 2 * start, p_row, num_left, BLOCK, True, GATE_FIRST)
        else:
            if GATE_FIRST:
                b_gate, b_up = load_pair(
                    p_row + start, p_row + num_columns + start, num_left, BLOCK, False, True
                )
            else:
                b_gate, b_up = load_pair(
                    p_row + num_columns + start, p_row + start, num_left, BLOCK, False, True
                )
        b_dunit = tl.load(p_dunit + row * num_columns + start + b_at, mask=b_at < num_left, other=0.0)
        b_dunit = b_dunit.to(tl.float32) * scale
        b_unit, b_dgate, b_dup = leave_tile(
            b_dunit * weight,
            b_gate,
            b_up,
            alpha,
            gate_scale,
            gate_limit,
            up_limit,
            up_offset,
            ACT,
            HAS_GATE_SCALE,
            HAS_UP_OFFSET,
            HAS_GATE_LIMIT,
            HAS_UP_LIMIT,
            PASSES_AT_LIMIT,
            APPROXIMATE=False,
        )
        if NEED_WEIGHTS:
            b_total += tl.where(b_at < num_left, b_dunit * b_unit, 0.0)
        if NEED_UNIT:
            b_weighted = tl.where(b_at < num_left, b_unit * (scale * weight), 0.0)
            tl.store(
                p_unit + row * num_columns + start + b_at, b_weighted.to(p_unit.dtype.element_ty), mask=b_mask
            )
        if NEED_A:
            b_dgate = tl.where(b_at < num_left, b_dgate, 0.0)
            b_dup = tl.where(b_at < num_left, b_dup, 0.0)
            if GATE_FIRST:
                b_first = b_dgate
                b_second = b_dup
            else:
                b_first = b_dup
                b_second = b_dgate
            if INTERLEAVED:
                b_both = tl.reshape(tl.join(b_first, b_second), (2 * BLOCK,)).to(p_da.dtype.element_ty)
                b_both_at = tl.arange(0, 2 * BLOCK)
                tl.store(p_drow + 2 * start + b_both_at, b_both, mask=b_both_at < 2 * (num_columns - start))
            else:
                tl.store(p_drow + start + b_at, b_first.to(p_da.dtype.element_ty), mask=b_mask)
                tl.store(p_drow + num_columns + start + b_at, b_second.to(p_da.dtype.element_ty), mask=b_mask)
    if NEED_WEIGHTS:
        tl.store(p_dweights + choice, tl.sum(b_total, axis=0).to(p_dweights.dtype.element_ty))
