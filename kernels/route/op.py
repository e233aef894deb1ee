"""The op and its backward op, the launches of their kernels, and the function that patterns call."""

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import (
    as_rows,
    can_launch,
    next_power_of_two,
    num_warps_for,
    on_device,
    register_gradient,
    register_op,
)
from fxopt.kernels.launcher import is_rehearsal, launch
from fxopt.kernels.route.form import ATTRIBUTES, Form, check_form
from fxopt.kernels.route.kernels import route_backward_kernel, route_forward_kernel
from fxopt.kernels.route.reference import plain_backward, plain_forward

ELEMENTS_PER_THREAD = 8
MOST_WARPS = 4


def num_warps_of(tile_elements: int) -> int:
    """Return the warps of one token's program."""
    return num_warps_for(tile_elements, ELEMENTS_PER_THREAD, MOST_WARPS)


def tile_of(form: Form, num_experts: int) -> dict[str, int]:
    """Return the sizes of the forward kernel's tiles.

    >>> tile_of(Form("sigmoid", 6, group_size=20, num_kept=3), 160)
    {'BLOCK_GROUPS': 8, 'BLOCK_MEMBERS': 32, 'BLOCK_CHOICES': 8}
    """
    size = form.group_size or num_experts
    sizes = num_experts // size, size, form.num_choices
    names = ("BLOCK_GROUPS", "BLOCK_MEMBERS", "BLOCK_CHOICES")
    return dict(zip(names, map(next_power_of_two, sizes), strict=True))


def launch_forward(logits: Tensor, bias: Tensor | None, *attributes: Any) -> tuple[Tensor, Tensor]:
    """Return the weights and ids by the kernel."""
    form = Form(*attributes)
    weights, ids = _new_outputs(logits, bias, *attributes)
    num_experts = logits.shape[-1]
    if ids.numel() == 0:
        return weights, ids
    if is_rehearsal():
        ids.zero_()  # the kernel will not write them, and on a GPU a wrong index ends the process's use of it
    rows = as_rows(logits)
    tile = tile_of(form, num_experts)
    with on_device(logits):
        launch(
            route_forward_kernel,
            (rows.shape[0],),
            rows,
            None if bias is None else bias.contiguous(),
            weights,
            ids,
            rows.stride(0),
            num_experts,
            form.group_size or num_experts,
            form.eps,
            form.least,
            form.scale,
            SCORE=form.score,
            BY_LOGITS=form.by_logits,
            SCORES_AFTER=form.scores_after,
            HAS_BIAS=bias is not None,
            NUM_CHOICES=form.num_choices,
            NUM_KEPT=form.num_kept if form.group_size else 0,
            GROUP_CHOICES=form.group_choices,
            FILLS_ZERO=form.fills_zero,
            NORMALIZES=form.normalizes,
            SCORES_DTYPE=_name_of(form.scores_dtype),
            CHOICE_DTYPE=_name_of(form.choice_dtype(logits, bias)),
            **tile,
            num_warps=num_warps_of(tile["BLOCK_GROUPS"] * tile["BLOCK_MEMBERS"]),
            enable_fp_fusion=False,  # scores that are equal in stock stay so
        )
    return weights, ids


def launch_backward(dweights: Tensor, logits: Tensor, ids: Tensor, *attributes: Any) -> Tensor:
    """Return the gradient of the logits by the kernel."""
    form = Form(*attributes)
    dlogits = logits.new_empty(logits.shape)
    if ids.numel() == 0:
        return dlogits.zero_()
    rows, num_experts = as_rows(logits), logits.shape[-1]
    experts, choices = next_power_of_two(num_experts), next_power_of_two(form.num_choices)
    with on_device(logits):
        launch(
            route_backward_kernel,
            (rows.shape[0],),
            dweights.contiguous(),
            rows,
            ids,
            dlogits,
            rows.stride(0),
            num_experts,
            form.eps,
            form.least,
            form.scale,
            SCORE=form.score,
            SCORES_AFTER=form.scores_after,
            NUM_CHOICES=form.num_choices,
            NORMALIZES=form.normalizes,
            BLOCK_EXPERTS=experts,
            BLOCK_CHOICES=choices,
            num_warps=num_warps_of(experts * choices),
            enable_fp_fusion=True,  # nothing is compared here
        )
    return dlogits


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _new_outputs(logits: Tensor, bias: Tensor | None, *attributes: Any) -> tuple[Tensor, Tensor]:
    form = Form(*attributes)
    shape = (*logits.shape[:-1], form.num_choices)
    return logits.new_empty(shape, dtype=form.dtype), logits.new_empty(shape, dtype=torch.int64)


def _new_gradient(dweights: Tensor, logits: Tensor, ids: Tensor, *attributes: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _fused_forward(logits: Tensor, bias: Tensor | None, *attributes: Any) -> tuple[Tensor, Tensor]:
    form = Form(*attributes)
    can = can_launch(logits, bias, out_dtype=form.dtype) and form.has_kernel(logits, bias)
    return (launch_forward if can else plain_forward)(logits, bias, *attributes)


def _fused_backward(dweights: Tensor, logits: Tensor, ids: Tensor, *attributes: Any) -> Tensor:
    can = can_launch(dweights, logits) and Form(*attributes).has_kernel(logits, None)
    return (launch_backward if can else _plain_backward)(dweights, logits, ids, *attributes)


def _plain_backward(dweights: Tensor, logits: Tensor, ids: Tensor, *attributes: Any) -> Tensor:
    return plain_backward(dweights, logits, ids, *attributes).to(logits.dtype).contiguous()


forward_op = register_op(
    f"route(Tensor logits, Tensor? bias, {ATTRIBUTES}) -> (Tensor, Tensor)",
    plain=plain_forward,
    fused=_fused_forward,
    fake=_new_outputs,
)
backward_op = register_op(
    f"route_backward(Tensor dweights, Tensor logits, Tensor ids, {ATTRIBUTES}) -> Tensor",
    plain=_plain_backward,
    fused=_fused_backward,
    fake=_new_gradient,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, *ctx.attributes = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])


def _backward(ctx: Any, dweights: Tensor, _: Any) -> tuple[Any, ...]:
    logits, ids = ctx.saved_tensors
    dlogits = backward_op(dweights, logits, ids, *ctx.attributes)
    return dlogits, None, *(None for _ in ctx.attributes)


_apply = register_gradient("route", forward_op, _setup_context, _backward)


def route(logits: Tensor, bias: Tensor | None = None, **attributes: Any) -> tuple[Tensor, Tensor]:
    """Return the weights, in the attribute `dtype`, and the ids (int64) of the chosen experts: [*, K] each.

    logits: [*, E], any float dtype; bias: [E]; attributes: those of `Form`.

    >>> weights, ids = route(torch.tensor([[0.0, 2.0, 1.0]]), score="sigmoid", num_choices=2, normalizes=True)
    >>> weights, ids
    (tensor([[0.5464, 0.4536]]), tensor([[1, 2]]))
    """
    form = Form(**attributes)
    check_form(form, logits)
    if bias is not None and bias.shape != logits.shape[-1:]:
        raise ValueError(f"route: bias, expected one per expert, got {list(bias.shape)}")
    weights, ids = _apply(logits, bias, *form.astuple())
    return weights, ids
