"""What the unit is: the reference in plain torch, and its gradients written out."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.activations import activate, activate_backward
from fxopt.kernels.glu.form import Form, passes_at_limit, split_pair
from fxopt.kernels.launch import wide_dtype


def glu_reference(gate: Tensor, up: Tensor | None = None, **attributes: Any) -> Tensor:
    """Return the unit, differentiable, in plain torch: the specification."""
    form = Form(**attributes).rounded(gate, up)
    gate, up = split_pair(gate, up, form)
    dtype = torch.promote_types(gate.dtype, up.dtype)
    wide = wide_dtype(dtype)
    gate, up = _enter(gate.to(wide), up.to(wide), form)
    return (activate(gate, form.act, form.alpha) * up * form.scale).to(dtype)


def _enter(gate: Tensor, up: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    gate = gate * form.gate_scale
    if form.gate_limit is not None:
        gate = gate.clamp(max=form.gate_limit)
    if form.up_limit is not None:
        up = up.clamp(-form.up_limit, form.up_limit)
    return gate, up + form.up_offset


def _is_within(value: Tensor, limit: float) -> Tensor:
    """Return where a gradient passes a limit."""
    return value <= limit if passes_at_limit() else value < limit


def plain_forward(gate: Tensor, up: Tensor | None, *attributes: Any) -> Tensor:
    """Return the unit, contiguous, in plain torch."""
    return glu_reference(gate, up, **dataclasses.asdict(Form(*attributes))).contiguous()


def plain_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, *attributes: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients that are needed, in plain torch; of one tensor that holds both, as the first."""
    *values, need_gate, need_up = attributes
    form = Form(*values).rounded(gate, up)
    first, second = split_pair(gate, up, form)
    wide = wide_dtype(dy.dtype)
    dyf = dy.to(wide) * form.scale
    gatef, upf = first.to(wide), second.to(wide)
    entered, lifted = _enter(gatef, upf, form)
    dgate = dup = None
    if need_gate or up is None:
        dgate = activate_backward(dyf * lifted, entered, form.act, form.alpha)
        if form.gate_limit is not None:
            dgate = torch.where(_is_within(gatef * form.gate_scale, form.gate_limit), dgate, 0.0)
        dgate = (dgate * form.gate_scale).to(first.dtype).contiguous()
    if need_up or up is None:
        dup = dyf * activate(entered, form.act, form.alpha)
        if form.up_limit is not None:
            dup = torch.where(_is_within(upf.abs(), form.up_limit), dup, 0.0)
        dup = dup.to(second.dtype).contiguous()
    if up is not None:
        return dgate, dup
    assert dgate is not None
    assert dup is not None
    pair = (dgate, dup) if form.gate_first else (dup, dgate)
    joined = torch.cat(pair, dim=-1) if form.layout == "packed" else torch.stack(pair, dim=-1).flatten(-2)
    return joined, None
