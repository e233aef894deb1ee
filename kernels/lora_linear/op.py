"""The op `fxopt::lora_linear`, its backward op, and the function that patterns call.

The ops also take four-bit weights as they are stored: `weights[j]` then holds packed codes, `codings[j]` their type and
block size, and `codes` four tensors of each layer. A compiled graph is told so where it decodes a weight for these
ops alone; `widths` are the layers' output widths. `fxopt::lora_linear_output` computes one layer's result alone,
or the rows of it behind those that are `known`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.launch import Declared, register_gradient, register_op
from fxopt.kernels.lora_linear.backward import run_backward
from fxopt.kernels.lora_linear.costs import (
    backward_flops,
    backward_launches,
    backward_moved,
    backward_workspace,
    forward_flops,
    forward_launches,
    forward_moved,
    forward_workspace,
)
from fxopt.kernels.lora_linear.form import CODE_TENSORS, Form, split_lists
from fxopt.kernels.lora_linear.forward import run_forward
from fxopt.kernels.lora_linear.one_output import (
    arguments_of,
    copy_rows,
    fake_output,
    output_flops,
    output_launches,
    output_moved,
    output_workspace,
    run_output,
)


def _fake_forward(xs: list[Tensor], *arguments: Any) -> list[Tensor]:
    leading, widths, dtype = xs[0].shape[:-1], arguments[6], arguments[-1]
    return [xs[0].new_empty((*leading, width), dtype=dtype) for width in widths]


def fake_backward(
    dys: list[Tensor],
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    *attributes: Any,
) -> list[Tensor]:
    """Return fresh memory for the gradients that are needed."""
    tensors, needs = (*xs, *weights, *biases, *a, *b), attributes[-1]
    return [
        tensor.new_empty(tensor.shape)
        for tensor, needed in zip(tensors, needs, strict=True)
        if needed and tensor is not None
    ]


_TENSORS = (
    "Tensor[] xs, Tensor[] weights, Tensor?[] biases, Tensor[] a, Tensor[] b, "
    "Tensor?[] codes, str[] codings, int[] widths"
)
_ATTRIBUTES = "int[] inputs, int[] owners, float[] scales"
_forward_op = register_op(
    f"lora_linear({_TENSORS}, {_ATTRIBUTES}, ScalarType out_dtype) -> Tensor[]",
    plain=run_forward,
    fused=run_forward,
    fake=_fake_forward,
    flops=forward_flops,
    declared=Declared(
        workspace=forward_workspace,
        moved=forward_moved,
        rows=("xs",),
        launches=forward_launches,
        output=arguments_of,
    ),
)
_known_op = register_op(
    "lora_linear_known(Tensor y) -> Tensor", plain=copy_rows, fused=copy_rows, fake=copy_rows
)
register_op(
    f"lora_linear_output({_TENSORS}, float[] scales, ScalarType out_dtype, *, Tensor? known=None) -> Tensor",
    plain=run_output,
    fused=run_output,
    fake=fake_output,
    flops=output_flops,
    declared=Declared(
        workspace=output_workspace,
        moved=output_moved,
        rows=("xs",),
        launches=output_launches,
        known=_known_op,
    ),
)
_backward_op = register_op(
    f"lora_linear_backward(Tensor[] dys, {_TENSORS}, {_ATTRIBUTES}, bool[] needs) -> Tensor[]",
    plain=run_backward,
    fused=run_backward,
    fake=fake_backward,
    flops=backward_flops,
    declared=Declared(
        workspace=backward_workspace, moved=backward_moved, rows=("dys", "xs"), launches=backward_launches
    ),
)


def _dense(weights: Sequence[Tensor]) -> tuple[list[Tensor | None], list[str], list[int]]:
    """Return codes, codings and widths of dense weights."""
    return (
        [None] * (CODE_TENSORS * len(weights)),
        [""] * len(weights),
        [weight.shape[0] for weight in weights],
    )


def _run_forward(form: Form, num_inputs: int, num_layers: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    lists = split_lists(tensors, num_inputs, num_layers)
    return tuple(_forward_op(*lists, *_dense(lists[1]), *map(list, form[:3]), form.out_dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.form, ctx.num_inputs, ctx.num_layers, *tensors = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
    needs = [bool(needed) for needed in ctx.needs_input_grad[3:]]
    lists = split_lists(ctx.saved_tensors, ctx.num_inputs, ctx.num_layers)
    found = iter(_backward_op(list(dys), *lists, *_dense(lists[1]), *map(list, ctx.form[:3]), needs))
    return None, None, None, *(next(found) if needed else None for needed in needs)


_apply = register_gradient("lora_linear", _run_forward, _setup_context, _differentiate)


def lora_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *,
    owners: Sequence[int],
    scales: Sequence[float],
    dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Return the results of the layers of `weights` on x, each with the adapters that it owns.

    x: [*, K]. weights: [N_j, K]; biases: [N_j] or None. Adapter i reads `inputs[i]` ([*, K]; None for x) and adds
    `scales[i]` times its product with a[i] ([r_i, K]) and b[i] ([N, r_i]) to the layer `owners[i]`. Layers compute in
    `dtype`, adapters in `adapter_dtype` (the dtypes of x and of a[0] if not given), results are in `out_dtype`.

    >>> x, weight = torch.ones(1, 2), torch.eye(2)
    >>> a, b = torch.ones(1, 2), torch.ones(2, 1)
    >>> lora_linear(x, [weight], [None], [None], [a], [b], owners=[0], scales=[0.5])[0]
    tensor([[2., 2.]])
    """
    if not a or not len(inputs) == len(a) == len(b) == len(owners) == len(scales):
        counts = [len(items) for items in (inputs, a, b, owners, scales)]
        raise ValueError(
            f"lora_linear: expected as many inputs, a, b, owners and scales, one or more, got {counts}"
        )
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"lora_linear: expected a bias or None per weight, got {len(weights)}, {len(biases)}"
        )
    dtype, adapter_dtype = dtype or x.dtype, adapter_dtype or a[0].dtype
    own = list({id(item): item for item in inputs if item is not None}.values())
    sources = [0 if item is None else 1 + next(p for p, o in enumerate(own) if o is item) for item in inputs]
    order = sorted(range(len(a)), key=lambda place: sources[place])
    form = Form(
        tuple(sources[place] for place in order),
        tuple(owners[place] for place in order),
        tuple(float(scales[place]) for place in order),
        out_dtype or dtype,
    )
    joined: list[Tensor] = []
    for source in range(1 + len(own)):
        members = [a[place] for place in order if sources[place] == source]
        factor = torch.cat(members) if len(members) > 1 else members[0] if members else a[0][:0]
        joined.append(factor.to(adapter_dtype))
    return _apply(
        form,
        1 + len(own),
        len(weights),
        x.to(dtype),
        *(item.to(adapter_dtype) for item in own),
        *(weight.to(dtype) for weight in weights),
        *(bias if bias is None else bias.to(dtype) for bias in biases),
        *joined,
        *(b[place].to(adapter_dtype) for place in order),
    )
