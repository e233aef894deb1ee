"""The backward kernel, which walks the rows, and the sum of its programs' parts of the gradient of weight."""

from fxopt.kernels.launch import jit, tl
from fxopt.kernels.rms_norm.forward_kernel import act_and_slope


@jit
def _load_backward(
    p_dy,
    p_x,
    b_weight,
    p_gate,
    b_columns,
    b_mask,
    b_rstd,
    b_mean,
    offset,
    HAS_WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    GATE_BEFORE: tl.constexpr,
    CENTRE: tl.constexpr,
):
    """Return dy, x, n, the gradient of n, the gradient of n * (offset + weight), act(gate) and its slope."""
    b_dy = tl.load(p_dy + b_columns, mask=b_mask, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + b_columns, mask=b_mask, other=0.0).to(tl.float32)
    b_act = b_x
    b_slope = b_x
    b_dscaled = b_dy
    b_n = b_x
    if GATE != "":
        b_gate = tl.load(p_gate + b_columns, mask=b_mask, other=0.0).to(tl.float32)
        b_act, b_slope = act_and_slope(b_gate, GATE)
        if GATE_BEFORE:
            b_n = b_x * b_act
        else:
            b_dscaled = b_dy * b_act
    if CENTRE:
        b_n = tl.where(b_mask, b_n - b_mean[:, None], 0.0)
    b_n *= b_rstd[:, None]
    b_dn = b_dscaled
    if HAS_WEIGHT:
        b_dn = b_dscaled * (b_weight.to(tl.float32) + offset)
    return b_dy, b_x, b_n, b_dn, b_dscaled, b_act, b_slope


@jit
def _store_backward(
    p_dh,
    p_dx,
    p_dskip,
    b_weight,
    p_dgate,
    b_columns,
    b_mask,
    scale,
    offset,
    b_dy,
    b_x,
    b_n,
    b_dn,
    b_act,
    b_slope,
    b_rstd,
    b_inner,
    b_dn_mean,
    HAS_WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    GATE_BEFORE: tl.constexpr,
    CENTRE: tl.constexpr,
    HAS_DH: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_SKIP: tl.constexpr,
    NEED_GATE: tl.constexpr,
):
    if NEED_X or NEED_SKIP or (NEED_GATE and GATE_BEFORE):
        b_dx = b_dn - b_n * b_inner[:, None]
        if CENTRE:
            b_dx -= b_dn_mean[:, None]
        b_dx *= b_rstd[:, None]
        if GATE_BEFORE:
            if NEED_GATE:
                b_dgate = b_dx * b_x * b_slope
                tl.store(p_dgate + b_columns, b_dgate.to(p_dgate.dtype.element_ty), mask=b_mask)
            b_dx *= b_act
        if HAS_DH:
            b_dx += tl.load(p_dh + b_columns, mask=b_mask, other=0.0).to(tl.float32)
        if NEED_SKIP:
            tl.store(p_dskip + b_columns, b_dx.to(p_dskip.dtype.element_ty), mask=b_mask)
        if NEED_X:
            tl.store(p_dx + b_columns, (b_dx * scale).to(p_dx.dtype.element_ty), mask=b_mask)
    if NEED_GATE and not GATE_BEFORE:
        b_dgate = b_dy * b_n * b_slope
        if HAS_WEIGHT:
            b_dgate *= b_weight.to(tl.float32) + offset
        tl.store(p_dgate + b_columns, b_dgate.to(p_dgate.dtype.element_ty), mask=b_mask)


