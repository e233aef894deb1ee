"""What the norm is: the reference in plain torch, and its gradients written out."""

import torch
from torch import Tensor

from fxopt.kernels.launch import wide_dtype

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
    wide = wide_dtype(x.dtype)
    factor = None if gate is None else activate(gate.to(wide), gate_act)
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
    return y.to(out_dtype or promoted(x, weight))


def activate(gate: Tensor, act: str) -> Tensor:
    """Return what the norm is multiplied by."""
    return gate * torch.sigmoid(gate) if act == "silu" else torch.sigmoid(gate)


def slope_of(gate: Tensor, act: str) -> Tensor:
    """Return the derivative of `activate`."""
    sigmoid = torch.sigmoid(gate)
    slope = sigmoid * (1 - sigmoid)
    return sigmoid + gate * slope if act == "silu" else slope


def promoted(x: Tensor, weight: Tensor | None) -> torch.dtype:
    """Return the dtype of the result, where none is given."""
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
    wide = wide_dtype(x.dtype)
    values = x.to(wide)
    if gate is not None and gate_before:
        values = values * activate(gate.to(wide), gate_act)
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
    dskip: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x (with `dskip` added), weight and gate that are needed, in plain torch."""
    wide = statistics.dtype
    width = x.shape[-1]
    xf, dyf = x.to(wide).reshape(-1, width), dy.to(wide).reshape(-1, width)
    gatef = None if gate is None else gate.to(wide).reshape(-1, width)
    factor = None if gatef is None else activate(gatef, gate_act)
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
            dgate = dyf * y * slope_of(gatef, gate_act)
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
                dgate = dx * xf * slope_of(gatef, gate_act)
            dx = dx * factor
        if dskip is not None:
            dx = dx + dskip.to(wide).reshape(-1, width)
    return (
        dx.to(x.dtype).reshape(x.shape).contiguous() if need_x and dx is not None else None,
        dweight.to(weight.dtype) if dweight is not None and weight is not None else None,
        dgate.to(gate.dtype).reshape(gate.shape).contiguous()
        if dgate is not None and gate is not None
        else None,
    )
