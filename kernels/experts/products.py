"""The grouped products: rows in groups times a matrix each, the gradient of those matrices, and sums of the rows."""

from fxopt.kernels.launch import jit, tl


@jit
def find_tile(p_ends, tile, num_experts, BLOCK_ROWS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr):
    """Return the expert of a tile of rows (their number where there is none), its first row, and where its rows end."""
    b_expert = tl.arange(0, BLOCK_EXPERTS)
    b_ends = tl.load(p_ends + b_expert, mask=b_expert < num_experts, other=0)
    b_starts = tl.load(p_ends + b_expert - 1, mask=(b_expert > 0) & (b_expert < num_experts), other=0)
    b_tiles = tl.where(b_expert < num_experts, (b_ends - b_starts + BLOCK_ROWS - 1) // BLOCK_ROWS, 0)
    b_after = tl.cumsum(b_tiles, 0)
    expert = tl.sum(tl.where((b_after <= tile) & (b_expert < num_experts), 1, 0), 0)
    b_is_it = b_expert == expert
    start = tl.sum(tl.where(b_is_it, b_starts + (tile - (b_after - b_tiles)) * BLOCK_ROWS, 0), 0)
    end = tl.sum(tl.where(b_is_it, b_ends, 0), 0)
    return expert, start, end


@jit(do_not_specialize=["num_tiles"])
def experts_product_kernel(
    p_x,
    p_w,
    p_bias,
    p_out,
    p_rows,
    p_ends,
    num_experts,
    num_tiles,
    num_inner,
    num_columns,
    num_choices,
    x_row_stride,
    w_expert_stride,
    w_inner_stride,
    w_column_stride,
    bias_row_stride,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write a tile of the products of the rows in order; GATHER reads the token's row of x for each.

    Programs go down GROUP tiles of rows before they go to the next columns, so that both stay in the cache.
    """
    program = tl.program_id(0)
    num_column_tiles = tl.cdiv(num_columns, BLOCK_COLUMNS)
    band = program // (GROUP * num_column_tiles)
    height = tl.minimum(num_tiles - band * GROUP, GROUP)
    tile = band * GROUP + (program % (GROUP * num_column_tiles)) % height
    column_tile = (program % (GROUP * num_column_tiles)) // height
    expert, start, end = find_tile(p_ends, tile, num_experts, BLOCK_ROWS, BLOCK_EXPERTS)
    if expert < num_experts:
        b_row = start + tl.arange(0, BLOCK_ROWS)
        b_is_row = b_row < end
        if GATHER:
            b_source = tl.load(p_rows + b_row, mask=b_is_row, other=0) // num_choices
        else:
            b_source = b_row
        b_column = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        b_is_column = b_column < num_columns
        b_inner = tl.arange(0, BLOCK_INNER)
        p_w += expert.to(tl.int64) * w_expert_stride
        b_x_at = b_source.to(tl.int64)[:, None] * x_row_stride + b_inner[None, :]
        b_w_at = (
            b_inner.to(tl.int64)[:, None] * w_inner_stride + b_column.to(tl.int64)[None, :] * w_column_stride
        )
        b_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for first in range(0, num_inner, BLOCK_INNER):
            b_is_inner = b_inner < num_inner - first
            b_x = tl.load(p_x + b_x_at, mask=b_is_row[:, None] & b_is_inner[None, :], other=0.0)
            b_w = tl.load(p_w + b_w_at, mask=b_is_inner[:, None] & b_is_column[None, :], other=0.0)
            b_sum = tl.dot(b_x.to(p_w.dtype.element_ty), b_w, b_sum, input_precision="ieee")
            b_x_at += BLOCK_INNER
            b_w_at += BLOCK_INNER * w_inner_stride
        if HAS_BIAS:
            p_bias += expert.to(tl.int64) * bias_row_stride
            b_sum += tl.load(p_bias + b_column, mask=b_is_column, other=0.0).to(tl.float32)[None, :]
        b_out_at = b_row.to(tl.int64)[:, None] * num_columns + b_column[None, :]
        tl.store(
            p_out + b_out_at,
            b_sum.to(p_out.dtype.element_ty),
            mask=b_is_row[:, None] & b_is_column[None, :],
        )


@jit
def experts_weight_gradient_kernel(
    p_x,
    p_d,
    p_dw,
    p_rows,
    p_ends,
    num_inner,
    num_columns,
    num_choices,
    x_row_stride,
    d_row_stride,
    dw_expert_stride,
    dw_inner_stride,
    dw_column_stride,
    GATHER_X: tl.constexpr,
    GATHER_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Write a tile of one expert's x^T d over its rows, in their order; zeros for an expert without rows."""
    expert = tl.program_id(1)
    num_column_tiles = tl.cdiv(num_columns, BLOCK_COLUMNS)
    b_inner = (tl.program_id(0) // num_column_tiles) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    b_column = (tl.program_id(0) % num_column_tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    b_is_inner = b_inner < num_inner
    b_is_column = b_column < num_columns
    end = tl.load(p_ends + expert)
    start = tl.load(p_ends + expert - 1, mask=expert > 0, other=0)
    b_sum = tl.zeros((BLOCK_INNER, BLOCK_COLUMNS), dtype=tl.float32)
    for first in range(start, end, BLOCK_ROWS):
        b_row = first + tl.arange(0, BLOCK_ROWS)
        b_is_row = b_row < end
        b_token = tl.load(p_rows + b_row, mask=b_is_row, other=0) // num_choices
        if GATHER_X:
            b_x_row = b_token.to(tl.int64)
        else:
            b_x_row = b_row.to(tl.int64)
        if GATHER_D:
            b_d_row = b_token.to(tl.int64)
        else:
            b_d_row = b_row.to(tl.int64)
        b_x = tl.load(
            p_x + b_x_row[None, :] * x_row_stride + b_inner[:, None],
            mask=b_is_row[None, :] & b_is_inner[:, None],
            other=0.0,
        )
        b_d = tl.load(
            p_d + b_d_row[:, None] * d_row_stride + b_column[None, :],
            mask=b_is_row[:, None] & b_is_column[None, :],
            other=0.0,
        )
        dtype = p_dw.dtype.element_ty
        b_sum = tl.dot(b_x.to(dtype), b_d.to(dtype), b_sum, input_precision="ieee")
    p_dw += expert.to(tl.int64) * dw_expert_stride
    b_at = b_inner.to(tl.int64)[:, None] * dw_inner_stride + b_column.to(tl.int64)[None, :] * dw_column_stride
    tl.store(p_dw + b_at, b_sum.to(p_dw.dtype.element_ty), mask=b_is_inner[:, None] & b_is_column[None, :])


@jit
def experts_bias_gradient_kernel(
    p_d,
    p_weights,
    p_dbias,
    p_rows,
    p_ends,
    num_columns,
    num_choices,
    d_row_stride,
    GATHER: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write some columns of one expert's sum of rows of d, each times the weight of its choice if HAS_WEIGHTS."""
    expert = tl.program_id(1)
    b_column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    b_is_column = b_column < num_columns
    end = tl.load(p_ends + expert)
    start = tl.load(p_ends + expert - 1, mask=expert > 0, other=0)
    b_sum = tl.zeros((BLOCK_COLUMNS,), dtype=tl.float32)
    for first in range(start, end, BLOCK_ROWS):
        b_row = first + tl.arange(0, BLOCK_ROWS)
        b_is_row = b_row < end
        b_choice = tl.load(p_rows + b_row, mask=b_is_row, other=0)
        if GATHER:
            b_d_row = (b_choice // num_choices).to(tl.int64)
        else:
            b_d_row = b_row.to(tl.int64)
        b_d = tl.load(
            p_d + b_d_row[:, None] * d_row_stride + b_column[None, :],
            mask=b_is_row[:, None] & b_is_column[None, :],
            other=0.0,
        ).to(tl.float32)
        if HAS_WEIGHTS:
            b_d *= tl.load(p_weights + b_choice, mask=b_is_row, other=0.0).to(tl.float32)[:, None]
        b_sum += tl.sum(b_d, axis=0)
    tl.store(
        p_dbias + expert.to(tl.int64) * num_columns + b_column,
        b_sum.to(p_dbias.dtype.element_ty),
        mask=b_is_column,
    )
