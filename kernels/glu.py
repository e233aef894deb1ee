"""Gated linear unit: an activation of one projection times another, and its gradients.

    g = min(gate_scale * gate, gate_limit)          u = clamp(up, -up_limit, up_limit) + up_offset
    y = scale * act(g) * u                          act: see `activations`

`layout` says where the two are: "split" in two tensors, "packed" in the halves of one, "interleaved" in the
even and odd columns of one; `gate_first` which of the two is the gate. One tensor in, one gradient out: halves
are neither copied nor joined.

Source: Shazeer 2020, "GLU Variants Improve Transformer"; transformers `LlamaMLP`, `Phi3MLP`, `GptOssExperts`.

Saved for backward: gate and up, or the one tensor that holds both. Backward recomputes the activation, and
writes its gradients to new tensors.

Numerics: all in fp32, rounded once at the end; stock models round act(gate) to their dtype before the product.
NaN passes through clamps, and no gradient does where one cut something off, as in torch.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.activations import act_backward, act_forward, activate, activate_backward, check_activation
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

LAYOUTS = ("split", "packed", "interleaved")


@dataclasses.dataclass(frozen=True)
class Form:
    """What a unit computes besides its tensors, in the order of the op's arguments."""

    act: str
    alpha: float = 1.0
    gate_scale: float = 1.0
    gate_limit: float | None = None
    up_limit: float | None = None
    up_offset: float = 0.0
    scale: float = 1.0
    layout: str = "split"
    gate_first: bool = True

    def astuple(self) -> tuple[Any, ...]:
        """Return the values as the op takes them."""
        return dataclasses.astuple(self)

    def constants(self) -> dict[str, Any]:
        """Return what the kernels are compiled for."""
        return {
            "ACT": self.act,
            "HAS_GATE_LIMIT": self.gate_limit is not None,
            "HAS_UP_LIMIT": self.up_limit is not None,
            "INTERLEAVED": self.layout == "interleaved",
            "GATE_FIRST": self.gate_first,
        }

    def numbers(self) -> tuple[float, ...]:
        """Return what the kernels are told at run time."""
        return (
            self.alpha,
            self.gate_scale,
            self.gate_limit or 0.0,
            self.up_limit or 0.0,
            self.up_offset,
            self.scale,
        )


def split_pair(first: Tensor, second: Tensor | None, form: Form) -> tuple[Tensor, Tensor]:
    """Return gate and up: the two tensors of a split layout, else views of the one."""
    if second is not None:
        return first, second
    if form.layout == "packed":
        pair = first.chunk(2, dim=-1)
    else:
        pair = (first[..., ::2], first[..., 1::2])
    return (pair[0], pair[1]) if form.gate_first else (pair[1], pair[0])