@jit(do_not_specialize=["num_rows"])
def rms_norm_backward_kernel(
    p_dy,
    p_x,
    p_weight,
    p_gate,
    p_statistics,
    p_dh,
    p_dx,
    p_dskip,
    p_partial,
    p_dgate,
    dy_row_stride,
    x_row_stride,
    gate_row_stride,
    dh_row_stride,
    num_rows,
    scale,
    offset,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    GATE_BEFORE: tl.constexpr,
    CENTRE: tl.constexpr,
    HAS_DH: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_SKIP: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_GATE: tl.constexpr,
    KEEP_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the gradients of every n-th block of rows, and the program's part of the gradient of weight.

    dh is what else flows into the normalized value; the sum with it goes to dskip, and times scale to dx.
    """
    group = tl.program_id(1)
    b_column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    p_weight += group * WIDTH
    p_partial += (tl.program_id(0).to(tl.int64) * GROUPS + group) * WIDTH
    num_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    b_dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    b_weight = b_column
    if HAS_WEIGHT:
        b_weight = tl.load(p_weight + b_column, mask=b_column < WIDTH, other=0.0)

    for block in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0), num_stages=STAGES):
        b_row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        b_is_row = b_row < num_rows
        b_rows = b_row[:, None]
        p_row_dy = p_dy + (b_rows * dy_row_stride + group * WIDTH)
        p_row_x = p_x + (b_rows * x_row_stride + group * WIDTH)
        p_row_gate = p_gate + (b_rows * gate_row_stride + group * WIDTH)
        p_row_dh = p_dh + (b_rows * dh_row_stride + group * WIDTH)
        p_row_dx = p_dx + (b_rows * (WIDTH * GROUPS) + group * WIDTH)
        p_row_dskip = p_dskip + (b_rows * (WIDTH * GROUPS) + group * WIDTH)
        p_row_dgate = p_dgate + (b_rows * (WIDTH * GROUPS) + group * WIDTH)
        p_rstd = p_statistics + b_row * GROUPS + group
        b_rstd = tl.load(p_rstd, mask=b_is_row, other=0.0)
        b_mean = b_rstd
        if CENTRE:
            b_mean = tl.load(p_statistics + (b_row + num_rows) * GROUPS + group, mask=b_is_row, other=0.0)

        if WIDTH <= BLOCK_COLUMNS:
            b_mask = b_is_row[:, None] & (b_column < WIDTH)
            if HAS_WEIGHT and not KEEP_WEIGHT:
                if HAS_DH and STAGES > 1:
                    # Three inputs fill the shared memory. Triton gives no buffer to what it loads under a condition.
                    if block >= 0:
                        b_weight = tl.load(p_weight + b_column, mask=b_column < WIDTH, other=0.0)
                    else:
                        b_weight = tl.zeros([1, BLOCK_COLUMNS], p_weight.dtype.element_ty)
                else:
                    b_weight = tl.load(p_weight + b_column, mask=b_column < WIDTH, other=0.0)
            b_dy, b_x, b_n, b_dn, b_dscaled, b_act, b_slope = _load_backward(
                p_row_dy, p_row_x, b_weight, p_row_gate, b_column, b_mask, b_rstd, b_mean, offset,
                HAS_WEIGHT, GATE, GATE_BEFORE, CENTRE,
            )  # fmt: skip
            if NEED_WEIGHT:
                b_dweight += b_dscaled * b_n
            b_inner = tl.sum(b_dn * b_n, 1) / WIDTH
            b_dn_mean = b_inner
            if CENTRE:
                b_dn_mean = tl.sum(b_dn, 1) / WIDTH
            _store_backward(
                p_row_dh, p_row_dx, p_row_dskip, b_weight, p_row_dgate, b_column, b_mask, scale, offset,
                b_dy, b_x, b_n, b_dn, b_act, b_slope, b_rstd, b_inner, b_dn_mean,
                HAS_WEIGHT, GATE, GATE_BEFORE, CENTRE, HAS_DH, NEED_X, NEED_SKIP, NEED_GATE,
            )  # fmt: skip
        else:
            b_products = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            b_total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            for start in range(0, WIDTH, BLOCK_COLUMNS):
                b_columns = start + b_column
                b_mask = b_is_row[:, None] & (b_columns < WIDTH)
                if HAS_WEIGHT:
                    b_weight = tl.load(p_weight + b_columns, mask=b_columns < WIDTH, other=0.0)
                b_dy, b_x, b_n, b_dn, b_dscaled, b_act, b_slope = _load_backward(
                    p_row_dy, p_row_x, b_weight, p_row_gate, b_columns, b_mask, b_rstd, b_mean, offset,
                    HAS_WEIGHT, GATE, GATE_BEFORE, CENTRE,
                )  # fmt: skip
                b_products += b_dn * b_n
                if CENTRE:
                    b_total += b_dn
            b_inner = tl.sum(b_products, 1) / WIDTH
            b_dn_mean = tl.sum(b_total, 1) / WIDTH
            # A program alone owns its row of partial sums; a barrier lets threads read what others wrote.
            tl.debug_barrier()
            for start in range(0, WIDTH, BLOCK_COLUMNS):
                b_columns = start + b_column
                b_mask = b_is_row[:, None] & (b_columns < WIDTH)
                if HAS_WEIGHT:
                    b_weight = tl.load(p_weight + b_columns, mask=b_columns < WIDTH, other=0.0)
                b_dy, b_x, b_n, b_dn, b_dscaled, b_act, b_slope = _load_backward(
                    p_row_dy, p_row_x, b_weight, p_row_gate, b_columns, b_mask, b_rstd, b_mean, offset,
                    HAS_WEIGHT, GATE, GATE_BEFORE, CENTRE,
                )  # fmt: skip
                if NEED_WEIGHT:
                    b_sum = tl.sum(b_dscaled * b_n, 0)[None, :]
                    b_is_later = (b_columns < WIDTH) & (block != tl.program_id(0))
                    b_sum += tl.load(p_partial + b_columns, mask=b_is_later, other=0.0)
                    tl.store(p_partial + b_columns, b_sum, mask=b_columns < WIDTH)
                _store_backward(
                    p_row_dh, p_row_dx, p_row_dskip, b_weight, p_row_dgate, b_columns, b_mask, scale, offset,
                    b_dy, b_x, b_n, b_dn, b_act, b_slope, b_rstd, b_inner, b_dn_mean,
                    HAS_WEIGHT, GATE, GATE_BEFORE, CENTRE, HAS_DH, NEED_X, NEED_SKIP, NEED_GATE,
                )  # fmt: skip
    if NEED_WEIGHT and WIDTH <= BLOCK_COLUMNS:
        tl.store(p_partial + b_column, tl.sum(b_dweight, 0)[None, :], mask=b_column < WIDTH)


@jit(do_not_specialize=["num_partials"])
def rms_norm_sum_kernel(
    p_partial, p_dweight, num_partials, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Sum the programs' parts of the gradient of weight in a fixed order, and round once."""
    b_columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    b_rows = tl.arange(0, BLOCK_ROWS)[:, None]
    b_total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, num_partials, BLOCK_ROWS):
        b_mask = (start + b_rows < num_partials) & (b_columns < num_columns)
        b_total += tl.load(p_partial + (start + b_rows) * num_columns + b_columns, mask=b_mask, other=0.0)
    b_sum = tl.sum(b_total, 0)[None, :].to(p_dweight.dtype.element_ty)
    tl.store(p_dweight + b_columns, b_sum, mask=b_columns < num_columns)
