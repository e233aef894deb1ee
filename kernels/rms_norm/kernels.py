"""The Triton kernels: a forward, a backward that walks the rows, and the sum of its programs' parts."""

from fxopt.kernels.launch import jit, tl


@jit
def _act_and_slope(b_gate, GATE: tl.constexpr):
    b_sigmoid = tl.sigmoid(b_gate)
    if GATE == "silu":
        b_act = b_gate * b_sigmoid
        b_slope = b_sigmoid + b_act * (1 - b_sigmoid)
    else:
        b_act = b_sigmoid
        b_slope = b_sigmoid * (1 - b_sigmoid)
    return b_act, b_slope


@jit
def _load_input(p_x, p_gate, b_mask, GATE: tl.constexpr, GATE_BEFORE: tl.constexpr):
    b_x = tl.load(p_x, mask=b_mask, other=0.0).to(tl.float32)
    if GATE != "" and GATE_BEFORE:
        b_act, _ = _act_and_slope(tl.load(p_gate, mask=b_mask, other=0.0).to(tl.float32), GATE)
        b_x *= b_act
    return b_x


@jit
def _finish(
    b_n,
    p_weight,
    p_gate,
    p_y,
    b_columns,
    b_mask,
    offset,
    x_type: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    GATE_BEFORE: tl.constexpr,
    CAST_FIRST: tl.constexpr,
):
    if CAST_FIRST:
        b_n = b_n.to(x_type).to(tl.float32)
    if HAS_WEIGHT:
        b_weight = tl.load(p_weight + b_columns, mask=b_columns < WIDTH, other=0.0).to(tl.float32)
        b_n *= b_weight + offset
    if GATE != "" and not GATE_BEFORE:
        b_act, _ = _act_and_slope(tl.load(p_gate, mask=b_mask, other=0.0).to(tl.float32), GATE)
        b_n *= b_act
    tl.store(p_y, b_n.to(p_y.dtype.element_ty), mask=b_mask)


