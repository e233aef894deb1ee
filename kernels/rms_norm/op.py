"""The op `fxopt::rms_norm`, its backward op, and the function that patterns call."""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import can_launch, register_gradient, register_op, wide_dtype
from fxopt.kernels.rms_norm.launches import launch_backward, launch_forward
from fxopt.kernels.rms_norm.reference import GATE_ACTIVATIONS, plain_backward, plain_forward, promoted

NUM_REQUIRED = 9  # arguments of backward after the gate and before its optional `dskip`


def _fused_forward(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, *attributes: Any
) -> tuple[Tensor, Tensor]:
    run = launch_forward if can_launch(x, weight, gate, out_dtype=attributes[-1]) else plain_forward
    return run(x, weight, gate, *attributes)


def _fused_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    run = launch_backward if can_launch(dy, x, weight, gate, *rest[NUM_REQUIRED:]) else plain_backward
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
    wide = wide_dtype(x.dtype)
    rows = x.numel() // x.shape[-1]
    return (
        x.new_empty(x.shape, dtype=out_dtype or promoted(x, weight)),
        x.new_empty((2 if centre else 1, rows * groups), dtype=wide),
    )


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_weight, need_gate = rest[NUM_REQUIRED - 3 : NUM_REQUIRED]
    return (
        x.new_empty(x.shape) if need_x else None,
        weight.new_empty(weight.shape) if need_weight and weight is not None else None,
        gate.new_empty(gate.shape) if need_gate and gate is not None else None,
    )


_ATTRIBUTES = "bool centre, str gate_act, bool gate_before, int groups"
forward_op = register_op(
    "rms_norm(Tensor x, Tensor? weight, Tensor? gate, float eps, float offset, bool cast_first, "
    f"{_ATTRIBUTES}, ScalarType? out_dtype) -> (Tensor, Tensor)",
    plain=plain_forward,
    fused=_fused_forward,
    fake=_fake_forward,
)
register_op(
    "rms_norm_output_0(Tensor x, Tensor? weight, Tensor? gate, float eps, float offset, bool cast_first, "
    f"{_ATTRIBUTES}, ScalarType? out_dtype) -> Tensor",
    plain=lambda *arguments: plain_forward(*arguments)[0],
    fused=lambda *arguments: _fused_forward(*arguments)[0],
    fake=lambda *arguments: _fake_forward(*arguments)[0],
    tags=(torch.Tag.pointwise,),
)
backward_op = register_op(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? gate, Tensor statistics, float offset, "
    f"{_ATTRIBUTES}, bool need_x, bool need_weight, bool need_gate, Tensor? dskip=None) -> (Tensor, Tensor, Tensor)",
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
        gradients = backward_op(dy, *ctx.saved_tensors, *ctx.attributes, *ctx.needs_input_grad[:3])
    return *gradients, *(None,) * 8


_apply = register_gradient("rms_norm", forward_op, _setup_context, _backward)


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
    y, _ = _apply(x, weight, gate, eps, offset, cast_first, centre, gate_act, gate_before, groups, out_dtype)
    return y
