"""Gated linear unit: an activation of one projection times another, act(gate) * up, and its gradients.

    silu       gate * sigmoid(gate)
    gelu       gate * (1 + erf(gate / sqrt 2)) / 2
    gelu_tanh  gate * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 gate^3))) / 2

Source: Shazeer 2020, "GLU Variants Improve Transformer"; transformers `LlamaMLP`, `GemmaMLP`.

Saved for backward: gate, up. Backward recomputes the activation, and writes its gradients to new tensors.

Numerics: all in fp32, rounded once at the end; stock models round act(gate) to their dtype before the product.
Kernels use 1 + tanh(u) = 2 sigmoid(2 u), which is exact.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxopt.kernels.launch import (
    as_rows,
    can_launch,
    ceil_div,
    jit,
    on_device,
    register_gradient,
    register_op,
    tl,
)

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def glu_reference(gate: Tensor, up: Tensor, *, act: str) -> Tensor:
    """Return act(gate) * up, differentiable, in plain torch: the specification."""
    dtype = torch.promote_types(gate.dtype, up.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wide_gate = gate.to(wide)
    if act == "silu":
        activated = F.silu(wide_gate)
    else:
        activated = F.gelu(wide_gate, approximate="tanh" if act == "gelu_tanh" else "none")
    return (activated * up.to(wide)).to(dtype)


def plain_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """Return act(gate) * up, contiguous, in plain torch."""
    return glu_reference(gate, up, act=act).contiguous()


def plain_backward(
    dy: Tensor, gate: Tensor, up: Tensor, act: str, need_gate: bool, need_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of gate and up that are needed, in plain torch."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    dyf, gatef = dy.to(wide), gate.to(wide)
    dgate = dup = None
    if need_gate:
        dactivated = dyf * up.to(wide)
        if act == "silu":
            dgate = torch.ops.aten.silu_backward(dactivated, gatef)
        else:
            approximate = "tanh" if act == "gelu_tanh" else "none"
            dgate = torch.ops.aten.gelu_backward(dactivated, gatef, approximate=approximate)
        dgate = dgate.to(gate.dtype).contiguous()
    if need_up:
        dup = glu_reference(gatef, dyf, act=act).to(up.dtype).contiguous()
    return dgate, dup


BLOCK = 4096
NUM_WARPS = 8  # 16 elements a thread: two loads of 16 bytes per input


@jit
def _act_and_slope(b_gate, ACT: tl.constexpr):
    if ACT == "silu":
        b_sigmoid = tl.sigmoid(b_gate)
        b_act = b_gate * b_sigmoid
        b_slope = b_sigmoid + b_act * (1 - b_sigmoid)
    elif ACT == "gelu":
        b_normal = 0.5 + 0.5 * tl.erf(b_gate * 0.7071067811865476)
        b_act = b_gate * b_normal
        b_slope = b_normal + b_gate * (0.3989422804014327 * tl.exp(-0.5 * b_gate * b_gate))
    else:
        b_square = b_gate * b_gate
        b_sigmoid = tl.sigmoid(1.5957691216057308 * b_gate * (1 + 0.044715 * b_square))
        b_act = b_gate * b_sigmoid
        b_slope = b_sigmoid + b_act * (1 - b_sigmoid) * (1.5957691216057308 * (1 + 0.134145 * b_square))
    return b_act, b_slope


@jit
def glu_forward_kernel(
    p_gate,
    p_up,
    p_y,
    gate_row_stride,
    up_row_stride,
    num_columns,
    blocks_per_row,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write BLOCK values of one row of act(gate) * up."""
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    start = (program % blocks_per_row).to(tl.int64) * BLOCK
    b_at = tl.arange(0, BLOCK)
    b_mask = b_at < num_columns - start
    b_gate = tl.load(p_gate + (row * gate_row_stride + start) + b_at, mask=b_mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + (row * up_row_stride + start) + b_at, mask=b_mask, other=0.0).to(tl.float32)
    b_act, _ = _act_and_slope(b_gate, ACT)
    b_y = (b_act * b_up).to(p_y.dtype.element_ty)
    tl.store(p_y + (row * num_columns + start) + b_at, b_y, mask=b_mask)


