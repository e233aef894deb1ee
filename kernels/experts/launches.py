"""How the kernels are launched, and where torch's own grouped product serves instead."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxopt.kernels.experts.order import Order
from fxopt.kernels.experts.products import (
    experts_bias_gradient_kernel,
    experts_product_kernel,
    experts_weight_gradient_kernel,
)
from fxopt.kernels.experts.rows import experts_sum_kernel, experts_unit_backward_kernel
from fxopt.kernels.glu import Form
from fxopt.kernels.glu import launch_forward as launch_unit
from fxopt.kernels.glu.form import passes_at_limit
from fxopt.kernels.launch import as_rows, ceil_div, next_power_of_two, num_stages_for, on_device
from fxopt.kernels.launcher import launch

GROUPED_CAPABILITIES = (9, 10)
"""Where torch's grouped product is one kernel; elsewhere it waits for the groups' ends and loops over them."""
GROUPED_ALIGNMENT = 8  # items of bfloat16 in 16 bytes
WIDE_REGISTERS = 8
BAND = 8  # tiles of rows that share a matrix in the cache
ROW_BLOCK, ROW_WARPS = 1024, 4
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 32, 64, 4
HALF_TILE = {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 128, "BLOCK_INNER": 64}
WIDE_TILE = {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64, "BLOCK_INNER": 32}
HALF_GRADIENT_TILE = {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 128, "BLOCK_INNER": 128}
WIDE_GRADIENT_TILE = {"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 64, "BLOCK_INNER": 64}
HALF_WARPS, WIDE_WARPS = 8, 4


@functools.cache
def capability_of(device: torch.device) -> int:
    """Return the major number of a device's compute capability; of a CPU, in the interpreter, the least that serves."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else WIDE_REGISTERS


def uses_torch(w: Tensor) -> bool:
    """Return whether torch's grouped product serves a weight, and all products that read it or make its gradient."""
    return (
        w.device.type == "cuda"
        and w.dtype == torch.bfloat16
        and capability_of(w.device) in GROUPED_CAPABILITIES
        and all(size % GROUPED_ALIGNMENT == 0 for size in w.shape[1:])
        and w.data_ptr() % 16 == 0
        and 1 in w.stride()[1:]
    )


def tile_of(dtype: torch.dtype, capability: int, *, gradient: bool) -> tuple[dict[str, int], int]:
    """Return the tile of a product in `dtype`, or of a weight's gradient, and its warps.

    Before `capability` 8 Triton multiplies without tensor cores, and a large tile does not fit into the registers.
    """
    if dtype == torch.float32 or capability < WIDE_REGISTERS:
        num_warps = WIDE_WARPS if dtype == torch.float32 else HALF_WARPS
        return (WIDE_GRADIENT_TILE if gradient else WIDE_TILE), num_warps
    return (HALF_GRADIENT_TILE if gradient else HALF_TILE), HALF_WARPS


def _stages_for(tile: dict[str, int], w: Tensor, *, gradient: bool) -> int:
    outer = tile["BLOCK_INNER"] if gradient else tile["BLOCK_ROWS"]
    inner = tile["BLOCK_ROWS"] if gradient else tile["BLOCK_INNER"]
    return num_stages_for((outer + tile["BLOCK_COLUMNS"]) * inner * w.element_size(), w.device)


def _block_of_experts(order: Order) -> int:
    return max(next_power_of_two(order.ends.numel()), 16)


def launch_product(
    x: Tensor, w: Tensor, bias: Tensor | None, order: Order, num_tokens: int, *, gather: bool
) -> Tensor:
    """Return the rows of `x` times their experts' matrices, in order; with `gather` x has one row per token."""
    num_rows, num_columns = order.rows.numel(), w.shape[-1]
    num_choices = num_rows // max(num_tokens, 1)
    if bias is None and uses_torch(w):
        rows = gather_rows(x, order, num_choices) if gather else x
        return F.grouped_mm(rows.to(w.dtype), w, offs=order.ends)
    out = w.new_empty((num_rows, num_columns))
    if num_rows == 0:
        return out
    x = as_rows(x)
    tile, num_warps = tile_of(w.dtype, capability_of(w.device), gradient=False)
    num_tiles = ceil_div(num_rows, tile["BLOCK_ROWS"]) + w.shape[0]
    with on_device(w):
        launch(
            experts_product_kernel,
            (num_tiles * ceil_div(num_columns, tile["BLOCK_COLUMNS"]),),
            x,
            w,
            w if bias is None else bias,
            out,
            order.rows,
            order.ends,
            w.shape[0],
            num_tiles,
            w.shape[1],
            num_columns,
            num_choices,
            x.stride(0),
            *w.stride(),
            0 if bias is None else bias.stride(0),
            GATHER=gather,
            HAS_BIAS=bias is not None,
            BLOCK_EXPERTS=_block_of_experts(order),
            **tile,
            GROUP=BAND,
            num_warps=num_warps,
            num_stages=_stages_for(tile, w, gradient=False),
            enable_fp_fusion=True,
        )
    return out


