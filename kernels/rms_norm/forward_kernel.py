"""The forward kernel: one program per few rows, each held in registers or walked in tiles."""

from fxopt.kernels.launch import jit, tl


@jit
def act_and_slope(b_gate, GATE: tl.constexpr):
    """Return act(gate) and its derivative."""
    b_sigmoid = tl.sigmoid(b_gate)
    if GATE == "silu":
        b_act = b_gate * b_sigmoid
        b_slope = b_sigmoid + b_act * (1 - b_sigmoid)
    else:
        b_act = b_sigmoid
        b_slope = b_sigmoid * (1 - b_sigmoid)
    return b_act, b_slope


@jit
def _load_input(
    p_x,
    p_skip,
    p_gate,
    b_mask,
    scale,
    h_type: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    GATE: tl.constexpr,
    GATE_BEFORE: tl.constexpr,
):
    b_x = tl.load(p_x, mask=b_mask, other=0.0).to(tl.float32)
    if HAS_SKIP:
        b_x = b_x * scale + tl.load(p_skip, mask=b_mask, other=0.0).to(tl.float32)
        b_x = b_x.to(h_type).to(tl.float32)
    if GATE != "" and GATE_BEFORE:
        b_act, _ = act_and_slope(tl.load(p_gate, mask=b_mask, other=0.0).to(tl.float32), GATE)
        b_x *= b_act
    return b_x


@jit
def _load_weight(p_weight, b_columns, WIDTH: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    if HAS_WEIGHT:
        b_weight = tl.load(p_weight + b_columns, mask=b_columns < WIDTH, other=0.0)
    else:
        b_weight = 0.0
    return b_weight


@jit
def _finish(
    b_n,
    b_weight,
    p_gate,
    p_y,
    b_mask,
    offset,
    h_type: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    GATE_BEFORE: tl.constexpr,
    CAST_FIRST: tl.constexpr,
):
    if CAST_FIRST:
        b_n = b_n.to(h_type).to(tl.float32)
    if HAS_WEIGHT:
        b_n *= b_weight.to(tl.float32) + offset
    if GATE != "" and not GATE_BEFORE:
        b_act, _ = act_and_slope(tl.load(p_gate, mask=b_mask, other=0.0).to(tl.float32), GATE)
        b_n *= b_act
    tl.store(p_y, b_n.to(p_y.dtype.element_ty), mask=b_mask)


@jit(do_not_specialize=["num_rows"])
def rms_norm_forward_kernel(
    p_x,
    p_skip,
    p_weight,
    p_gate,
    p_h,
    p_y,
    p_statistics,
    x_row_stride,
    skip_row_stride,
    gate_row_stride,
    num_rows,
    scale,
    eps,
    offset,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    GATE_BEFORE: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    CENTRE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Write y and the statistics of BLOCK_ROWS rows of one group; with a skip, h = x * scale + skip as well.

    EARLY: the weight is on its way while the sums are made. Of longer rows it would take the registers that a second
    program beside the first needs.
    """
    group = tl.program_id(1)
    b_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    b_is_row = b_row < num_rows
    b_rows = b_row[:, None]
    b_column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    p_x += b_rows * x_row_stride + group * WIDTH
    p_skip += b_rows * skip_row_stride + group * WIDTH
    p_gate += b_rows * gate_row_stride + group * WIDTH
    p_h += b_rows * (WIDTH * GROUPS) + group * WIDTH
    p_y += b_rows * (WIDTH * GROUPS) + group * WIDTH
    p_weight += group * WIDTH
    p_rstd = p_statistics + b_row * GROUPS + group
    p_mean = p_statistics + (b_row + num_rows) * GROUPS + group
    h_type: tl.constexpr = p_h.dtype.element_ty

    if WIDTH <= BLOCK_COLUMNS:
        b_mask = b_is_row[:, None] & (b_column < WIDTH)
        b_x = _load_input(
            p_x + b_column, p_skip + b_column, p_gate + b_column, b_mask, scale,
            h_type, HAS_SKIP, GATE, GATE_BEFORE,
        )  # fmt: skip
        if EARLY:
            b_weight = _load_weight(p_weight, b_column, WIDTH, HAS_WEIGHT)
        if HAS_SKIP:
            tl.store(p_h + b_column, b_x.to(h_type), mask=b_mask)
        if CENTRE:
            b_mean = tl.sum(b_x, 1) / WIDTH
            tl.store(p_mean, b_mean, mask=b_is_row)
            b_x = tl.where(b_mask, b_x - b_mean[:, None], 0.0)
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / WIDTH + eps)
        b_n = b_x * b_rstd[:, None]
        if not EARLY:
            b_weight = _load_weight(p_weight, b_column, WIDTH, HAS_WEIGHT)
        _finish(
            b_n, b_weight, p_gate + b_column, p_y + b_column, b_mask, offset,
            h_type, HAS_WEIGHT, GATE, GATE_BEFORE, CAST_FIRST,
        )  # fmt: skip
    else:
        b_mean = tl.zeros([BLOCK_ROWS], tl.float32)
        if CENTRE:
            b_total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            for start in range(0, WIDTH, BLOCK_COLUMNS):
                b_columns = start + b_column
                b_mask = b_is_row[:, None] & (b_columns < WIDTH)
                b_total += _load_input(
                    p_x + b_columns, p_skip + b_columns, p_gate + b_columns, b_mask, scale,
                    h_type, HAS_SKIP, GATE, GATE_BEFORE,
                )  # fmt: skip
            b_mean = tl.sum(b_total, 1) / WIDTH
            tl.store(p_mean, b_mean, mask=b_is_row)
        b_total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            b_columns = start + b_column
            b_mask = b_is_row[:, None] & (b_columns < WIDTH)
            b_x = _load_input(
                p_x + b_columns, p_skip + b_columns, p_gate + b_columns, b_mask, scale,
                h_type, HAS_SKIP, GATE, GATE_BEFORE,
            )  # fmt: skip
            b_x = tl.where(b_mask, b_x - b_mean[:, None], 0.0)
            b_total += b_x * b_x
        b_rstd = tl.rsqrt(tl.sum(b_total, 1) / WIDTH + eps)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            b_columns = start + b_column
            b_mask = b_is_row[:, None] & (b_columns < WIDTH)
            b_x = _load_input(
                p_x + b_columns, p_skip + b_columns, p_gate + b_columns, b_mask, scale,
                h_type, HAS_SKIP, GATE, GATE_BEFORE,
            )  # fmt: skip
            if HAS_SKIP:
                tl.store(p_h + b_columns, b_x.to(h_type), mask=b_mask)
            b_n = (b_x - b_mean[:, None]) * b_rstd[:, None]
            b_weight = _load_weight(p_weight, b_columns, WIDTH, HAS_WEIGHT)
            _finish(
                b_n, b_weight, p_gate + b_columns, p_y + b_columns, b_mask, offset,
                h_type, HAS_WEIGHT, GATE, GATE_BEFORE, CAST_FIRST,
            )  # fmt: skip
    tl.store(p_rstd, b_rstd, mask=b_is_row)
