"""The backward kernel for rows so long that two accumulators of a row leave few registers.

A program walks the rows, one at a time and in pieces. It keeps what it has read of a row as it came, in 2 bytes a
value (it is launched for no other), and widens it twice: for the row's sums, and behind them for dx. Meanwhile the next
row is on its way into the L2 cache, for which no register is needed.
"""
# ruff: noqa: RUF005 (Triton unpacks no tuple within another)
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (Triton's compiler reads the loops over pieces, and knows the types of what a tuple holds.)

from fxopt.kernels.launch import INTERPRETED, jit, tl

SECTOR = tl.constexpr(16)  # values: the 32 bytes of the L2 cache that one request brings
CAN_PREFETCH = tl.constexpr(not INTERPRETED)  # the interpreter runs no assembly


@jit
def _ask_for(p_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Have a row brought into the L2 cache."""
    b_column = tl.minimum(tl.arange(0, BLOCK // SECTOR) * SECTOR, WIDTH - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [(p_row + b_column).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@jit
def _widen_later(b_values, is_later):
    """Return the values in fp32, which the compiler cannot know before `is_later`, a number that is 0."""
    b_bits = b_values.to(tl.int16, bitcast=True) ^ is_later.to(tl.int16)
    return b_bits.to(b_values.dtype, bitcast=True).to(tl.float32)


@jit(do_not_specialize=["num_rows"])
def layer_norm_long_backward_kernel(
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
    BLOCK_COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Write dx of every n-th row, and the program's parts of the gradients of weight and bias: [2, programs, WIDTH]."""
    PIECE: tl.constexpr = BLOCK_COLUMNS // PIECES
    program = tl.program_id(0)
    b_column = tl.arange(0, PIECE)
    p_dweight = p_partial + program.to(tl.int64) * WIDTH
    p_dbias = p_partial + (tl.num_programs(0) + program).to(tl.int64) * WIDTH
    b_dweights = ()
    b_dbiases = ()
    for _ in tl.static_range(PIECES):
        b_dweights = b_dweights + (tl.zeros([PIECE], tl.float32),)
        b_dbiases = b_dbiases + (tl.zeros([PIECE], tl.float32),)

    for row in range(program, num_rows, tl.num_programs(0)):
        row_offset = tl.cast(row, tl.int64)
        p_row_dy = p_dy + row_offset * dy_row_stride
        p_row_x = p_x + row_offset * x_row_stride
        p_row_dx = p_dx + row_offset * WIDTH
        rstd = tl.load(p_statistics + row)
        mean = tl.load(p_statistics + num_rows + row)
        b_dys = ()
        b_xs = ()
        for piece in tl.static_range(PIECES):
            b_columns = piece * PIECE + b_column
            b_dys = b_dys + (tl.load(p_row_dy + b_columns, mask=b_columns < WIDTH, other=0.0),)
            b_xs = b_xs + (tl.load(p_row_x + b_columns, mask=b_columns < WIDTH, other=0.0),)
        if CAN_PREFETCH:
            next_row = tl.minimum(row + tl.num_programs(0), num_rows - 1).to(tl.int64)
            _ask_for(p_dy + next_row * dy_row_stride, WIDTH, BLOCK_COLUMNS)
            _ask_for(p_x + next_row * x_row_stride, WIDTH, BLOCK_COLUMNS)

        b_products = tl.zeros([PIECE], tl.float32)
        b_total = tl.zeros([PIECE], tl.float32)
        b_new_dweights = ()
        b_new_dbiases = ()
        for piece in tl.static_range(PIECES):
            b_columns = piece * PIECE + b_column
            b_dn = b_dys[piece].to(tl.float32)
            b_n = tl.where(b_columns < WIDTH, b_xs[piece].to(tl.float32) - mean, 0.0) * rstd
            b_new_dweights = b_new_dweights + (b_dweights[piece] + b_dn * b_n,)
            b_new_dbiases = b_new_dbiases + (b_dbiases[piece] + b_dn,)
            if HAS_WEIGHT:
                b_dn *= tl.load(p_weight + b_columns, mask=b_columns < WIDTH, other=0.0).to(tl.float32)
            b_products += b_dn * b_n
            b_total += b_dn
        b_dweights = b_new_dweights
        b_dbiases = b_new_dbiases

        if NEED_X:
            inner = tl.sum(b_products, 0) / WIDTH
            dn_mean = tl.sum(b_total, 0) / WIDTH
            # 0; 1 where dx is NaN whatever is read. So nothing below can be computed above, and kept.
            is_later = tl.where(inner != inner, 1, 0)
            for piece in tl.static_range(PIECES):
                b_columns = piece * PIECE + b_column
                b_dn = _widen_later(b_dys[piece], is_later)
                b_n = (_widen_later(b_xs[piece], is_later) - mean) * rstd
                if HAS_WEIGHT:
                    b_mask = (b_columns < WIDTH) & (is_later == 0)
                    b_dn *= tl.load(p_weight + b_columns, mask=b_mask, other=0.0).to(tl.float32)
                b_dx = (b_dn - dn_mean - b_n * inner) * rstd
                tl.store(p_row_dx + b_columns, b_dx.to(p_dx.dtype.element_ty), mask=b_columns < WIDTH)

    for piece in tl.static_range(PIECES):
        b_columns = piece * PIECE + b_column
        if NEED_WEIGHT:
            tl.store(p_dweight + b_columns, b_dweights[piece], mask=b_columns < WIDTH)
        if NEED_BIAS:
            tl.store(p_dbias + b_columns, b_dbiases[piece], mask=b_columns < WIDTH)
