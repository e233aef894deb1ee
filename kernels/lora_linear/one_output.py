"""The result of one of several layers alone, for a backward pass that reads it and saved the others, or none.

It reads what the layer reads and no other layer's weight. Adapters' inner products are those of all layers on plain
torch, so that no bit changes; on a GPU those of the layer alone. Where the result's first rows are known, only the
others are computed, next to a copy of these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.lora_linear.costs import forward_flops, forward_launches, forward_moved, forward_workspace
from fxopt.kernels.lora_linear.extended import extended_forward, extends_forward, multiply
from fxopt.kernels.lora_linear.form import CODE_TENSORS, Form, Weight, read_weights
from fxopt.kernels.lora_linear.products import add_product, as_rows, inner_product


def arguments_of(
    place: int,
    xs: list[Any],
    weights: list[Any],
    biases: list[Any],
    a: list[Any],
    b: list[Any],
    codes: list[Any],
    codings: list[str],
    widths: list[int],
    inputs: list[int],
    owners: list[int],
    scales: list[float],
    out_dtype: torch.dtype,
) -> tuple[Any, ...] | None:
    """Return the arguments of `lora_linear_output` for the layer at `place`, values or nodes as they were given.

    None where its adapters read inputs of their own, or do not lie side by side.
    """
    mine = [number for number, owner in enumerate(owners) if owner == place]
    if any(inputs[number] for number in mine) or mine != list(range(mine[0], mine[-1] + 1) if mine else ()):
        return None
    return (
        xs[:1],
        [weights[place]],
        [biases[place]],
        a[:1],
        b[: mine[-1] + 1] if mine else [],
        codes[place * CODE_TENSORS : (place + 1) * CODE_TENSORS],
        [codings[place]],
        [widths[place]],
        [scales[number] for number in mine],
        out_dtype,
    )


def run_output(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    codes: list[Tensor | None],
    codings: list[str],
    widths: list[int],
    scales: list[float],
    out_dtype: torch.dtype,
    *,
    known: Tensor | None = None,
) -> Tensor:
    """Return the layer's result. `b` ends with the factors of its adapters, as many as `scales`; others come before.

    `known`: [T', N] in `out_dtype`, the first of the result's rows, all dimensions but the last counted as one.
    """
    (x,), (width,) = xs, widths
    rows = as_rows(x)
    num_known = 0 if known is None else known.shape[0]
    result = rows.new_empty((rows.shape[0], width), dtype=out_dtype)
    if known is not None:
        result[:num_known].copy_(known)
    with torch.autocast(x.device.type, enabled=False):
        (layer,) = read_weights(x, weights, codes, codings, widths)
        _write(result[num_known:], rows[num_known:], layer, biases[0], a[0], b, scales)
    return result.view(*x.shape[:-1], width)


def _write(
    out: Tensor,
    rows: Tensor,
    layer: Weight,
    bias: Tensor | None,
    a: Tensor,
    b: list[Tensor],
    scales: list[float],
) -> None:
    """Write the layer's result for `rows` to `out`."""
    stops = [0]
    for factor in b:
        stops.append(stops[-1] + factor.shape[1])
    first = len(b) - len(scales)
    mine = b[first:]
    form = Form((0,) * len(mine), (0,) * len(mine), tuple(scales), out.dtype)
    own = a[stops[first] : stops[-1]]
    if extends_forward(rows, [layer], own, mine, form):
        extended_forward(rows, [layer], [bias], own, mine, form, out)
        return
    weight = layer.dense()
    if weight.dtype == out.dtype:
        multiply(rows, weight, bias, out)
    else:
        out.copy_(multiply(rows, weight, bias))
    inner = inner_product(rows, a) if mine else None
    for number, (factor, scale) in enumerate(zip(mine, scales, strict=True), first):
        assert inner is not None
        add_product(out, inner[:, stops[number] : stops[number + 1]], factor.t(), scale)


def copy_rows(y: Tensor) -> Tensor:
    """Return a copy of rows of a result, [T', N], that is kept for `known`.

    An op of its own: of rows that lie side by side Inductor takes `aten.clone` away, and all of the result is kept.
    """
    return y.clone(memory_format=torch.contiguous_format)


def fake_output(xs: list[Tensor], *arguments: Any, known: Tensor | None = None) -> Tensor:
    """Return fresh memory for the result."""
    (width,), dtype = arguments[6], arguments[8]
    return xs[0].new_empty((*xs[0].shape[:-1], width), dtype=dtype)


def output_flops(*arguments: Any, known: Tensor | None = None) -> int:
    """Count the products with the weight and with both factors of each adapter."""
    return forward_flops(*_whole(known, *arguments))


def output_workspace(*arguments: Any, known: Tensor | None = None) -> int:
    """Return the bytes of longer rows and the weight beside them, or of one that is decoded."""
    return forward_workspace(*_whole(known, *arguments))


def output_moved(*arguments: Any, known: Tensor | None = None) -> int:
    """Return the bytes of decoding, of reading x for the adapters, of longer rows or of sums, and of copying."""
    copied = 0 if known is None else 2 * known.numel() * known.element_size()
    return forward_moved(*_whole(known, *arguments)) + copied


def output_launches(*arguments: Any, known: Tensor | None = None) -> int:
    """Return the kernels of one layer's forward, and of the copy."""
    return forward_launches(*_whole(known, *arguments)) + (known is not None)


def _whole(known: Tensor | None, *arguments: Any) -> tuple[Any, ...]:
    """Return the arguments of a `lora_linear` of this layer alone, for the rows that are not known."""
    *lists, scales, out_dtype = arguments
    a, b = lists[3], lists[4]
    mine = b[len(b) - len(scales) :]
    rank = sum(factor.shape[1] for factor in mine)
    lists[3:5] = [a[0][:rank]], mine
    if known is not None:
        lists[0] = [as_rows(lists[0][0])[known.shape[0] :]]
    return (*lists, [0] * len(mine), [0] * len(mine), scales, out_dtype)
