"""The specification, and forward and backward in plain torch, which are the path on a CPU."""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import wide_dtype
from fxopt.kernels.row_loss import (
    Shaping,
    find_divisor,
    find_z_weight,
    plain_gradient,
    plain_losses,
    plain_statistics,
    reference_loss,
    shape_plainly,
)


def cross_entropy_reference(
    logits: Tensor,
    labels: Tensor,
    *,
    denominator: Tensor | float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    z_rows: str = "labelled",
) -> Tensor:
    """Return the loss, differentiable, in plain torch: the specification."""
    shaping = Shaping(scale, softcap, label_smoothing, z_loss, z_rows == "all")
    return reference_loss(logits, labels, denominator, ignore_index, reduction == "mean", shaping)


def plain_forward(
    logits: Tensor,
    labels: Tensor,
    denominator: Tensor | None,
    ignore_index: int,
    mean: bool,
    *shaping: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, the two parts of lse, and divisor, in plain torch."""
    form = Shaping(*shaping)
    divisor = find_divisor(labels, denominator, ignore_index, mean, wide_dtype(logits.dtype))
    z, _ = shape_plainly(logits, form, divisor.dtype)
    lse = plain_statistics(z)
    z_weight = find_z_weight(divisor, labels.shape[0], form)
    losses = plain_losses("cross_entropy", z, labels, lse, z_weight, ignore_index, form)
    if not form.reads_ignored_rows:
        lse = torch.where(labels != ignore_index, lse, 0.0)
    return losses.sum() / divisor, lse, divisor


def plain_backward(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    divisor: Tensor,
    ignore_index: int,
    *shaping: Any,
) -> Tensor:
    """Return the gradient of logits, in plain torch."""
    form = Shaping(*shaping)
    z, tanh = shape_plainly(logits, form, lse.dtype)
    z_weight = find_z_weight(divisor, labels.shape[0], form)
    dlogits = plain_gradient(z, tanh, labels, lse, z_weight, ignore_index, form)
    divided = dlogits * (dloss / divisor)
    if not form.reads_ignored_rows:  # 0 / 0 where every row is ignored
        divided = torch.where((labels != ignore_index).unsqueeze(-1), divided, 0.0)
    return divided.to(logits.dtype).contiguous()
