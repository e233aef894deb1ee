"""What the experts compute: the reference in plain torch, and the two halves of the op with their gradients."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.experts.order import Order
from fxopt.kernels.glu import Form, glu_reference
from fxopt.kernels.glu.reference import plain_backward as glu_backward
from fxopt.kernels.glu.reference import plain_forward as glu_forward
from fxopt.kernels.launch import wide_dtype


def experts_reference(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    **attributes: Any,
) -> Tensor:
    """Return the sum of each token's experts, differentiable, in plain torch: the specification.

    x: [T, H]; ids, weights: [T * K] or [T, K]; w_up: [E, H, 2 I]; w_down: [E, I, H]; biases: [E, 2 I] and [E, H].
    """
    form: Any = {"layout": "packed"} | attributes
    num_tokens, num_choices = x.shape[0], ids.numel() // x.shape[0]
    wide = wide_dtype(w_up.dtype)
    token = torch.arange(num_tokens, device=x.device).repeat_interleave(num_choices)
    total = torch.zeros(num_tokens, w_down.shape[-1], dtype=wide, device=x.device)
    for expert in range(w_up.shape[0]):
        chosen = (ids.reshape(-1) == expert).nonzero()[:, 0]
        a = x[token[chosen]].to(w_up.dtype) @ w_up[expert]
        if b_up is not None:
            a = (a.to(wide) + b_up[expert].to(wide)).to(w_up.dtype)
        out = (glu_reference(a, **form).to(w_down.dtype) @ w_down[expert]).to(wide)
        if b_down is not None:
            out = out + b_down[expert].to(wide)
        total = total.index_add(0, token[chosen], out * weights.reshape(-1)[chosen, None].to(wide))
    return total.to(dtype or x.dtype)


def groups_of(order: Order) -> Iterator[tuple[int, slice]]:
    """Yield each expert with rows, and its rows; waits for the device, which on a CPU is none."""
    start = 0
    for expert, end in enumerate(order.ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def plain_up(x: Tensor, w: Tensor, bias: Tensor | None, *order: Tensor) -> Tensor:
    """Return the first products, in order of the experts; rows of no expert, which nobody reads, are zeros here."""
    rows, _, _ = found = Order(*order)
    num_choices = rows.numel() // max(x.shape[0], 1)
    out = torch.zeros(rows.numel(), w.shape[-1], dtype=w.dtype, device=w.device)
    for expert, group in groups_of(found):
        token = rows[group] // num_choices
        out[group] = x[token].to(w.dtype) @ w[expert]
        if bias is not None:
            out[group] += bias[expert]
    return out


def plain_up_backward(
    da: Tensor, x: Tensor, w: Tensor, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, of the weight and of the bias that are needed."""
    rows, places, ends, need_x, need_w, need_bias = rest
    order = Order(rows, places, ends)
    num_choices = rows.numel() // max(x.shape[0], 1)
    wide = wide_dtype(w.dtype)
    dx = torch.zeros(x.shape, dtype=wide, device=x.device) if need_x else None
    dw = torch.zeros_like(w) if need_w else None
    dbias = w.new_zeros(w.shape[0], w.shape[-1]) if need_bias else None
    for expert, group in groups_of(order):
        token = rows[group] // num_choices
        if dx is not None:
            dx.index_add_(0, token, (da[group] @ w[expert].mT).to(wide))
        if dw is not None:
            dw[expert] = x[token].to(w.dtype).mT @ da[group]
        if dbias is not None:
            dbias[expert] = da[group].to(wide).sum(0)
    return None if dx is None else dx.to(x.dtype), dw, dbias


def plain_down(a: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor, *rest: Any) -> Tensor:
    """Return the weighted sum of the second products over each token's choices."""
    rows, places, ends, *attributes, num_tokens, dtype = rest
    num_choices = rows.numel() // max(num_tokens, 1)
    wide = wide_dtype(w.dtype)
    total = torch.zeros(num_tokens, w.shape[-1], dtype=wide, device=w.device)
    for expert, group in groups_of(Order(rows, places, ends)):
        out = (glu_forward(a[group], None, *attributes) @ w[expert]).to(wide)
        if bias is not None:
            out = out + bias[expert].to(wide)
        choice = rows[group]
        total.index_add_(0, choice // num_choices, out * weights[choice, None].to(wide))
    return total.to(dtype)


def plain_down_backward(
    dy: Tensor, a: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of a, of the weight, of the bias and of the choices' weights that are needed."""
    rows, places, ends, *attributes, need_a, need_w, need_bias, need_weights = rest
    num_choices = rows.numel() // max(dy.shape[0], 1)
    wide = wide_dtype(w.dtype)
    da = torch.zeros_like(a) if need_a else None
    dw = torch.zeros_like(w) if need_w else None
    dbias = torch.zeros_like(bias) if bias is not None and need_bias else None
    dweights = torch.zeros_like(weights) if need_weights else None
    for expert, group in groups_of(Order(rows, places, ends)):
        choice = rows[group]
        given = dy[choice // num_choices].to(w.dtype)
        weight = weights[choice, None].to(wide)
        dunit = (given @ w[expert].mT).to(wide)
        unit = glu_reference(a[group].to(wide), **vars(Form(*attributes).rounded(a, None)))
        if da is not None:
            found, _ = glu_backward((dunit * weight).to(wide), a[group], None, *attributes, True, True)
            assert found is not None
            da[group] = found
        if dw is not None:
            dw[expert] = (unit * weight).to(w.dtype).mT @ given
        if dbias is not None:
            dbias[expert] = (given.to(wide) * weight).sum(0)
        if dweights is not None:
            found = (dunit * unit).sum(-1)
            if bias is not None:
                found = found + given.to(wide) @ bias[expert].to(wide)
            dweights[choice] = found.to(dweights.dtype)
    return da, dw, dbias, dweights
