"""The two kernels: a block of one row of the unit, or of its gradients."""

from fxopt.kernels.activations import act_backward, act_forward
from fxopt.kernels.launch import jit, tl


@jit
def load_pair(
    p_gate, p_up, num_left, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, GATE_FIRST: tl.constexpr
):
    """Return BLOCK values of gate and of up, in fp32."""
    if INTERLEAVED:
        b_both_at = tl.arange(0, 2 * BLOCK)
        b_both = tl.load(p_gate + b_both_at, mask=b_both_at < 2 * num_left, other=0.0).to(tl.float32)
        b_even, b_odd = tl.split(tl.reshape(b_both, (BLOCK, 2)))
        if GATE_FIRST:
            b_gate = b_even
            b_up = b_odd
        else:
            b_gate = b_odd
            b_up = b_even
    else:
        b_at = tl.arange(0, BLOCK)
        b_gate = tl.load(p_gate + b_at, mask=b_at < num_left, other=0.0).to(tl.float32)
        b_up = tl.load(p_up + b_at, mask=b_at < num_left, other=0.0).to(tl.float32)
    return b_gate, b_up


@jit
def enter_tile(
    b_gate,
    b_up,
    gate_scale,
    gate_limit,
    up_limit,
    up_offset,
    HAS_GATE_SCALE: tl.constexpr,
    HAS_UP_OFFSET: tl.constexpr,
    HAS_GATE_LIMIT: tl.constexpr,
    HAS_UP_LIMIT: tl.constexpr,
):
    """Return gate and up after their scale, limits and offset."""
    if HAS_GATE_SCALE:
        b_gate = b_gate * gate_scale
    if HAS_GATE_LIMIT:
        b_gate = tl.where(b_gate > gate_limit, gate_limit, b_gate)  # keeps a NaN
    if HAS_UP_LIMIT:
        b_up = tl.where(b_up > up_limit, up_limit, tl.where(b_up < -up_limit, -up_limit, b_up))
    if HAS_UP_OFFSET:
        b_up = b_up + up_offset
    return b_gate, b_up


@jit
def is_within(b_value, limit, PASSES_AT_LIMIT: tl.constexpr):
    """Return where a gradient passes a limit."""
    if PASSES_AT_LIMIT:
        b_within = b_value <= limit
    else:
        b_within = b_value < limit
    return b_within