def glu_reference(gate: Tensor, up: Tensor | None = None, **attributes: Any) -> Tensor:
    """Return the unit, differentiable, in plain torch: the specification."""
    form = Form(**attributes)
    gate, up = split_pair(gate, up, form)
    dtype = torch.promote_types(gate.dtype, up.dtype)
    wide = _wide(dtype)
    gate, up = _enter(gate.to(wide), up.to(wide), form)
    return (activate(gate, form.act, form.alpha) * up * form.scale).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _enter(gate: Tensor, up: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    gate = gate * form.gate_scale
    if form.gate_limit is not None:
        gate = gate.clamp(max=form.gate_limit)
    if form.up_limit is not None:
        up = up.clamp(-form.up_limit, form.up_limit)
    return gate, up + form.up_offset


def plain_forward(gate: Tensor, up: Tensor | None, *attributes: Any) -> Tensor:
    """Return the unit, contiguous, in plain torch."""
    return glu_reference(gate, up, **dataclasses.asdict(Form(*attributes))).contiguous()


def plain_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, *attributes: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients that are needed, in plain torch; of one tensor that holds both, as the first."""
    *values, need_gate, need_up = attributes
    form = Form(*values)
    first, second = split_pair(gate, up, form)
    wide = _wide(dy.dtype)
    dyf = dy.to(wide) * form.scale
    gatef, upf = first.to(wide), second.to(wide)
    entered, lifted = _enter(gatef, upf, form)
    dgate = dup = None
    if need_gate or up is None:
        dgate = activate_backward(dyf * lifted, entered, form.act, form.alpha)
        if form.gate_limit is not None:
            dgate = torch.where(gatef * form.gate_scale <= form.gate_limit, dgate, 0.0)
        dgate = (dgate * form.gate_scale).to(first.dtype).contiguous()
    if need_up or up is None:
        dup = dyf * activate(entered, form.act, form.alpha)
        if form.up_limit is not None:
            dup = torch.where(upf.abs() <= form.up_limit, dup, 0.0)
        dup = dup.to(second.dtype).contiguous()
    if up is not None:
        return dgate, dup
    assert dgate is not None
    assert dup is not None
    pair = (dgate, dup) if form.gate_first else (dup, dgate)
    joined = torch.cat(pair, dim=-1) if form.layout == "packed" else torch.stack(pair, dim=-1).flatten(-2)
    return joined, None


BLOCKS = (4096, 2048, 1024, 512, 256, 128)
ELEMENTS_PER_WARP = 512  # 16 a thread: two loads of 16 bytes per input


def block_for(num_columns: int) -> int:
    """Return the widest block of which at most an eighth of a row's last one stays empty, else the narrowest.

    >>> block_for(18944), block_for(14336), block_for(1408), block_for(10**8)
    (4096, 2048, 512, 4096)
    """
    for block in BLOCKS:
        if ceil_div(num_columns, block) * block - num_columns <= num_columns // 8:
            return block
    return BLOCKS[-1]


def num_warps_for_block(block: int) -> int:
    """Return the warps of a program of `block` columns."""
    return max(1, block // ELEMENTS_PER_WARP)


@jit
def _load_pair(
    p_gate, p_up, num_left, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, GATE_FIRST: tl.constexpr
):
    if INTERLEAVED:
        b_both_at = tl.arange(0, 2 * BLOCK)
        b_both = tl.load(p_gate + b_both_at, mask=b_both_at < 2 * num_left, other=0.0).to(tl.float32)
        b_even, b_odd = tl.split(tl.reshape(b_both, (BLOCK, 2)))
        if GATE_FIRST:
            b_gate = b_even
            b_up = b_odd
        else:
            b_gate = b_odd
            b_up = b_even
    else:
        b_at = tl.arange(0, BLOCK)
        b_gate = tl.load(p_gate + b_at, mask=b_at < num_left, other=0.0).to(tl.float32)
        b_up = tl.load(p_up + b_at, mask=b_at < num_left, other=0.0).to(tl.float32)
    return b_gate, b_up


@jit
def _enter_tile(
    b_gate,
    b_up,
    gate_scale,
    gate_limit,
    up_limit,
    up_offset,
    HAS_GATE_LIMIT: tl.constexpr,
    HAS_UP_LIMIT: tl.constexpr,
):
    b_gate = b_gate * gate_scale
    if HAS_GATE_LIMIT:
        b_gate = tl.where(b_gate > gate_limit, gate_limit, b_gate)  # keeps a NaN
    if HAS_UP_LIMIT:
        b_up = tl.where(b_up > up_limit, up_limit, tl.where(b_up < -up_limit, -up_limit, b_up))
    return b_gate, b_up + up_offset


@jit
def glu_forward_kernel(
    p_gate,
    p_up,
    p_y,
    gate_row_stride,
    up_row_stride,
    num_columns,
    blocks_per_row,
    alpha,
    gate_scale,
    gate_limit,
    up_limit,
    up_offset,
    scale,
    ACT: tl.constexpr,
    HAS_GATE_LIMIT: tl.constexpr,
    HAS_UP_LIMIT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write BLOCK values of one row of the unit; interleaved, `p_gate` holds both and `p_up` is not read."""
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    start = (program % blocks_per_row).to(tl.int64) * BLOCK
    num_left = num_columns - start
    p_gate += row * gate_row_stride + start
    p_up += row * up_row_stride + start
    if INTERLEAVED:
        p_gate += start  # two columns a value
    b_gate, b_up = _load_pair(p_gate, p_up, num_left, BLOCK, INTERLEAVED, GATE_FIRST)
    b_gate, b_up = _enter_tile(
        b_gate, b_up, gate_scale, gate_limit, up_limit, up_offset, HAS_GATE_LIMIT, HAS_UP_LIMIT
    )
    b_act = act_forward(b_gate, alpha, ACT)
    b_at = tl.arange(0, BLOCK)
    b_y = (b_act * b_up * scale).to(p_y.dtype.element_ty)
    tl.store(p_y + (row * num_columns + start) + b_at, b_y, mask=b_at < num_left)


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
    dgate_row_stride,
    dup_row_stride,
    num_columns,
    blocks_per_row,
    alpha,
    gate_scale,
    gate_limit,
    up_limit,
    up_offset,
    scale,
    ACT: tl.constexpr,
    HAS_GATE_LIMIT: tl.constexpr,
    HAS_UP_LIMIT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    NEED_GATE: tl.constexpr,
    NEED_UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write BLOCK values of one row of the gradients; interleaved, `p_dgate` takes both."""
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    start = (program % blocks_per_row).to(tl.int64) * BLOCK
    num_left = num_columns - start
    b_at = tl.arange(0, BLOCK)
    b_mask = b_at < num_left
    p_gate += row * gate_row_stride + start
    p_up += row * up_row_stride + start
    p_dgate += row * dgate_row_stride + start
    p_dup += row * dup_row_stride + start
    if INTERLEAVED:
        p_gate += start  # two columns a value
        p_dgate += start
    b_dy = tl.load(p_dy + (row * dy_row_stride + start) + b_at, mask=b_mask, other=0.0).to(tl.float32) * scale
    b_gate, b_up = _load_pair(p_gate, p_up, num_left, BLOCK, INTERLEAVED, GATE_FIRST)
    b_entered, b_lifted = _enter_tile(
        b_gate, b_up, gate_scale, gate_limit, up_limit, up_offset, HAS_GATE_LIMIT, HAS_UP_LIMIT
    )
    b_act, b_dgate = act_backward(b_dy * b_lifted, b_entered, alpha, ACT)
    b_dgate *= gate_scale
    if HAS_GATE_LIMIT:
        b_dgate = tl.where(b_gate * gate_scale <= gate_limit, b_dgate, 0.0)
    b_dup = b_dy * b_act
    if HAS_UP_LIMIT:
        b_dup = tl.where(tl.abs(b_up) <= up_limit, b_dup, 0.0)
    if INTERLEAVED:
        if GATE_FIRST:
            b_pair = tl.join(b_dgate, b_dup)
        else:
            b_pair = tl.join(b_dup, b_dgate)
        b_both = tl.reshape(b_pair, (2 * BLOCK,)).to(p_dgate.dtype.element_ty)
        b_both_at = tl.arange(0, 2 * BLOCK)
        tl.store(p_dgate + b_both_at, b_both, mask=b_both_at < 2 * num_left)
    else:
        if NEED_GATE:
            tl.store(p_dgate + b_at, b_dgate.to(p_dgate.dtype.element_ty), mask=b_mask)
        if NEED_UP:
            tl.store(p_dup + b_at, b_dup.to(p_dup.dtype.element_ty), mask=b_mask)


def _rows_of(form: Form, gate: Tensor, up: Tensor | None, *others: Tensor) -> list[Tensor]:
    """Return gate, up and `others` as 2-D tensors of as many rows, whose first columns are what kernels start at.

    One long row where all are contiguous and no half ends within. Interleaved, gate and up are the whole tensor.
    """
    tensors = [gate, *others] if up is None else [gate, up, *others]
    is_one_row = form.layout != "packed" and all(tensor.is_contiguous() for tensor in tensors)
    rows = [tensor.view(1, -1) if is_one_row else as_rows(tensor) for tensor in tensors]
    if up is not None:
        return rows
    both, *rest = rows
    pair = (both, both) if form.layout == "interleaved" else split_pair(both, None, form)
    return [*pair, *rest]


def _shape_of_output(gate: Tensor, up: Tensor | None) -> list[Any]:
    return [*gate.shape[:-1], gate.shape[-1] // 2] if up is None else list(gate.shape)


def _dtype_of_output(gate: Tensor, up: Tensor | None) -> torch.dtype:
    return gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype)


def launch_forward(gate: Tensor, up: Tensor | None, *attributes: Any) -> Tensor:
    """Return the unit, contiguous, by the kernel."""
    form = Form(*attributes)
    y = _fake_forward(gate, up)
    if y.numel() == 0:
        return y
    gate_rows, up_rows = _rows_of(form, gate, up)
    num_columns = y.numel() // gate_rows.shape[0]
    block = block_for(num_columns)
    blocks_per_row = ceil_div(num_columns, block)
    with on_device(gate):
        glu_forward_kernel[(gate_rows.shape[0] * blocks_per_row,)](
            gate_rows,
            up_rows,
            y,
            gate_rows.stride(0),
            up_rows.stride(0),
            num_columns,
            blocks_per_row,
            *form.numbers(),
            **form.constants(),
            BLOCK=block,
            num_warps=num_warps_for_block(block),
            enable_fp_fusion=True,  # polynomials and products: a fused multiply-add only rounds less
        )
    return y


def launch_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, *attributes: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients that are needed, by the kernel; of one tensor that holds both, as the first."""
    *values, need_gate, need_up = attributes
    form = Form(*values)
    dgate, dup = _fake_backward(dy, gate, up, *attributes)
    if dy.numel() == 0:
        return dgate, dup
    gate_rows, up_rows, dy_rows = _rows_of(form, gate, up, dy)
    num_rows = gate_rows.shape[0]
    num_columns = dy.numel() // num_rows
    block = block_for(num_columns)
    blocks_per_row = ceil_div(num_columns, block)
    if up is None:
        assert dgate is not None
        both = dgate.view(num_rows, -1)
        dgate_rows, dup_rows = (both, both) if form.layout == "interleaved" else split_pair(both, None, form)
        need_gate = need_up = True
    else:
        dgate_rows = gate_rows if dgate is None else dgate.view(num_rows, -1)
        dup_rows = up_rows if dup is None else dup.view(num_rows, -1)
    with on_device(gate):
        glu_backward_kernel[(num_rows * blocks_per_row,)](
            dy_rows,
            gate_rows,
            up_rows,
            dgate_rows,
            dup_rows,
            dy_rows.stride(0),
            gate_rows.stride(0),
            up_rows.stride(0),
            dgate_rows.stride(0),
            dup_rows.stride(0),
            num_columns,
            blocks_per_row,
            *form.numbers(),
            **form.constants(),
            NEED_GATE=need_gate,
            NEED_UP=need_up,
            BLOCK=block,
            num_warps=num_warps_for_block(block),
            enable_fp_fusion=True,  # as in forward
        )
    return dgate, dup


def _fused_forward(gate: Tensor, up: Tensor | None, *attributes: Any) -> Tensor:
    return (launch_forward if can_launch(gate, up) else plain_forward)(gate, up, *attributes)


def _fused_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, *attributes: Any
) -> tuple[Tensor | None, Tensor | None]:
    return (launch_backward if can_launch(dy, gate, up) else plain_backward)(dy, gate, up, *attributes)


