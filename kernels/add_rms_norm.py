"""A residual add and the RMSNorm of its sum in one pass each way.

With x and skip in fp32 (fp64 stays fp64):

    h  = round (skip + x * scale) to the promotion of the dtypes of x and skip
    y  = rms_norm(h)                          see `kernels/rms_norm`, without its gate and groups

Source: the second norm of a pre-norm block, as in transformers `LlamaDecoderLayer`; with a scale as in
`GraniteDecoderLayer`; between two norms as in `Gemma2DecoderLayer`.

Saved for backward: h, which lives anyway, weight, and `statistics` as rms_norm has them.

Numerics: the product with scale is not rounded on its own. In backward the gradient that comes through the
norm and the one of h from elsewhere are added in fp32 and rounded once; stock rounds each and their sum.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import can_launch, register_gradient, register_op, wide_dtype
from fxopt.kernels.rms_norm.launches import launch_forward as launch_norm_forward
from fxopt.kernels.rms_norm.launches import run_backward, run_forward
from fxopt.kernels.rms_norm.reference import plain_backward as plain_norm_backward
from fxopt.kernels.rms_norm.reference import plain_forward as plain_norm_forward
from fxopt.kernels.rms_norm.reference import promoted, rms_norm_reference

UNGATED = ("silu", False, 1)  # gate_act, gate_before and groups of a norm without gate


def add_rms_norm_reference(
    x: Tensor,
    skip: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    scale: float = 1.0,
    offset: float = 0.0,
    cast_first: bool = True,
    centre: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return h and its norm, differentiable, in plain torch: the specification."""
    h = _add(x, skip, scale)
    y = rms_norm_reference(
        h, weight, eps=eps, offset=offset, cast_first=cast_first, centre=centre, out_dtype=out_dtype
    )
    return h, y


def _add(x: Tensor, skip: Tensor, scale: float) -> Tensor:
    dtype = torch.promote_types(x.dtype, skip.dtype)
    wide = wide_dtype(dtype)
    return (skip.to(wide) + x.to(wide) * scale).to(dtype)


