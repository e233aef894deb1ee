"""RMSNorm of the last dimension in every spelling that Hugging Face models use, and its gradients.

With x in fp32 (fp64 stays fp64), per group of H / groups columns, written in the order of the model:

    x  = x * act(gate)                        gate_before
    x  = x - mean(x)                          centre
    n  = x * rsqrt(mean(x^2) + eps)
    n  = round n to the dtype of x            cast_first, as in Llama; not, as in Gemma
    y  = n * (offset + weight)
    y  = y * act(gate)                        a gate that is not gate_before
    y  = round y to out_dtype                 default: the promotion of the dtypes of x and weight

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; transformers `LlamaRMSNorm`,
`GemmaRMSNorm`, `CohereLayerNorm`, `MambaRMSNormGated`, `Qwen3NextRMSNormGated`.

Saved for backward: x, weight, gate, and `statistics`, fp32 [1, rows * groups]: the reciprocal roots; [2, ...]
when centred: the means after them.

Numerics: all arithmetic in fp32; the only roundings are the two above. Backward treats roundings as the
identity. The gradient of weight is summed in fp32, per program and then over programs, in a fixed order.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import (
    as_rows,
    can_launch,
    ceil_div,
    jit,
    next_power_of_two,
    num_processors,
    num_stages_for,
    num_warps_for,
    on_device,
    register_gradient,
    register_op,
    tl,
)

GATE_ACTIVATIONS = ("silu", "sigmoid")


def rms_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
    centre: bool = False,
    gate_act: str = "silu",
    gate_before: bool = False,
    groups: int = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the norm of `x`, differentiable, in plain torch: the specification."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    factor = None if gate is None else _activate(gate.to(wide), gate_act)
    normal = x.to(wide)
    if factor is not None and gate_before:
        normal = normal * factor
    normal = normal.unflatten(-1, (groups, -1))
    if centre:
        normal = normal - normal.mean(-1, keepdim=True)
    normal = normal * torch.rsqrt(normal.pow(2).mean(-1, keepdim=True) + eps)
    y = normal.flatten(-2)
    if cast_first:
        y = y.to(x.dtype)
    if weight is not None:
        y = y * (offset + (weight if cast_first else weight.to(wide)))
    if factor is not None and not gate_before:
        y = y.to(wide) * factor
    return y.to(out_dtype or _promoted(x, weight))


def _activate(gate: Tensor, act: str) -> Tensor:
    return gate * torch.sigmoid(gate) if act == "silu" else torch.sigmoid(gate)


def _slope(gate: Tensor, act: str) -> Tensor:
    sigmoid = torch.sigmoid(gate)
    slope = sigmoid * (1 - sigmoid)
    return sigmoid + gate * slope if act == "silu" else slope


def _promoted(x: Tensor, weight: Tensor | None) -> torch.dtype:
    return x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)


def plain_forward(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    centre: bool,
    gate_act: str,
    gate_before: bool,
    groups: int,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return y and the statistics, in plain torch."""
    y = rms_norm_reference(
        x,
        weight,
        gate,
        eps=eps,
        offset=offset,
        cast_first=cast_first,
        centre=centre,
        gate_act=gate_act,
        gate_before=gate_before,
        groups=groups,
        out_dtype=out_dtype,
    )
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = x.to(wide)
    if gate is not None and gate_before:
        values = values * _activate(gate.to(wide), gate_act)
    values = values.reshape(-1, groups, x.shape[-1] // groups)
    mean = values.mean(-1)
    if centre:
        values = values - mean[..., None]
    rstd = torch.rsqrt(values.pow(2).mean(-1) + eps)
    statistics = torch.stack([rstd.flatten(), mean.flatten()]) if centre else rstd.reshape(1, -1)
    return y.contiguous(), statistics


def plain_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    statistics: Tensor,
    offset: float,
    centre: bool,
    gate_act: str,
    gate_before: bool,
    groups: int,
    need_x: bool,
    need_weight: bool,
    need_gate: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and gate that are needed, in plain torch."""
    wide = statistics.dtype
    width = x.shape[-1]
    xf, dyf = x.to(wide).reshape(-1, width), dy.to(wide).reshape(-1, width)
    gatef = None if gate is None else gate.to(wide).reshape(-1, width)
    factor = None if gatef is None else _activate(gatef, gate_act)
    scale = None if weight is None else offset + weight.to(wide)

    normal = xf * factor if factor is not None and gate_before else xf
    normal = normal.unflatten(-1, (groups, -1))
    if centre:
        normal = normal - statistics[1].reshape(-1, groups, 1)
    rstd = statistics[0].reshape(-1, groups, 1)
    normal = normal * rstd

    dgate = dweight = dx = None
    dscaled = dyf
    if factor is not None and gatef is not None and not gate_before:
        dscaled = dyf * factor
        if need_gate:
            y = normal.flatten(-2) if scale is None else normal.flatten(-2) * scale
            dgate = dyf * y * _slope(gatef, gate_act)
    if need_weight:
        dweight = (dscaled * normal.flatten(-2)).sum(0)
    if need_x or (need_gate and gate_before):
        dnormal = (dscaled if scale is None else dscaled * scale).unflatten(-1, (groups, -1))
        inner = dnormal - normal * (dnormal * normal).mean(-1, keepdim=True)
        if centre:
            inner = inner - dnormal.mean(-1, keepdim=True)
        dx = (inner * rstd).flatten(-2)
        if factor is not None and gatef is not None and gate_before:
            if need_gate:
                dgate = dx * xf * _slope(gatef, gate_act)
            dx = dx * factor
    return (
        dx.to(x.dtype).reshape(x.shape).contiguous() if need_x and dx is not None else None,
        dweight.to(weight.dtype) if dweight is not None and weight is not None else None,
        dgate.to(gate.dtype).reshape(gate.shape).contiguous()
        if dgate is not None and gate is not None
        else None,
    )


MOST_TILE_COLUMNS = 16384  # longer rows go through in tiles
TILE_ELEMENTS = 4096  # what a program holds at a time, unless one row is longer
LOOP_COLUMNS = 4096
MOST_KEPT_COLUMNS = 8192  # backward holds the weight in registers; of longer rows it reads it again for each


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


@functools.cache
def _tile(width: int, elements: int) -> tuple[int, int]:
    """Return BLOCK_ROWS and BLOCK_COLUMNS for rows of `width`."""
    columns = next_power_of_two(width)
    if columns > MOST_TILE_COLUMNS:
        return 1, LOOP_COLUMNS
    return max(1, elements // max(columns, 64)), columns


def launch_forward(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    centre: bool,
    gate_act: str,
    gate_before: bool,
    groups: int,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return y and the statistics, by the kernel."""
    x_rows = as_rows(x)
    num_rows, columns = x_rows.shape
    gate_rows = x_rows if gate is None else as_rows(gate)
    y = x.new_empty(x.shape, dtype=out_dtype or _promoted(x, weight))
    statistics = x.new_empty((2 if centre else 1, num_rows * groups), dtype=torch.float32)
    if num_rows == 0:
        return y, statistics
    width = columns // groups
    block_rows, block_columns = _tile(width, TILE_ELEMENTS)
    with on_device(x):
        rms_norm_forward_kernel[(ceil_div(num_rows, block_rows), groups)](
            x_rows,
            x_rows if weight is None else weight.contiguous(),
            gate_rows,
            y,
            statistics,
            x_rows.stride(0),
            gate_rows.stride(0),
            num_rows,
            eps,
            offset,
            WIDTH=width,
            GROUPS=groups,
            HAS_WEIGHT=weight is not None,
            GATE="" if gate is None else gate_act,
            GATE_BEFORE=gate_before,
            CAST_FIRST=cast_first,
            CENTRE=centre,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=num_warps_for(block_rows * block_columns),
            enable_fp_fusion=True,  # sums of squares and n * w * act: a fused multiply-add only rounds less
        )
    return y, statistics


def launch_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    statistics: Tensor,
    offset: float,
    centre: bool,
    gate_act: str,
    gate_before: bool,
    groups: int,
    need_x: bool,
    need_weight: bool,
    need_gate: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and gate that are needed, by the kernel."""
    dy_rows, x_rows = as_rows(dy), as_rows(x)
    num_rows, columns = x_rows.shape
    gate_rows = x_rows if gate is None else as_rows(gate)
    dx = x.new_empty(x.shape) if need_x else None
    dgate = gate.new_empty(gate.shape) if need_gate and gate is not None else None
    dweight = weight.new_empty(weight.shape) if need_weight and weight is not None else None
    if num_rows == 0:
        return dx, None if dweight is None else dweight.zero_(), dgate
    width = columns // groups
    block_rows, block_columns = _tile(width, TILE_ELEMENTS)
    tile_elements = block_rows * block_columns
    per_processor = 1 if tile_elements > TILE_ELEMENTS else 2
    programs = max(1, num_processors(x.device) * per_processor // groups)
    programs = min(programs, ceil_div(num_rows, block_rows))
    keep_weight = block_columns <= MOST_KEPT_COLUMNS
    tile_bytes = tile_elements * sum(tensor.element_size() for tensor in (dy, x, gate) if tensor is not None)
    if weight is not None and not keep_weight:
        tile_bytes += block_columns * weight.element_size()
    partial = None if dweight is None else x.new_empty((programs, columns), dtype=torch.float32)
    with on_device(x):
        rms_norm_backward_kernel[(programs, groups)](
            dy_rows,
            x_rows,
            x_rows if weight is None else weight.contiguous(),
            gate_rows,
            statistics,
            x_rows if dx is None else dx,
            statistics if partial is None else partial,
            x_rows if dgate is None else dgate,
            dy_rows.stride(0),
            x_rows.stride(0),
            gate_rows.stride(0),
            num_rows,
            offset,
            WIDTH=width,
            GROUPS=groups,
            HAS_WEIGHT=weight is not None,
            GATE="" if gate is None else gate_act,
            GATE_BEFORE=gate_before,
            CENTRE=centre,
            NEED_X=need_x,
            NEED_WEIGHT=dweight is not None,
            NEED_GATE=dgate is not None,
            KEEP_WEIGHT=keep_weight,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            STAGES=num_stages_for(tile_bytes * per_processor, x.device) if width <= block_columns else 1,
            num_warps=num_warps_for(tile_elements),
            enable_fp_fusion=True,  # products and sums of fp32 values: a fused multiply-add only rounds less
        )
        if dweight is not None:
            block = 64
            rms_norm_sum_kernel[(ceil_div(columns, block),)](
                partial,
                dweight,
                programs,
                columns,
                BLOCK_ROWS=64,
                BLOCK_COLUMNS=block,
                num_warps=8,
                enable_fp_fusion=True,  # sums only: nothing to fuse
            )
    return dx, dweight, dgate


def _fused_forward(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, *attributes: Any
) -> tuple[Tensor, Tensor]:
    run = launch_forward if can_launch(x, weight, gate, out_dtype=attributes[-1]) else plain_forward
    return run(x, weight, gate, *attributes)


def _fused_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    run = launch_backward if can_launch(dy, x, weight, gate) else plain_backward
    return run(dy, x, weight, gate, *rest)


def _fake_forward(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    centre: bool,
    gate_act: str,
    gate_before: bool,
    groups: int,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.numel() // x.shape[-1]
    return (
        x.new_empty(x.shape, dtype=out_dtype or _promoted(x, weight)),
        x.new_empty((2 if centre else 1, rows * groups), dtype=wide),
    )


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_weight, need_gate = rest[-3:]
    return (
        x.new_empty(x.shape) if need_x else None,
        weight.new_empty(weight.shape) if need_weight and weight is not None else None,
        gate.new_empty(gate.shape) if need_gate and gate is not None else None,
    )


_ATTRIBUTES = "bool centre, str gate_act, bool gate_before, int groups"
_forward_op = register_op(
    "rms_norm(Tensor x, Tensor? weight, Tensor? gate, float eps, float offset, bool cast_first, "
    f"{_ATTRIBUTES}, ScalarType? out_dtype) -> (Tensor, Tensor)",
    plain=plain_forward,
    fused=_fused_forward,
    fake=_fake_forward,
)
_backward_op = register_op(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? gate, Tensor statistics, float offset, "
    f"{_ATTRIBUTES}, bool need_x, bool need_weight, bool need_gate) -> (Tensor, Tensor, Tensor)",
    plain=plain_backward,
    fused=_fused_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, gate, _, offset, _, centre, gate_act, gate_before, groups, _ = inputs
    ctx.save_for_backward(x, weight, gate, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.attributes = (offset, centre, gate_act, gate_before, groups)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    gradients: tuple[Any, ...] = (None, None, None)
    if dy is not None:
        gradients = _backward_op(dy, *ctx.saved_tensors, *ctx.attributes, *ctx.needs_input_grad[:3])
    return *gradients, *(None,) * 8


register_gradient("rms_norm", _setup_context, _backward)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
    centre: bool = False,
    gate_act: str = "silu",
    gate_before: bool = False,
    groups: int = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the root-mean-square norm of the last dimension of `x`, contiguous.

    x: [..., H]; weight: [H] or None; gate: the shape of x or None; any float dtypes.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), eps=0.0)
    tensor([[0.8485, 1.1314]])
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight, expected shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    if gate is not None and (gate.shape != x.shape or gate_act not in GATE_ACTIVATIONS):
        raise ValueError(
            f"rms_norm: gate, expected shape {tuple(x.shape)} and one of {GATE_ACTIVATIONS}, "
            f"got {tuple(gate.shape)} and {gate_act!r}"
        )
    if x.shape[-1] % groups:
        raise ValueError(f"rms_norm: groups, expected a divisor of {x.shape[-1]}, got {groups}")
    y, _ = _forward_op(
        x, weight, gate, eps, offset, cast_first, centre, gate_act, gate_before, groups, out_dtype
    )
    return y
