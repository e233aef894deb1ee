"""The two ops that the experts are made of, their backward ops, and the function that patterns call.

`fxopt::experts_up` computes a, `fxopt::experts_down` the rest: a plan may have the first computed again in backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.activations import check_activation
from fxopt.kernels.experts.launches import (
    launch_down,
    launch_down_backward,
    launch_up,
    launch_up_backward,
)
from fxopt.kernels.experts.order import order_of
from fxopt.kernels.experts.reference import (
    plain_down,
    plain_down_backward,
    plain_up,
    plain_up_backward,
)
from fxopt.kernels.glu import LAYOUTS, Form
from fxopt.kernels.launch import Declared, can_launch, register_gradient, register_op

ORDER_TENSORS = 3


def _without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` as it computes where autocast is on: the op's own products are in the dtypes it is given."""

    def run_without(first: Tensor, *others: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return run(first, *others)

    return run_without


def _fused_up(x: Tensor, w: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return (launch_up if can_launch(x, w, bias) else plain_up)(x, w, bias, *rest)


def _fused_up_backward(da: Tensor, x: Tensor, w: Tensor, *rest: Any) -> Any:
    return (launch_up_backward if can_launch(da, x, w) else plain_up_backward)(da, x, w, *rest)


def _fused_down(a: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor, *rest: Any) -> Tensor:
    run = launch_down if can_launch(a, w, bias, weights, out_dtype=rest[-1]) else plain_down
    return run(a, w, bias, weights, *rest)


def _fused_down_backward(
    dy: Tensor, a: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor, *rest: Any
) -> Any:
    run = launch_down_backward if can_launch(dy, a, w, bias, weights) else plain_down_backward
    return run(dy, a, w, bias, weights, *rest)


def _new_up(x: Tensor, w: Tensor, bias: Tensor | None, rows: Tensor, *rest: Any) -> Tensor:
    return w.new_empty((rows.shape[0], w.shape[-1]))


def _new_up_gradients(da: Tensor, x: Tensor, w: Tensor, *rest: Any) -> Any:
    *_, need_x, need_w, need_bias = rest
    return (
        x.new_empty(x.shape) if need_x else None,
        torch.empty_like(w) if need_w else None,
        w.new_empty((w.shape[0], w.shape[-1])) if need_bias else None,
    )


def _new_down(a: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor, *rest: Any) -> Tensor:
    *_, num_tokens, dtype = rest
    return w.new_empty((num_tokens, w.shape[-1]), dtype=dtype)


def _new_down_gradients(
    dy: Tensor, a: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor, *rest: Any
) -> Any:
    *_, need_a, need_w, need_bias, need_weights = rest
    return (
        torch.empty_like(a) if need_a else None,
        torch.empty_like(w) if need_w else None,
        None if bias is None or not need_bias else bias.new_empty(bias.shape),
        weights.new_empty(weights.shape) if need_weights else None,
    )


def _product_flops(num_rows: int, w: Tensor) -> int:
    return 2 * num_rows * w.shape[1] * w.shape[2]


def _up_flops(x: Tensor, w: Tensor, bias: Any, rows: Tensor, *rest: Any) -> int:
    return _product_flops(rows.numel(), w)


def _down_flops(a: Tensor, w: Tensor, *rest: Any) -> int:
    return _product_flops(a.shape[0], w)


def _up_backward_flops(da: Tensor, x: Tensor, w: Tensor, *rest: Any) -> int:
    *_, need_x, need_w, _ = rest
    return _product_flops(da.shape[0], w) * (need_x + need_w)


def _down_backward_flops(dy: Tensor, a: Tensor, w: Tensor, bias: Any, weights: Any, *rest: Any) -> int:
    *_, need_a, need_w, _, need_weights = rest
    return _product_flops(a.shape[0], w) * ((need_a or need_weights) + need_w)


def _up_workspace(x: Tensor, w: Tensor, bias: Any, rows: Tensor, *rest: Any) -> int:
    """Return the bytes of the tokens' rows in order, which torch's product needs."""
    return rows.numel() * w.shape[1] * w.element_size()


def _up_backward_workspace(da: Tensor, x: Tensor, w: Tensor, *rest: Any) -> int:
    """Return the bytes of one value per row and column of x: first its gradients, then its copies in order."""
    return da.shape[0] * w.shape[1] * w.element_size()


def _down_workspace(a: Tensor, w: Tensor, *rest: Any) -> int:
    """Return the bytes of the unit and of the second products."""
    return a.shape[0] * (w.shape[1] + w.shape[2]) * w.element_size()


def _down_backward_workspace(dy: Tensor, a: Tensor, w: Tensor, *rest: Any) -> int:
    """Return the bytes of the unit's gradient or of the unit, both at once in one kernel, and of dy's rows in order."""
    return a.shape[0] * (max(2 * w.shape[1], w.shape[1] + w.shape[2])) * w.element_size()


_ORDER = "Tensor rows, Tensor places, Tensor ends"
_ATTRIBUTES = (
    "str act, float alpha, float gate_scale, float? gate_limit, float? up_limit, float up_offset, float scale, "
    "str layout, bool gate_first"
)
up_op = register_op(
    f"experts_up(Tensor x, Tensor w, Tensor? bias, {_ORDER}) -> Tensor",
    plain=_without_autocast(plain_up),
    fused=_without_autocast(_fused_up),
    fake=_new_up,
    flops=_up_flops,
    declared=Declared(workspace=_up_workspace),
)
up_backward_op = register_op(
    f"experts_up_backward(Tensor da, Tensor x, Tensor w, {_ORDER}, bool need_x, bool need_w, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
    plain=_without_autocast(plain_up_backward),
    fused=_without_autocast(_fused_up_backward),
    fake=_new_up_gradients,
    flops=_up_backward_flops,
    declared=Declared(workspace=_up_backward_workspace),
)
down_op = register_op(
    f"experts_down(Tensor a, Tensor w, Tensor? bias, Tensor weights, {_ORDER}, {_ATTRIBUTES}, "
    "SymInt num_tokens, ScalarType dtype) -> Tensor",
    plain=_without_autocast(plain_down),
    fused=_without_autocast(_fused_down),
    fake=_new_down,
    flops=_down_flops,
    declared=Declared(workspace=_down_workspace),
)
down_backward_op = register_op(
    f"experts_down_backward(Tensor dy, Tensor a, Tensor w, Tensor? bias, Tensor weights, {_ORDER}, {_ATTRIBUTES}, "
    "bool need_a, bool need_w, bool need_bias, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor)",
    plain=_without_autocast(plain_down_backward),
    fused=_without_autocast(_fused_down_backward),
    fake=_new_down_gradients,
    flops=_down_backward_flops,
    declared=Declared(workspace=_down_backward_workspace),
)


def _save_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, _, *order = inputs
    ctx.save_for_backward(x, w, *order)


def _differentiate_up(ctx: Any, da: Tensor) -> tuple[Any, ...]:
    found = up_backward_op(da.contiguous(), *ctx.saved_tensors, *ctx.needs_input_grad[:3])
    return *found, *(None for _ in range(ORDER_TENSORS))


def _save_down(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: 4 + ORDER_TENSORS])
    ctx.attributes = inputs[4 + ORDER_TENSORS : -2]


def _differentiate_down(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    found = down_backward_op(dy, *ctx.saved_tensors, *ctx.attributes, *ctx.needs_input_grad[:4])
    return *found, *(None for _ in range(ORDER_TENSORS + len(ctx.attributes) + 2))


_apply_up = register_gradient("experts_up", up_op, _save_up, _differentiate_up)
_apply_down = register_gradient("experts_down", down_op, _save_down, _differentiate_down)


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    act: str,
    alpha: float = 1.0,
    gate_scale: float = 1.0,
    gate_limit: float | None = None,
    up_limit: float | None = None,
    up_offset: float = 0.0,
    scale: float = 1.0,
    layout: str = "packed",
    gate_first: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return [T, H], the weighed sum of each token's experts, in `dtype` (that of x if not given).

    x: [T, H]; ids: [T * K] or [T, K], integers; weights: as many floats. w_up: [E, H, 2 I] and w_down: [E, I, H] in any
    layout, b_up: [E, 2 I], b_down: [E, H], all in one float dtype.

    >>> x, up, down = torch.ones(1, 1), torch.ones(2, 1, 2), torch.tensor([[[1.0]], [[10.0]]])
    >>> experts(x, torch.tensor([1, 0]), torch.tensor([0.5, 0.5]), up, down, act="relu")
    tensor([[5.5000]])
    """
    check_activation("experts", act)
    if layout not in LAYOUTS[1:]:
        raise ValueError(f"experts: layout, expected one of {LAYOUTS[1:]}, got {layout!r}")
    num_experts, width, both = w_up.shape
    if x.dim() != 2 or x.shape[1] != width or w_down.shape[:2] != (num_experts, both // 2) or both % 2:
        shapes = [tuple(value.shape) for value in (x, w_up, w_down)]
        raise ValueError(f"experts: expected x [T, H], w_up [E, H, 2 I], w_down [E, I, H], got {shapes}")
    if {value.dtype for value in (w_up, w_down, b_up, b_down) if value is not None} != {w_up.dtype}:
        raise ValueError(
            f"experts: weights and biases, expected one dtype, got {w_up.dtype} and {w_down.dtype}"
        )
    form = Form(act, alpha, gate_scale, gate_limit, up_limit, up_offset, scale, layout, gate_first)
    order = order_of(ids.reshape(-1), num_experts)
    a = _apply_up(x, w_up, b_up, *order)
    return _apply_down(
        a, w_down, b_down, weights.reshape(-1), *order, *form.astuple(), x.shape[0], dtype or x.dtype
    )