def plain_forward(
    x: Tensor,
    skip: Tensor,
    weight: Tensor | None,
    scale: float,
    eps: float,
    offset: float,
    cast_first: bool,
    centre: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return h, y and the statistics, in plain torch."""
    h = _add(x, skip, scale).contiguous()
    return h, *plain_norm_forward(h, weight, None, eps, offset, cast_first, centre, *UNGATED, out_dtype)


def plain_backward(
    dh: Tensor | None,
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    scale: float,
    offset: float,
    centre: bool,
    x_dtype: torch.dtype,
    skip_dtype: torch.dtype,
    need_x: bool,
    need_skip: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, skip and weight that are needed, in plain torch."""
    # Not rounded yet: h in the dtype of its statistics gives a gradient in that dtype.
    total, dweight, _ = plain_norm_backward(
        dy, h.to(statistics.dtype), weight, None, statistics, offset, centre, *UNGATED,
        need_x or need_skip, need_weight, False, dh,
    )  # fmt: skip
    return (
        (total * scale).to(x_dtype) if total is not None and need_x else None,
        total.to(skip_dtype) if total is not None and need_skip else None,
        dweight,
    )


def launch_forward(
    x: Tensor,
    skip: Tensor,
    weight: Tensor | None,
    scale: float,
    eps: float,
    offset: float,
    cast_first: bool,
    centre: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return h, y and the statistics, by the kernel of rms_norm."""
    h = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, skip.dtype))
    y = x.new_empty(x.shape, dtype=out_dtype or promoted(h, weight))
    statistics = run_forward(
        x, skip, weight, None, h, y, scale, eps, offset, cast_first, centre, *UNGATED
    )  # fmt: skip
    return h, y, statistics


def launch_backward(
    dh: Tensor | None,
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    scale: float,
    offset: float,
    centre: bool,
    x_dtype: torch.dtype,
    skip_dtype: torch.dtype,
    need_x: bool,
    need_skip: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, skip and weight that are needed, by the kernel of rms_norm."""
    dx = h.new_empty(h.shape, dtype=x_dtype) if need_x else None
    dskip = h.new_empty(h.shape, dtype=skip_dtype) if need_skip else None
    dweight = run_backward(
        dy, h, weight, None, statistics, dh, dx, dskip, None, scale, offset, centre, *UNGATED, need_weight
    )  # fmt: skip
    return dx, dskip, dweight


def _fused_forward(
    x: Tensor, skip: Tensor, weight: Tensor | None, *attributes: Any
) -> tuple[Tensor, Tensor, Tensor]:
    run = launch_forward if can_launch(x, skip, weight, out_dtype=attributes[-1]) else plain_forward
    return run(x, skip, weight, *attributes)


def _fused_backward(
    dh: Tensor | None, dy: Tensor, h: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    run = launch_backward if can_launch(dh, dy, h, weight) else plain_backward
    return run(dh, dy, h, weight, *rest)


def _fake_forward(
    x: Tensor, skip: Tensor, weight: Tensor | None, *attributes: Any
) -> tuple[Tensor, Tensor, Tensor]:
    centre, out_dtype = attributes[-2:]
    h = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, skip.dtype))
    wide = wide_dtype(h.dtype)
    return (
        h,
        x.new_empty(x.shape, dtype=out_dtype or promoted(h, weight)),
        x.new_empty((2 if centre else 1, x.numel() // x.shape[-1]), dtype=wide),
    )


def _fake_backward(
    dh: Tensor | None, dy: Tensor, h: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x_dtype, skip_dtype, need_x, need_skip, need_weight = rest[-5:]
    return (
        h.new_empty(h.shape, dtype=x_dtype) if need_x else None,
        h.new_empty(h.shape, dtype=skip_dtype) if need_skip else None,
        weight.new_empty(weight.shape) if need_weight and weight is not None else None,
    )


forward_op = register_op(
    "add_rms_norm(Tensor x, Tensor skip, Tensor? weight, float scale, float eps, float offset, "
    "bool cast_first, bool centre, ScalarType? out_dtype) -> (Tensor, Tensor, Tensor)",
    plain=plain_forward,
    fused=_fused_forward,
    fake=_fake_forward,
)


def _again(run: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return `run`, a norm, as a function of h and of the arguments of this op that a norm has."""

    def compute(
        h: Tensor,
        weight: Tensor | None,
        eps: float,
        offset: float,
        cast_first: bool,
        centre: bool,
        out_dtype: torch.dtype | None,
    ) -> Tensor:
        return run(h, weight, None, eps, offset, cast_first, centre, *UNGATED, out_dtype)

    return compute


def _launch_norm(h: Tensor, weight: Tensor | None, *arguments: Any) -> Tensor:
    run = launch_norm_forward if can_launch(h, weight, out_dtype=arguments[-1]) else plain_norm_forward
    return run(h, weight, *arguments)[0]


register_op(
    "add_rms_norm_output_1(Tensor output_0, Tensor? weight, float eps, float offset, bool cast_first, bool centre, "
    "ScalarType? out_dtype) -> Tensor",
    plain=_again(lambda *arguments: plain_norm_forward(*arguments)[0]),
    fused=_again(_launch_norm),
    fake=lambda h, weight, *rest: h.new_empty(h.shape, dtype=rest[-1] or promoted(h, weight)),
    tags=(torch.Tag.pointwise,),
)
backward_op = register_op(
    "add_rms_norm_backward(Tensor? dh, Tensor dy, Tensor h, Tensor? weight, Tensor statistics, float scale, "
    "float offset, bool centre, ScalarType x_dtype, ScalarType skip_dtype, bool need_x, bool need_skip, "
    "bool need_weight) -> (Tensor, Tensor, Tensor)",
    plain=plain_backward,
    fused=_fused_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, skip, weight, scale, _, offset, _, centre, _ = inputs
    h, _, statistics = output
    ctx.save_for_backward(h, weight, statistics)
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.attributes = (scale, offset, centre, x.dtype, skip.dtype)


def _backward(ctx: Any, dh: Tensor | None, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    need_x, need_skip, need_weight = ctx.needs_input_grad[:3]
    scale, _, _, x_dtype, skip_dtype = ctx.attributes
    dx = dskip = dweight = None
    if dy is None and dh is not None:
        dx = (dh * scale if scale != 1.0 else dh).to(x_dtype) if need_x else None
        dskip = dh.to(skip_dtype) if need_skip else None
    elif dy is not None:
        is_shared = scale == 1.0 and x_dtype == skip_dtype
        wanted = (need_x or need_skip, False) if is_shared else (need_x, need_skip)
        dx, dskip, dweight = backward_op(dh, dy, *ctx.saved_tensors, *ctx.attributes, *wanted, need_weight)
        if is_shared:
            dx, dskip = dx if need_x else None, dx if need_skip else None
    return dx, dskip, dweight, *(None,) * 6


_apply = register_gradient("add_rms_norm", forward_op, _setup_context, _backward)


def add_rms_norm(
    x: Tensor,
    skip: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    scale: float = 1.0,
    offset: float = 0.0,
    cast_first: bool = True,
    centre: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `skip + x * scale` and the root-mean-square norm of its last dimension, both contiguous.

    x, skip: [..., H]; weight: [H] or None; any float dtypes.

    >>> add_rms_norm(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 3.0]]), eps=0.0)
    (tensor([[3., 4.]]), tensor([[0.8485, 1.1314]]))
    """
    if skip.shape != x.shape:
        raise ValueError(f"add_rms_norm: skip, expected shape {tuple(x.shape)}, got {tuple(skip.shape)}")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(
            f"add_rms_norm: weight, expected shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}"
        )
    h, y, _ = _apply(x, skip, weight, scale, eps, offset, cast_first, centre, out_dtype)
    return h, y