def launch_weight_gradient(
    x: Tensor, d: Tensor, like: Tensor, order: Order, num_tokens: int, *, gather_x: bool, gather_d: bool
) -> Tensor:
    """Return x^T d of each expert's rows, laid out as the weight `like`."""
    num_choices = order.rows.numel() // max(num_tokens, 1)
    if uses_torch(like):
        left = (gather_rows(x, order, num_choices) if gather_x else x).to(like.dtype)
        right = (gather_rows(d, order, num_choices) if gather_d else d).to(like.dtype)
        if like.stride(-1) == 1:
            return F.grouped_mm(left.t(), right, offs=order.ends)
        return F.grouped_mm(right.t(), left, offs=order.ends).transpose(1, 2)
    dw = torch.empty_like(like)
    x, d = as_rows(x), as_rows(d)
    tile, num_warps = tile_of(like.dtype, capability_of(like.device), gradient=True)
    inner, columns = like.shape[1:]
    num_tiles = ceil_div(inner, tile["BLOCK_INNER"]) * ceil_div(columns, tile["BLOCK_COLUMNS"])
    with on_device(like):
        launch(
            experts_weight_gradient_kernel,
            (num_tiles, like.shape[0]),
            x,
            d,
            dw,
            order.rows,
            order.ends,
            inner,
            columns,
            num_choices,
            x.stride(0),
            d.stride(0),
            *dw.stride(),
            GATHER_X=gather_x,
            GATHER_D=gather_d,
            **tile,
            num_warps=num_warps,
            num_stages=_stages_for(tile, like, gradient=True),
            enable_fp_fusion=True,
        )
    return dw


def launch_bias_gradient(
    d: Tensor, weights: Tensor | None, dtype: torch.dtype, order: Order, num_tokens: int
) -> Tensor:
    """Return the sum of each expert's rows of d; with `weights` d has one row per token, weighed by the choices."""
    num_experts, num_columns = order.ends.numel(), d.shape[-1]
    dbias = d.new_empty((num_experts, num_columns), dtype=dtype)
    d = as_rows(d)
    with on_device(d):
        launch(
            experts_bias_gradient_kernel,
            (ceil_div(num_columns, SUM_COLUMNS), num_experts),
            d,
            d if weights is None else weights,
            dbias,
            order.rows,
            order.ends,
            num_columns,
            order.rows.numel() // max(num_tokens, 1),
            d.stride(0),
            GATHER=weights is not None,
            HAS_WEIGHTS=weights is not None,
            BLOCK_ROWS=SUM_ROWS,
            BLOCK_COLUMNS=SUM_COLUMNS,
            num_warps=SUM_WARPS,
            enable_fp_fusion=True,
        )
    return dbias


