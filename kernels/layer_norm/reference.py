"""What layer normalization is: the reference in plain torch, and its gradients written out."""

import torch
from torch import Tensor

from fxopt.kernels.launch import wide_dtype


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the norm of `x`, differentiable, in plain torch: the specification."""
    wide = wide_dtype(x.dtype)
    xf = x.to(wide)
    centred = xf - xf.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(out_dtype or x.dtype)


def plain_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return y and the statistics, in plain torch."""
    y = layer_norm_reference(x, weight, bias, eps=eps, out_dtype=out_dtype)
    wide = wide_dtype(x.dtype)
    rows = x.to(wide).reshape(-1, x.shape[-1])
    mean = rows.mean(-1)
    rstd = torch.rsqrt((rows - mean[:, None]).pow(2).mean(-1) + eps)
    return y.contiguous(), torch.stack([rstd, mean])


def plain_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias that are needed, in plain torch."""
    wide = statistics.dtype
    width = x.shape[-1]
    dyf = dy.to(wide).reshape(-1, width)
    rstd, mean = statistics[0, :, None], statistics[1, :, None]
    normal = (x.to(wide).reshape(-1, width) - mean) * rstd
    dx = None
    if need_x:
        dnormal = dyf if weight is None else dyf * weight.to(wide)
        inner = (dnormal * normal).mean(-1, keepdim=True)
        dx = (dnormal - dnormal.mean(-1, keepdim=True) - normal * inner) * rstd
        dx = dx.to(x.dtype).reshape(x.shape).contiguous()
    return (
        dx,
        (dyf * normal).sum(0).to(weight.dtype) if need_weight and weight is not None else None,
        dyf.sum(0).to(bias.dtype) if need_bias and bias is not None else None,
    )
