"""The Triton kernels: a forward, a backward that walks the rows, and the sum of its programs' parts."""

from fxopt.kernels.launch import jit, tl


@jit
def _load_columns(p_values, b_columns, WIDTH: tl.constexpr, HAS_VALUES: tl.constexpr):
    if HAS_VALUES:
        b_values = tl.load(p_values + b_columns, mask=b_columns < WIDTH, other=0.0)
    else:
        b_values = 0.0
    return b_values


@jit
def _finish(
    b_n,
    b_weight,
    b_bias,
    p_y,
    b_columns,
    b_mask,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    if HAS_WEIGHT:
        b_n *= b_weight.to(tl.float32)
    if HAS_BIAS:
        b_n += b_bias.to(tl.float32)
    tl.store(p_y + b_columns, b_n.to(p_y.dtype.element_ty), mask=b_mask)


@jit(do_not_specialize=["num_rows"])
def layer_norm_forward_kernel(
    p_x,
    p_weight,
    p_bias,
    p_y,
    p_statistics,
    x_row_stride,
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Write y and the statistics of BLOCK_ROWS rows; EARLY: weight and bias are on their way while the sums are made.

    Of longer rows they would take the registers that a second program beside the first needs.
    """
    b_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    b_is_row = b_row < num_rows
    b_column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    p_x += b_row[:, None] * x_row_stride
    p_y += b_row[:, None] * WIDTH

    if WIDTH <= BLOCK_COLUMNS:
        b_mask = b_is_row[:, None] & (b_column < WIDTH)
        b_x = tl.load(p_x + b_column, mask=b_mask, other=0.0).to(tl.float32)
        if EARLY:
            b_weight = _load_columns(p_weight, b_column, WIDTH, HAS_WEIGHT)
            b_bias = _load_columns(p_bias, b_column, WIDTH, HAS_BIAS)
        b_mean = tl.sum(b_x, 1) / WIDTH
        b_x = tl.where(b_mask, b_x - b_mean[:, None], 0.0)
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / WIDTH + eps)
        b_n = b_x * b_rstd[:, None]
        if not EARLY:
            b_weight = _load_columns(p_weight, b_column, WIDTH, HAS_WEIGHT)
            b_bias = _load_columns(p_bias, b_column, WIDTH, HAS_BIAS)
        _finish(b_n, b_weight, b_bias, p_y, b_column, b_mask, HAS_WEIGHT, HAS_BIAS)
    else:
        b_total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            b_columns = start + b_column
            b_mask = b_is_row[:, None] & (b_columns < WIDTH)
            b_total += tl.load(p_x + b_columns, mask=b_mask, other=0.0).to(tl.float32)
        b_mean = tl.sum(b_total, 1) / WIDTH
        b_total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            b_columns = start + b_column
            b_mask = b_is_row[:, None] & (b_columns < WIDTH)
            b_x = tl.load(p_x + b_columns, mask=b_mask, other=0.0).to(tl.float32)
            b_x = tl.where(b_mask, b_x - b_mean[:, None], 0.0)
            b_total += b_x * b_x
        b_rstd = tl.rsqrt(tl.sum(b_total, 1) / WIDTH + eps)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            b_columns = start + b_column
            b_mask = b_is_row[:, None] & (b_columns < WIDTH)
            b_x = tl.load(p_x + b_columns, mask=b_mask, other=0.0).to(tl.float32)
            b_n = (b_x - b_mean[:, None]) * b_rstd[:, None]
            b_weight = _load_columns(p_weight, b_columns, WIDTH, HAS_WEIGHT)
            b_bias = _load_columns(p_bias, b_columns, WIDTH, HAS_BIAS)
            _finish(b_n, b_weight, b_bias, p_y, b_columns, b_mask, HAS_WEIGHT, HAS_BIAS)
    tl.store(p_statistics + b_row, b_rstd, mask=b_is_row)
    tl.store(p_statistics + num_rows + b_row, b_mean, mask=b_is_row)


@jit
def _load_backward(p_dy, p_x, b_weight, b_columns, b_mask, b_rstd, b_mean, HAS_WEIGHT: tl.constexpr):
    """Return dy, n and the gradient of n."""
    b_dy = tl.load(p_dy + b_columns, mask=b_mask, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + b_columns, mask=b_mask, other=0.0).to(tl.float32)
    b_n = tl.where(b_mask, b_x - b_mean[:, None], 0.0) * b_rstd[:, None]
    b_dn = b_dy
    if HAS_WEIGHT:
        b_dn = b_dy * b_weight.to(tl.float32)
    return b_dy, b_n, b_dn


@jit
def _add_to_partial(p_partial, b_values, b_columns, is_first, WIDTH: tl.constexpr):
    b_sum = tl.sum(b_values, 0)[None, :]
    b_sum += tl.load(p_partial + b_columns, mask=(b_columns < WIDTH) & (is_first == 0), other=0.0)
    tl.store(p_partial + b_columns, b_sum, mask=b_columns < WIDTH)


@jit(do_not_specialize=["num_rows"])
def layer_norm_backward_kernel(
    p_dy,
    p_x,
    p_weight,
    p_statistics,
    p_dx,
    p_partial,
    dy_row_stride,
    x_row_stride,
    num_rows,
    WIDTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    KEEP_WEIGHT: tl.constexpr,
    RELOAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write dx of every n-th block of rows, and the program's parts of the gradients of weight and bias.

    p_partial is [2, programs, WIDTH]. With RELOAD a row is read again, from a cache, once its sums are known:
    two accumulators leave no registers to keep it.
    """
    program = tl.program_id(0)
    b_column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    p_dweight = p_partial + program.to(tl.int64) * WIDTH
    p_dbias = p_partial + (tl.num_programs(0) + program).to(tl.int64) * WIDTH
    num_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    b_dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    b_dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    b_weight = b_column
    if HAS_WEIGHT:
        b_weight = tl.load(p_weight + b_column, mask=b_column < WIDTH, other=0.0)

    for block in tl.range(program, num_blocks, tl.num_programs(0), num_stages=STAGES):
        b_row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        b_is_row = b_row < num_rows
        p_row_dy = p_dy + b_row[:, None] * dy_row_stride
        p_row_x = p_x + b_row[:, None] * x_row_stride
        p_row_dx = p_dx + b_row[:, None] * WIDTH
        b_rstd = tl.load(p_statistics + b_row, mask=b_is_row, other=0.0)
        b_mean = tl.load(p_statistics + num_rows + b_row, mask=b_is_row, other=0.0)

        if WIDTH <= BLOCK_COLUMNS:
            b_mask = b_is_row[:, None] & (b_column < WIDTH)
            if HAS_WEIGHT and not KEEP_WEIGHT:
                b_weight = tl.load(p_weight + b_column, mask=b_column < WIDTH, other=0.0)
            b_dy, b_n, b_dn = _load_backward(
                p_row_dy, p_row_x, b_weight, b_column, b_mask, b_rstd, b_mean, HAS_WEIGHT
            )
            if NEED_WEIGHT:
                b_dweight += b_dy * b_n
            if NEED_BIAS:
                b_dbias += b_dy
            if NEED_X:
                b_inner = tl.sum(b_dn * b_n, 1) / WIDTH
                b_dn_mean = tl.sum(b_dn, 1) / WIDTH
                if RELOAD:
                    tl.debug_barrier()  # or the compiler would keep what it has read
                    if HAS_WEIGHT and not KEEP_WEIGHT:
                        b_weight = tl.load(p_weight + b_column, mask=b_column < WIDTH, other=0.0)
                    b_dy, b_n, b_dn = _load_backward(
                        p_row_dy, p_row_x, b_weight, b_column, b_mask, b_rstd, b_mean, HAS_WEIGHT
                    )
                b_dx = (b_dn - b_dn_mean[:, None] - b_n * b_inner[:, None]) * b_rstd[:, None]
                tl.store(p_row_dx + b_column, b_dx.to(p_dx.dtype.element_ty), mask=b_mask)
        else:
            b_products = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            b_total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            # A program alone owns its rows of partial sums; a barrier lets threads read what others wrote.
            tl.debug_barrier()
            for start in range(0, WIDTH, BLOCK_COLUMNS):
                b_columns = start + b_column
                b_mask = b_is_row[:, None] & (b_columns < WIDTH)
                if HAS_WEIGHT:
                    b_weight = tl.load(p_weight + b_columns, mask=b_columns < WIDTH, other=0.0)
                b_dy, b_n, b_dn = _load_backward(
                    p_row_dy, p_row_x, b_weight, b_columns, b_mask, b_rstd, b_mean, HAS_WEIGHT
                )
                b_products += b_dn * b_n
                b_total += b_dn
                if NEED_WEIGHT:
                    _add_to_partial(p_dweight, b_dy * b_n, b_columns, block == program, WIDTH)
                if NEED_BIAS:
                    _add_to_partial(p_dbias, b_dy, b_columns, block == program, WIDTH)
            if NEED_X:
                b_inner = tl.sum(b_products, 1) / WIDTH
                b_dn_mean = tl.sum(b_total, 1) / WIDTH
                for start in range(0, WIDTH, BLOCK_COLUMNS):
                    b_columns = start + b_column
                    b_mask = b_is_row[:, None] & (b_columns < WIDTH)
                    if HAS_WEIGHT:
                        b_weight = tl.load(p_weight + b_columns, mask=b_columns < WIDTH, other=0.0)
                    b_dy, b_n, b_dn = _load_backward(
                        p_row_dy, p_row_x, b_weight, b_columns, b_mask, b_rstd, b_mean, HAS_WEIGHT
                    )
                    b_dx = (b_dn - b_dn_mean[:, None] - b_n * b_inner[:, None]) * b_rstd[:, None]
                    tl.store(p_row_dx + b_columns, b_dx.to(p_dx.dtype.element_ty), mask=b_mask)
    if WIDTH <= BLOCK_COLUMNS:
        if NEED_WEIGHT:
            tl.store(p_dweight + b_column, tl.sum(b_dweight, 0)[None, :], mask=b_column < WIDTH)
        if NEED_BIAS:
            tl.store(p_dbias + b_column, tl.sum(b_dbias, 0)[None, :], mask=b_column < WIDTH)


@jit(do_not_specialize=["num_partials"])
def layer_norm_sum_kernel(
    p_partial,
    p_dweight,
    p_dbias,
    num_partials,
    num_columns,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sum the programs' parts of one of the two gradients in a fixed order, and round once."""
    is_bias = tl.program_id(1) == 1 if NEED_WEIGHT else NEED_BIAS
    b_columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    b_rows = tl.arange(0, BLOCK_ROWS)[:, None]
    if is_bias:
        p_partial += num_partials * num_columns
    b_total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, num_partials, BLOCK_ROWS):
        b_mask = (start + b_rows < num_partials) & (b_columns < num_columns)
        b_total += tl.load(p_partial + (start + b_rows) * num_columns + b_columns, mask=b_mask, other=0.0)
    b_sum = tl.sum(b_total, 0)[None, :]
    if is_bias:
        tl.store(p_dbias + b_columns, b_sum.to(p_dbias.dtype.element_ty), mask=b_columns < num_columns)
    else:
        tl.store(p_dweight + b_columns, b_sum.to(p_dweight.dtype.element_ty), mask=b_columns < num_columns)