@jit
def leave_tile(
    b_dy,
    b_gate,
    b_up,
    alpha,
    gate_scale,
    gate_limit,
    up_limit,
    up_offset,
    ACT: tl.constexpr,
    HAS_GATE_SCALE: tl.constexpr,
    HAS_UP_OFFSET: tl.constexpr,
    HAS_GATE_LIMIT: tl.constexpr,
    HAS_UP_LIMIT: tl.constexpr,
    PASSES_AT_LIMIT: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Return the unit before its scale, and the gradients of gate and up; `b_dy` is scaled."""
    b_entered, b_lifted = enter_tile(
        b_gate,
        b_up,
        gate_scale,
        gate_limit,
        up_limit,
        up_offset,
        HAS_GATE_SCALE,
        HAS_UP_OFFSET,
        HAS_GATE_LIMIT,
        HAS_UP_LIMIT,
    )
    b_act, b_dgate = act_backward(b_dy * b_lifted, b_entered, alpha, ACT, APPROXIMATE)
    if HAS_GATE_SCALE:
        b_dgate *= gate_scale
        b_gate = b_gate * gate_scale
    if HAS_GATE_LIMIT:
        b_dgate = tl.where(is_within(b_gate, gate_limit, PASSES_AT_LIMIT), b_dgate, 0.0)
    b_dup = b_dy * b_act
    if HAS_UP_LIMIT:
        b_dup = tl.where(is_within(tl.abs(b_up), up_limit, PASSES_AT_LIMIT), b_dup, 0.0)
    return b_act * b_lifted, b_dgate, b_dup


@jit(do_not_specialize=["blocks_per_row"])
def glu_forward_kernel(
    p_gate,
    p_up,
    p_y,
    gate_row_stride,
    up_row_stride,
    num_columns,
    blocks_per_row,
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
    BLOCK: tl.constexpr,
):
    """Write BLOCK values of one row of the unit; interleaved, `p_gate` holds both and `p_up` is not read."""
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    start = (program % blocks_per_row).to(tl.int64) * BLOCK
    num_left = num_columns - start
    p_gate += row * gate_row_stride + start
    p_up += row * up_row_stride + start
    if INTERLEAVED:
        p_gate += start  # two columns a value
    b_gate, b_up = load_pair(p_gate, p_up, num_left, BLOCK, INTERLEAVED, GATE_FIRST)
    b_gate, b_up = enter_tile(
        b_gate,
        b_up,
        gate_scale,
        gate_limit,
        up_limit,
        up_offset,
        HAS_GATE_SCALE,
        HAS_UP_OFFSET,
        HAS_GATE_LIMIT,
        HAS_UP_LIMIT,
    )
    b_act = act_forward(b_gate, alpha, ACT)
    b_at = tl.arange(0, BLOCK)
    b_y = (b_act * b_up * scale).to(p_y.dtype.element_ty)
    tl.store(p_y + (row * num_columns + start) + b_at, b_y, mask=b_at < num_left)


@jit(do_not_specialize=["blocks_per_row"])
def glu_backward_kernel(
    p_dy,
    p_gate,
    p_up,
    p_dgate,
    p_dup,
    p_y,
    dy_row_stride,
    gate_row_stride,
    up_row_stride,
    dgate_row_stride,
    dup_row_stride,
    num_columns,
    blocks_per_row,
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
    NEED_GATE: tl.constexpr,
    NEED_UP: tl.constexpr,
    PASSES_AT_LIMIT: tl.constexpr,
    NEED_Y: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write BLOCK values of one row of the gradients, and of the unit if NEED_Y; interleaved, `p_dgate` takes both."""
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    start = (program % blocks_per_row).to(tl.int64) * BLOCK
    num_left = num_columns - start
    b_at = tl.arange(0, BLOCK)
    b_mask = b_at < num_left
    p_gate += row * gate_row_stride + start
    p_up += row * up_row_stride + start
    p_dgate += row * dgate_row_stride + start
    p_dup += row * dup_row_stride + start
    if INTERLEAVED:
        p_gate += start  # two columns a value
        p_dgate += start
    b_dy = tl.load(p_dy + (row * dy_row_stride + start) + b_at, mask=b_mask, other=0.0).to(tl.float32) * scale
    b_gate, b_up = load_pair(p_gate, p_up, num_left, BLOCK, INTERLEAVED, GATE_FIRST)
    b_unit, b_dgate, b_dup = leave_tile(
        b_dy,
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
    if NEED_Y:
        b_y = (b_unit * scale).to(p_y.dtype.element_ty)
        tl.store(p_y + (row * num_columns + start) + b_at, b_y, mask=b_mask)
    if INTERLEAVED:
        if GATE_FIRST:
            b_pair = tl.join(b_dgate, b_dup)
        else:
            b_pair = tl.join(b_dup, b_dgate)
        b_both = tl.reshape(b_pair, (2 * BLOCK,)).to(p_dgate.dtype.element_ty)
        b_both_at = tl.arange(0, 2 * BLOCK)
        tl.store(p_dgate + b_both_at, b_both, mask=b_both_at < 2 * num_left)
    else:
        if NEED_GATE:
            tl.store(p_dgate + b_at, b_dgate.to(p_dgate.dtype.element_ty), mask=b_mask)
        if NEED_UP:
            tl.store(p_dup + b_at, b_dup.to(p_dup.dtype.element_ty), mask=b_mask)