def _fake_forward(gate: Tensor, up: Tensor | None, *attributes: Any) -> Tensor:
    return gate.new_empty(_shape_of_output(gate, up), dtype=_dtype_of_output(gate, up))


def _fake_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, *attributes: Any
) -> tuple[Tensor | None, Tensor | None]:
    *_, need_gate, need_up = attributes
    if up is None:
        return gate.new_empty(gate.shape), None
    return (
        gate.new_empty(gate.shape) if need_gate else None,
        up.new_empty(up.shape) if need_up else None,
    )


_ATTRIBUTES = (
    "str act, float alpha, float gate_scale, float? gate_limit, float? up_limit, float up_offset, float scale, "
    "str layout, bool gate_first"
)
_forward_op = register_op(
    f"glu(Tensor gate, Tensor? up, {_ATTRIBUTES}) -> Tensor",
    plain=plain_forward,
    fused=_fused_forward,
    fake=_fake_forward,
    tags=(torch.Tag.pointwise,),
)
_backward_op = register_op(
    f"glu_backward(Tensor dy, Tensor gate, Tensor? up, {_ATTRIBUTES}, bool need_gate, bool need_up)"
    " -> (Tensor, Tensor)",
    plain=plain_backward,
    fused=_fused_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, *ctx.attributes = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    found = _backward_op(dy, *ctx.saved_tensors, *ctx.attributes, *ctx.needs_input_grad[:2])
    return *found, *(None for _ in ctx.attributes)


_apply = register_gradient("glu", _forward_op, _setup_context, _backward)


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