@jit
def glu_backward_kernel(
    p_dy,
    p_gate,
    p_up,
    p_dgate,
    p_dup,
    dy_row_stride,
    gate_row_stride,
    up_row_stride,
    num_columns,
    blocks_per_row,
    ACT: tl.constexpr,
    NEED_GATE: tl.constexpr,
    NEED_UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write BLOCK values of one row of the gradients."""
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    start = (program % blocks_per_row).to(tl.int64) * BLOCK
    b_at = tl.arange(0, BLOCK)
    b_mask = b_at < num_columns - start
    b_dy = tl.load(p_dy + (row * dy_row_stride + start) + b_at, mask=b_mask, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + (row * gate_row_stride + start) + b_at, mask=b_mask, other=0.0).to(tl.float32)
    b_act, b_slope = _act_and_slope(b_gate, ACT)
    if NEED_GATE:
        b_up = tl.load(p_up + (row * up_row_stride + start) + b_at, mask=b_mask, other=0.0).to(tl.float32)
        b_dgate = (b_dy * b_up * b_slope).to(p_dgate.dtype.element_ty)
        tl.store(p_dgate + (row * num_columns + start) + b_at, b_dgate, mask=b_mask)
    if NEED_UP:
        b_dup = (b_dy * b_act).to(p_dup.dtype.element_ty)
        tl.store(p_dup + (row * num_columns + start) + b_at, b_dup, mask=b_mask)


def _rows_of(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors as rows that share a shape: one long row where all are contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    return [as_rows(tensor) for tensor in tensors]


def launch_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """Return act(gate) * up, contiguous, by the kernel."""
    y = gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))
    if gate.numel() == 0:
        return y
    gate_rows, up_rows = _rows_of(gate, up)
    num_rows, num_columns = gate_rows.shape
    blocks_per_row = ceil_div(num_columns, BLOCK)
    with on_device(gate):
        glu_forward_kernel[(num_rows * blocks_per_row,)](
            gate_rows,
            up_rows,
            y,
            gate_rows.stride(0),
            up_rows.stride(0),
            num_columns,
            blocks_per_row,
            ACT=act,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,  # polynomials and products: a fused multiply-add only rounds less
        )
    return y


def launch_backward(
    dy: Tensor, gate: Tensor, up: Tensor, act: str, need_gate: bool, need_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of gate and up that are needed, by the kernel."""
    dgate = gate.new_empty(gate.shape) if need_gate else None
    dup = up.new_empty(up.shape) if need_up else None
    if gate.numel() == 0:
        return dgate, dup
    dy_rows, gate_rows, up_rows = _rows_of(dy, gate, up)
    num_rows, num_columns = gate_rows.shape
    blocks_per_row = ceil_div(num_columns, BLOCK)
    with on_device(gate):
        glu_backward_kernel[(num_rows * blocks_per_row,)](
            dy_rows,
            gate_rows,
            up_rows,
            gate_rows if dgate is None else dgate,
            up_rows if dup is None else dup,
            dy_rows.stride(0),
            gate_rows.stride(0),
            up_rows.stride(0),
            num_columns,
            blocks_per_row,
            ACT=act,
            NEED_GATE=need_gate,
            NEED_UP=need_up,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,  # as in forward
        )
    return dgate, dup


def _fused_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return (launch_forward if can_launch(gate, up) else plain_forward)(gate, up, act)


def _fused_backward(
    dy: Tensor, gate: Tensor, up: Tensor, act: str, need_gate: bool, need_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    run = launch_backward if can_launch(dy, gate, up) else plain_backward
    return run(dy, gate, up, act, need_gate, need_up)


def _fake_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


def _fake_backward(
    dy: Tensor, gate: Tensor, up: Tensor, act: str, need_gate: bool, need_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    return (
        gate.new_empty(gate.shape) if need_gate else None,
        up.new_empty(up.shape) if need_up else None,
    )


_forward_op = register_op(
    "glu(Tensor gate, Tensor up, str act) -> Tensor",
    plain=plain_forward,
    fused=_fused_forward,
    fake=_fake_forward,
    tags=(torch.Tag.pointwise,),
)
_backward_op = register_op(
    "glu_backward(Tensor dy, Tensor gate, Tensor up, str act, bool need_gate, bool need_up)"
    " -> (Tensor, Tensor)",
    plain=plain_backward,
    fused=_fused_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.act = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return *_backward_op(dy, *ctx.saved_tensors, ctx.act, *ctx.needs_input_grad[:2]), None


register_gradient("glu", _setup_context, _backward)


def glu(gate: Tensor, up: Tensor, *, act: str) -> Tensor:
    """Return act(gate) * up, contiguous.

    gate, up: the same shape, any float dtypes; act: "silu", "gelu" or "gelu_tanh".

    >>> glu(torch.tensor([1.0]), torch.tensor([2.0]), act="silu")
    tensor([1.4621])
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"glu: act, expected one of {ACTIVATIONS}, got {act!r}")
    if gate.shape != up.shape:
        raise ValueError(f"glu: up, expected the shape of gate {tuple(gate.shape)}, got {tuple(up.shape)}")
    return _forward_op(gate, up, act)
