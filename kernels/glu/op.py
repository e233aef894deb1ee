"""The op `fxopt::glu`, its backward op, and the function that patterns call."""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.activations import check_activation
from fxopt.kernels.glu.form import LAYOUTS, Form, new_gradients, new_output
from fxopt.kernels.glu.in_place import register_in_place
from fxopt.kernels.glu.launches import launch_backward, launch_forward
from fxopt.kernels.glu.reference import plain_backward, plain_forward
from fxopt.kernels.launch import Declared, can_launch, register_gradient, register_op


def _fused_forward(gate: Tensor, up: Tensor | None, *attributes: Any) -> Tensor:
    return (launch_forward if can_launch(gate, up) else plain_forward)(gate, up, *attributes)


def _fused_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, *attributes: Any
) -> tuple[Tensor | None, Tensor | None]:
    return (launch_backward if can_launch(dy, gate, up) else plain_backward)(dy, gate, up, *attributes)


ATTRIBUTES = (
    "str act, float alpha, float gate_scale, float? gate_limit, float? up_limit, float up_offset, float scale, "
    "str layout, bool gate_first"
)
forward_op = register_op(
    f"glu(Tensor gate, Tensor? up, {ATTRIBUTES}) -> Tensor",
    plain=plain_forward,
    fused=_fused_forward,
    fake=new_output,
    tags=(torch.Tag.pointwise,),
    declared=Declared(rows=("gate", "up")),
)
backward_op = register_op(
    f"glu_backward(Tensor dy, Tensor gate, Tensor? up, {ATTRIBUTES}, bool need_gate, bool need_up)"
    " -> (Tensor, Tensor)",
    plain=plain_backward,
    fused=_fused_backward,
    fake=new_gradients,
    declared=Declared(rows=("dy", "gate", "up"), in_place=register_in_place("glu_backward", ATTRIBUTES)),
)


def _fused_backward_output(
    dy: Tensor, gate: Tensor, up: Tensor | None, *attributes: Any
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    if not can_launch(dy, gate, up):
        return _plain_backward_output(dy, gate, up, *attributes)
    y = new_output(gate, up)
    return *launch_backward(dy, gate, up, *attributes, y=y), y


def _plain_backward_output(
    dy: Tensor, gate: Tensor, up: Tensor | None, *attributes: Any
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    return *plain_backward(dy, gate, up, *attributes), plain_forward(gate, up, *attributes[:-2])


def _new_gradients_and_output(
    dy: Tensor, gate: Tensor, up: Tensor | None, *attributes: Any
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    return *new_gradients(dy, gate, up, *attributes), new_output(gate, up)


register_op(
    f"glu_backward_output(Tensor dy, Tensor gate, Tensor? up, {ATTRIBUTES}, bool need_gate, bool need_up)"
    " -> (Tensor, Tensor, Tensor)",
    plain=_plain_backward_output,
    fused=_fused_backward_output,
    fake=_new_gradients_and_output,
    declared=Declared(
        rows=("dy", "gate", "up"), in_place=register_in_place("glu_backward_output", ATTRIBUTES)
    ),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, *ctx.attributes = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    found = backward_op(dy, *ctx.saved_tensors, *ctx.attributes, *ctx.needs_input_grad[:2])
    return *found, *(None for _ in ctx.attributes)


_apply = register_gradient("glu", forward_op, _setup_context, _backward)


def glu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    act: str,
    alpha: float = 1.0,
    gate_scale: float = 1.0,
    gate_limit: float | None = None,
    up_limit: float | None = None,
    up_offset: float = 0.0,
    scale: float = 1.0,
    layout: str = "split",
    gate_first: bool = True,
) -> Tensor:
    """Return the gated linear unit, contiguous: scale * act(gate) * up, limits and offset as in the formula above.

    gate, up: [*, I], any float dtypes; in a layout of one tensor `gate` is [*, 2 I] and holds both, `up` is None.

    >>> glu(torch.tensor([1.0]), torch.tensor([2.0]), act="silu")
    tensor([1.4621])
    >>> glu(torch.tensor([1.0, 2.0]), act="silu", layout="packed")
    tensor([1.4621])
    """
    check_activation("glu", act)
    if layout not in LAYOUTS:
        raise ValueError(f"glu: layout, expected one of {LAYOUTS}, got {layout!r}")
    if layout == "split":
        if up is None or gate.shape != up.shape:
            got = None if up is None else tuple(up.shape)
            raise ValueError(f"glu: up, expected the shape of gate {tuple(gate.shape)}, got {got}")
    elif up is not None or gate.dim() == 0 or gate.shape[-1] % 2:
        got = f"{tuple(gate.shape)} and {'none' if up is None else tuple(up.shape)}"
        raise ValueError(f"glu: {layout}, expected one tensor of an even width, got {got}")
    form = Form(act, alpha, gate_scale, gate_limit, up_limit, up_offset, scale, layout, gate_first)
    return _apply(gate, up, *form.astuple())
