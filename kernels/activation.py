"""Activation without a gate, between the two projections of an MLP, and its gradient.

    y = act(x)          act: see `activations`

Source: transformers `ACT2FN`, `GPT2MLP`, `GPTNeoXMLP`, `NemotronMLP`.

Saved for backward: x. The result, which the next projection saves for its weight's gradient, is computed again
in the backward pass; written out in eager, the tanh form saves eight tensors of this size.

Numerics: in fp32, rounded once; spelled out in a narrow dtype, stock rounds after every step.
"""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.activations import act_backward, act_forward, activate, activate_backward, check_activation
from fxopt.kernels.launch import (
    Declared,
    as_rows,
    can_launch,
    ceil_div,
    jit,
    on_device,
    register_gradient,
    register_op,
    tl,
    wide_dtype,
)
from fxopt.kernels.launcher import launch


def activation_reference(x: Tensor, *, act: str, alpha: float = 1.0) -> Tensor:
    """Return act(x), differentiable, in plain torch: the specification."""
    return activate(x.to(wide_dtype(x.dtype)), act, alpha).to(x.dtype)


def plain_forward(x: Tensor, act: str, alpha: float) -> Tensor:
    """Return act(x), contiguous, in plain torch."""
    return activation_reference(x, act=act, alpha=alpha).contiguous()


def plain_backward(dy: Tensor, x: Tensor, act: str, alpha: float) -> Tensor:
    """Return the gradient of x, contiguous, in plain torch."""
    wide = wide_dtype(x.dtype)
    return activate_backward(dy.to(wide), x.to(wide), act, alpha).to(x.dtype).contiguous()


BLOCK = 4096
NUM_WARPS = 8  # 16 elements a thread: two loads of 16 bytes


@jit(do_not_specialize=["blocks_per_row"])
def activation_forward_kernel(
    p_x, p_y, x_row_stride, num_columns, blocks_per_row, alpha, ACT: tl.constexpr, BLOCK: tl.constexpr
):
    """Write BLOCK values of one row of act(x)."""
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    start = (program % blocks_per_row).to(tl.int64) * BLOCK
    b_at = tl.arange(0, BLOCK)
    b_mask = b_at < num_columns - start
    b_x = tl.load(p_x + (row * x_row_stride + start) + b_at, mask=b_mask, other=0.0).to(tl.float32)
    b_act = act_forward(b_x, alpha, ACT)
    tl.store(p_y + (row * num_columns + start) + b_at, b_act.to(p_y.dtype.element_ty), mask=b_mask)


@jit(do_not_specialize=["blocks_per_row"])
def activation_backward_kernel(
    p_dy,
    p_x,
    p_dx,
    dy_row_stride,
    x_row_stride,
    num_columns,
    blocks_per_row,
    alpha,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write BLOCK values of one row of the gradient."""
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    start = (program % blocks_per_row).to(tl.int64) * BLOCK
    b_at = tl.arange(0, BLOCK)
    b_mask = b_at < num_columns - start
    b_dy = tl.load(p_dy + (row * dy_row_stride + start) + b_at, mask=b_mask, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + (row * x_row_stride + start) + b_at, mask=b_mask, other=0.0).to(tl.float32)
    _, b_dx = act_backward(b_dy, b_x, alpha, ACT, APPROXIMATE=False)
    tl.store(p_dx + (row * num_columns + start) + b_at, b_dx.to(p_dx.dtype.element_ty), mask=b_mask)


def _rows_of(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors as rows that share a shape: one long row where all are contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    return [as_rows(tensor) for tensor in tensors]


def launch_forward(x: Tensor, act: str, alpha: float) -> Tensor:
    """Return act(x), contiguous, by the kernel."""
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    (rows,) = _rows_of(x)
    num_rows, num_columns = rows.shape
    blocks_per_row = ceil_div(num_columns, BLOCK)
    with on_device(x):
        launch(
            activation_forward_kernel,
            (num_rows * blocks_per_row,),
            rows,
            y,
            rows.stride(0),
            num_columns,
            blocks_per_row,
            alpha,
            ACT=act,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,  # polynomials and products: a fused multiply-add only rounds less
        )
    return y


def launch_backward(dy: Tensor, x: Tensor, act: str, alpha: float) -> Tensor:
    """Return the gradient of x, contiguous, by the kernel."""
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx
    dy_rows, rows = _rows_of(dy, x)
    num_rows, num_columns = rows.shape
    blocks_per_row = ceil_div(num_columns, BLOCK)
    with on_device(x):
        launch(
            activation_backward_kernel,
            (num_rows * blocks_per_row,),
            dy_rows,
            rows,
            dx,
            dy_rows.stride(0),
            rows.stride(0),
            num_columns,
            blocks_per_row,
            alpha,
            ACT=act,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,  # as in forward
        )
    return dx


def _fused_forward(x: Tensor, act: str, alpha: float) -> Tensor:
    return (launch_forward if can_launch(x) else plain_forward)(x, act, alpha)


def _fused_backward(dy: Tensor, x: Tensor, act: str, alpha: float) -> Tensor:
    return (launch_backward if can_launch(dy, x) else plain_backward)(dy, x, act, alpha)


def _fake_forward(x: Tensor, act: str, alpha: float) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(dy: Tensor, x: Tensor, act: str, alpha: float) -> Tensor:
    return x.new_empty(x.shape)


_forward_op = register_op(
    "activation(Tensor x, str act, float alpha) -> Tensor",
    plain=plain_forward,
    fused=_fused_forward,
    fake=_fake_forward,
    tags=(torch.Tag.pointwise,),
    declared=Declared(rows=("x",)),
)
_backward_op = register_op(
    "activation_backward(Tensor dy, Tensor x, str act, float alpha) -> Tensor",
    plain=plain_backward,
    fused=_fused_backward,
    fake=_fake_backward,
    declared=Declared(rows=("dy", "x")),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.act, ctx.alpha = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return _backward_op(dy, *ctx.saved_tensors, ctx.act, ctx.alpha), None, None


_apply = register_gradient("activation", _forward_op, _setup_context, _backward)


def activation(x: Tensor, *, act: str, alpha: float = 1.0) -> Tensor:
    """Return act(x), contiguous.

    x: any shape, any float dtype; act: one of `activations.ACTIVATIONS`; alpha: the slope in "sigmoid_alpha".

    >>> activation(torch.tensor([-1.0, 3.0]), act="relu2")
    tensor([0., 9.])
    """
    check_activation("activation", act)
    return _apply(x, act, alpha)