@jit
def rms_norm_forward_kernel(
    p_x,
    p_weight,
    p_gate,
    p_y,
    p_statistics,
    x_row_stride,
    gate_row_stride,
    num_rows,
    eps,
    offset,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    GATE_BEFORE: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    CENTRE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write y and the statistics of BLOCK_ROWS rows of one group of columns."""
    group = tl.program_id(1)
    b_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    b_is_row = b_row < num_rows
    b_rows = b_row[:, None]
    b_column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    p_x += b_rows * x_row_stride + group * WIDTH
    p_gate += b_rows * gate_row_stride + group * WIDTH
    p_y += b_rows * (WIDTH * GROUPS) + group * WIDTH
    p_weight += group * WIDTH
    p_rstd = p_statistics + b_row * GROUPS + group
    p_mean = p_statistics + (b_row + num_rows) * GROUPS + group
    x_type: tl.constexpr = p_x.dtype.element_ty

    if WIDTH <= BLOCK_COLUMNS:
        b_mask = b_is_row[:, None] & (b_column < WIDTH)
        b_x = _load_input(p_x + b_column, p_gate + b_column, b_mask, GATE, GATE_BEFORE)
        if CENTRE:
            b_mean = tl.sum(b_x, 1) / WIDTH
            tl.store(p_mean, b_mean, mask=b_is_row)
            b_x = tl.where(b_mask, b_x - b_mean[:, None], 0.0)
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / WIDTH + eps)
        b_n = b_x * b_rstd[:, None]
        _finish(
            b_n, p_weight, p_gate + b_column, p_y + b_column, b_column, b_mask, offset,
            x_type, WIDTH, HAS_WEIGHT, GATE, GATE_BEFORE, CAST_FIRST,
        )  # fmt: skip
    else:
        b_mean = tl.zeros([BLOCK_ROWS], tl.float32)
        if CENTRE:
            b_total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            for start in range(0, WIDTH, BLOCK_COLUMNS):
                b_columns = start + b_column
                b_mask = b_is_row[:, None] & (b_columns < WIDTH)
                b_total += _load_input(p_x + b_columns, p_gate + b_columns, b_mask, GATE, GATE_BEFORE)
            b_mean = tl.sum(b_total, 1) / WIDTH
            tl.store(p_mean, b_mean, mask=b_is_row)
        b_total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            b_columns = start + b_column
            b_mask = b_is_row[:, None] & (b_columns < WIDTH)
            b_x = _load_input(p_x + b_columns, p_gate + b_columns, b_mask, GATE, GATE_BEFORE)
            b_x = tl.where(b_mask, b_x - b_mean[:, None], 0.0)
            b_total += b_x * b_x
        b_rstd = tl.rsqrt(tl.sum(b_total, 1) / WIDTH + eps)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            b_columns = start + b_column
            b_mask = b_is_row[:, None] & (b_columns < WIDTH)
            b_x = _load_input(p_x + b_columns, p_gate + b_columns, b_mask, GATE, GATE_BEFORE)
            b_n = (b_x - b_mean[:, None]) * b_rstd[:, None]
            _finish(
                b_n, p_weight, p_gate + b_columns, p_y + b_columns, b_columns, b_mask, offset,
                x_type, WIDTH, HAS_WEIGHT, GATE, GATE_BEFORE, CAST_FIRST,
            )  # fmt: skip
    tl.store(p_rstd, b_rstd, mask=b_is_row)


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
        b_act, b_slope = _act_and_slope(b_gate, GATE)
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
    p_dx,
    b_weight,
    p_dgate,
    b_columns,
    b_mask,
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
    NEED_X: tl.constexpr,
    NEED_GATE: tl.constexpr,
):
    if NEED_X or (NEED_GATE and GATE_BEFORE):
        b_dx = b_dn - b_n * b_inner[:, None]
        if CENTRE:
            b_dx -= b_dn_mean[:, None]
        b_dx *= b_rstd[:, None]
        if GATE_BEFORE:
            if NEED_GATE:
                b_dgate = b_dx * b_x * b_slope
                tl.store(p_dgate + b_columns, b_dgate.to(p_dgate.dtype.element_ty), mask=b_mask)
            b_dx *= b_act
        if NEED_X:
            tl.store(p_dx + b_columns, b_dx.to(p_dx.dtype.element_ty), mask=b_mask)
    if NEED_GATE and not GATE_BEFORE:
        b_dgate = b_dy * b_n * b_slope
        if HAS_WEIGHT:
            b_dgate *= b_weight.to(tl.float32) + offset
        tl.store(p_dgate + b_columns, b_dgate.to(p_dgate.dtype.element_ty), mask=b_mask)


@jit
def rms_norm_backward_kernel(
    p_dy,
    p_x,
    p_weight,
    p_gate,
    p_statistics,
    p_dx,
    p_partial,
    p_dgate,
    dy_row_stride,
    x_row_stride,
    gate_row_stride,
    num_rows,
    offset,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    GATE_BEFORE: tl.constexpr,
    CENTRE: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_GATE: tl.constexpr,
    KEEP_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the gradients of every n-th block of rows, and the program's part of the gradient of weight."""
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
        p_row_dx = p_dx + (b_rows * (WIDTH * GROUPS) + group * WIDTH)
        p_row_dgate = p_dgate + (b_rows * (WIDTH * GROUPS) + group * WIDTH)
        p_rstd = p_statistics + b_row * GROUPS + group
        b_rstd = tl.load(p_rstd, mask=b_is_row, other=0.0)
        b_mean = b_rstd
        if CENTRE:
            b_mean = tl.load(p_statistics + (b_row + num_rows) * GROUPS + group, mask=b_is_row, other=0.0)

        if WIDTH <= BLOCK_COLUMNS:
            b_mask = b_is_row[:, None] & (b_column < WIDTH)
            if HAS_WEIGHT and not KEEP_WEIGHT:
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
                p_row_dx, b_weight, p_row_dgate, b_column, b_mask, offset,
                b_dy, b_x, b_n, b_dn, b_act, b_slope, b_rstd, b_inner, b_dn_mean,
                HAS_WEIGHT, GATE, GATE_BEFORE, CENTRE, NEED_X, NEED_GATE,
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
                    p_row_dx, b_weight, p_row_dgate, b_columns, b_mask, offset,
                    b_dy, b_x, b_n, b_dn, b_act, b_slope, b_rstd, b_inner, b_dn_mean,
                    HAS_WEIGHT, GATE, GATE_BEFORE, CENTRE, NEED_X, NEED_GATE,
                )  # fmt: skip
    if NEED_WEIGHT and WIDTH <= BLOCK_COLUMNS:
        tl.store(p_partial + b_column, tl.sum(b_dweight, 0)[None, :], mask=b_column < WIDTH)


@jit
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
