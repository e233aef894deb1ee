"""The op `fxopt::layer_norm`, its backward op, and the function that patterns call."""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import can_launch, register_gradient, register_op, wide_dtype
from fxopt.kernels.layer_norm.launches import launch_backward, launch_forward
from fxopt.kernels.layer_norm.reference import plain_backward, plain_forward


def _fused_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    run = launch_forward if can_launch(x, weight, bias, out_dtype=out_dtype) else plain_forward
    return run(x, weight, bias, eps, out_dtype)


def _fused_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    run = launch_backward if can_launch(dy, x, weight, bias) else plain_backward
    return run(dy, x, weight, bias, *rest)


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(x.dtype)
    return (
        x.new_empty(x.shape, dtype=out_dtype or x.dtype),
        x.new_empty((2, x.numel() // x.shape[-1]), dtype=wide),
    )


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _, need_x, need_weight, need_bias = rest
    return (
        x.new_empty(x.shape) if need_x else None,
        weight.new_empty(weight.shape) if need_weight and weight is not None else None,
        bias.new_empty(bias.shape) if need_bias and bias is not None else None,
    )


forward_op = register_op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType? out_dtype) -> (Tensor, Tensor)",
    plain=plain_forward,
    fused=_fused_forward,
    fake=_fake_forward,
)
register_op(
    "layer_norm_output_0(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType? out_dtype) -> Tensor",
    plain=lambda *arguments: plain_forward(*arguments)[0],
    fused=lambda *arguments: _fused_forward(*arguments)[0],
    fake=lambda *arguments: _fake_forward(*arguments)[0],
    tags=(torch.Tag.pointwise,),
)
backward_op = register_op(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor statistics, "
    "bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    plain=plain_backward,
    fused=_fused_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    gradients: tuple[Any, ...] = (None, None, None)
    if dy is not None:
        gradients = backward_op(dy, *ctx.saved_tensors, *ctx.needs_input_grad[:3])
    return *gradients, None, None


_apply = register_gradient("layer_norm", forward_op, _setup_context, _backward)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the layer norm of the last dimension of `x`, contiguous.

    x: [..., H]; weight, bias: [H] or None; any float dtypes.

    >>> layer_norm(torch.tensor([[1.0, 3.0]]), bias=torch.tensor([0.0, 5.0]), eps=0.0)
    tensor([[-1.,  6.]])
    """
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != x.shape[-1:]:
            raise ValueError(
                f"layer_norm: {name}, expected shape {tuple(x.shape[-1:])}, got {tuple(value.shape)}"
            )
    y, _ = _apply(x, weight, bias, eps, out_dtype)
    return y