def launch_sum(
    values: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    order: Order,
    num_tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return for each token the sum of its choices' rows, weighed where there are weights."""
    num_columns = values.shape[-1]
    y = values.new_empty((num_tokens, num_columns), dtype=dtype)
    if num_tokens == 0:
        return y
    block = min(next_power_of_two(num_columns), ROW_BLOCK)
    with on_device(values):
        launch(
            experts_sum_kernel,
            (num_tokens, ceil_div(num_columns, block)),
            values,
            values if weights is None else weights,
            values if bias is None else bias,
            y,
            order.places,
            order.ends,
            order.ends.numel(),
            num_columns,
            order.rows.numel() // num_tokens,
            HAS_WEIGHTS=weights is not None,
            HAS_BIAS=bias is not None,
            BLOCK_EXPERTS=_block_of_experts(order),
            BLOCK=block,
            num_warps=ROW_WARPS,
            enable_fp_fusion=True,
        )
    return y


def launch_unit_backward(
    dunit: Tensor,
    a: Tensor,
    weights: Tensor,
    order: Order,
    form: Form,
    *,
    need_a: bool,
    need_unit: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradient of a, the weighed unit and the gradient of the choices' weights, those that are needed."""
    num_columns = dunit.shape[-1]
    da = torch.empty_like(a) if need_a else None
    unit = torch.empty_like(dunit) if need_unit else None
    dweights = torch.empty_like(weights) if need_weights else None
    if a.shape[0] == 0 or not (need_a or need_unit or need_weights):
        return da, unit, dweights
    with on_device(a):
        launch(
            experts_unit_backward_kernel,
            (a.shape[0],),
            dunit,
            a,
            weights,
            a if da is None else da,
            dunit if unit is None else unit,
            weights if dweights is None else dweights,
            order.rows,
            order.ends,
            order.ends.numel(),
            num_columns,
            *form.rounded(a, None).numbers(),
            **form.constants(),
            PASSES_AT_LIMIT=passes_at_limit(),
            NEED_A=need_a,
            NEED_UNIT=need_unit,
            NEED_WEIGHTS=need_weights,
            BLOCK=min(next_power_of_two(num_columns), ROW_BLOCK),
            num_warps=ROW_WARPS,
            enable_fp_fusion=True,
        )
    return da, unit, dweights


def gather_rows(x: Tensor, order: Order, num_choices: int) -> Tensor:
    """Return the row of `x` of each choice's token, in order."""
    return x.index_select(0, order.rows // num_choices)


def launch_up(x: Tensor, w: Tensor, bias: Tensor | None, *order: Tensor) -> Tensor:
    """Return the first products, in order of the experts."""
    return launch_product(x, w, bias, Order(*order), x.shape[0], gather=True)


def launch_up_backward(
    da: Tensor, x: Tensor, w: Tensor, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, of the weight and of the bias that are needed."""
    rows, places, ends, need_x, need_w, need_bias = rest
    order, num_tokens = Order(rows, places, ends), x.shape[0]
    dx = dw = dbias = None
    if need_x:
        dx = launch_sum(
            launch_product(da, w.mT, None, order, num_tokens, gather=False),
            None,
            None,
            order,
            num_tokens,
            x.dtype,
        )
    if need_w:
        dw = launch_weight_gradient(x, da, w, order, num_tokens, gather_x=True, gather_d=False)
    if need_bias:
        dbias = launch_bias_gradient(da, None, w.dtype, order, num_tokens)
    return dx, dw, dbias


def launch_down(a: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor, *rest: Any) -> Tensor:
    """Return the weighed sum of the second products over each token's choices."""
    rows, places, ends, *attributes, num_tokens, dtype = rest
    order = Order(rows, places, ends)
    values = launch_product(launch_unit(a, None, *attributes), w, None, order, num_tokens, gather=False)
    return launch_sum(values, weights, bias, order, num_tokens, dtype)


def launch_down_backward(
    dy: Tensor, a: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of a, of the weight, of the bias and of the choices' weights that are needed."""
    rows, places, ends, *attributes, need_a, need_w, need_bias, need_weights = rest
    order, num_tokens = Order(rows, places, ends), dy.shape[0]
    dy = dy.contiguous()
    da = dw = dbias = unit = dweights = None
    if need_a or need_w or need_weights:
        dunit = launch_product(dy, w.mT, None, order, num_tokens, gather=True)
        da, unit, dweights = launch_unit_backward(
            dunit,
            a,
            weights,
            order,
            Form(*attributes),
            need_a=need_a,
            need_unit=need_w,
            need_weights=need_weights,
        )
        del dunit
    if unit is not None:
        dw = launch_weight_gradient(unit, dy, w, order, num_tokens, gather_x=False, gather_d=True)
    if bias is not None and need_bias:
        dbias = launch_bias_gradient(dy, weights, bias.dtype, order, num_tokens)
    if dweights is not None and bias is not None:
        dweights = dweights + products_with_bias(dy, bias, order).to(dweights.dtype)
    return da, dw, dbias, dweights


def products_with_bias(dy: Tensor, bias: Tensor, order: Order) -> Tensor:
    """Return for each choice the product of its token's row of dy and its expert's bias; 0 without an expert."""
    of_token = (dy.to(bias.dtype) @ bias.t()).view(-1)
    num_experts = bias.shape[0]
    expert = torch.searchsorted(order.ends, order.places, right=True)
    token = torch.arange(expert.numel(), device=dy.device) // (expert.numel() // dy.shape[0])
    found = of_token[token * num_experts + expert.clamp(max=num_experts - 1)]
    return torch.where(expert < num_experts, found, 0.0)
