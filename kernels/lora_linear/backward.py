"""The gradients of all that needs one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxopt.kernels.lora_linear.extended import extended_backward, extends_backward
from fxopt.kernels.lora_linear.form import Form, Weight, read_weights, split_lists
from fxopt.kernels.lora_linear.one_read import launch_narrow_products, reads_once
from fxopt.kernels.lora_linear.products import (
    add_product,
    as_rows,
    inner_product,
    sum_product,
    write_product,
)


@dataclasses.dataclass
class Products:
    """Narrow products of a backward, as far as they are known; those of an input by its place."""

    outer: dict[int, Tensor] = dataclasses.field(default_factory=dict[int, Tensor])
    """scale dY B of the adapters of an input."""
    inner: dict[int, Tensor] = dataclasses.field(default_factory=dict[int, Tensor])
    """x A^T of an input."""
    sums_of_x: dict[int, Tensor] = dataclasses.field(default_factory=dict[int, Tensor])
    """The gradient of A of an input."""
    sums: dict[int, Tensor] = dataclasses.field(default_factory=dict[int, Tensor])
    """The gradient of B by the adapter's place."""


def run_backward(
    dys: list[Tensor],
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    codes: list[Tensor | None],
    codings: list[str],
    widths: list[int],
    inputs: list[int],
    owners: list[int],
    scales: list[float],
    needs: list[bool],
    known: Products | None = None,
) -> list[Tensor]:
    """Return the gradients that are needed of xs, weights, biases, a and b, in this order.

    Where only those of xs are, nothing of xs is read but shape and dtype; nor where `known` has all narrow products of
    x. What it has is not computed again.
    """
    known = known or Products()
    outer, inner, sums, sums_of_x = known.outer, known.inner, known.sums, known.sums_of_x
    form = Form(tuple(inputs), tuple(owners), tuple(scales), dys[0].dtype)
    need_xs, need_weights, need_biases, need_a, need_b = split_lists(needs, len(xs), len(weights))
    found: list[Tensor] = []
    with torch.autocast(xs[0].device.type, enabled=False):
        rows = [as_rows(x) for x in xs]
        layers = read_weights(xs[0], weights, codes, codings, widths)
        dy_rows = [as_rows(dy).to(layer.dtype) for dy, layer in zip(dys, layers, strict=True)]
        places = list(form.places(b))

        def read_inner(source: int) -> Tensor:
            if source not in inner:
                inner[source] = inner_product(rows[source], a[source])
            return inner[source]

        dx: dict[int, Tensor] = {}
        if need_xs[0] and 0 not in outer and extends_backward(rows[0], dy_rows, layers, a[0], form):
            dx[0], outer[0] = extended_backward(dy_rows, layers, a[0], b, form)
        for source, needed in enumerate(zip(need_xs, need_a, strict=True)):
            if source not in outer and any(needed):
                columns = [part if read == source else None for read, part in places]
                left = functools.partial(read_inner, source) if any(need_b) else None
                outer[source] = _outer_products(dy_rows, a[source], b, columns, form, left, sums)
        for source, x in enumerate(rows):
            # x in one read, where no gradient was: its product with A, and the gradient of A
            if not (any(need_b) and need_a[source]) or source in inner:
                continue
            factor = a[source].t()
            if reads_once(x, factor, outer[source]):
                inner[source] = torch.empty_like(outer[source], memory_format=torch.contiguous_format)
                found_of_x = launch_narrow_products(x, factor, outer[source], 1.0, inner[source])
                sums_of_x[source] = found_of_x.t().contiguous()
        for source, x in enumerate(rows):
            if need_xs[source]:
                if source not in dx:
                    own = [] if source else dy_rows
                    dx[source] = _input_gradient(x, own, layers, outer[source], a[source])
                found.append(dx[source].view(xs[source].shape))
        for weight, dy, needed in zip(weights, dy_rows, need_weights, strict=True):
            if needed:
                found.append(sum_product(dy, rows[0]).to(weight.dtype))
        for bias, dy, needed in zip(biases, dys, need_biases, strict=True):
            if needed and bias is not None:
                wide = torch.promote_types(dy.dtype, torch.float32)
                found.append(as_rows(dy).sum(0, dtype=wide).to(bias.dtype))
        for source, needed in enumerate(need_a):
            if source in sums_of_x:
                found.append(sums_of_x[source])
            elif needed:
                found.append(sum_product(outer[source], rows[source]))
        for place, (source, columns) in enumerate(places):
            if need_b[place] and place in sums:
                found.append(sums[place])
            elif need_b[place]:
                factor = sum_product(read_inner(source)[:, columns], dy_rows[owners[place]], scales[place])
                found.append(factor.t().contiguous())
    return found


def _outer_products(
    dys: Sequence[Tensor],
    a: Tensor,
    b: Sequence[Tensor],
    columns: Sequence[slice | None],
    form: Form,
    inner: Callable[[], Tensor] | None,
    sums: dict[int, Tensor],
) -> Tensor:
    """Return scale dY B of the adapters that have columns, joined.

    inner() is x A^T of these, where gradients of B are needed; `sums` takes those that one read of dY gives too.
    """
    out = a.new_empty((dys[0].shape[0], a.shape[0]))
    parts = zip(columns, form.owners, form.scales, b, strict=True)
    for place, (part, owner, scale, factor) in enumerate(parts):
        if part is None:
            continue
        if inner is not None and reads_once(dys[owner], factor, out[:, part]):
            sums[place] = launch_narrow_products(dys[owner], factor, inner()[:, part], scale, out[:, part])
        else:
            write_product(out[:, part], dys[owner], factor, scale)
    return out


def _input_gradient(
    x: Tensor, dys: Sequence[Tensor], weights: Sequence[Weight], outer: Tensor, a: Tensor
) -> Tensor:
    """Return the gradient of one input: through the layers, each product added to the last, and the adapters.

    In one dtype the adapters' narrow product comes first: it writes, and the layers' own products add to it.
    """
    dx = x.new_empty(x.shape)
    beta = 0
    starts = a.shape[0] > 0 and x.dtype == a.dtype == outer.dtype
    if starts:
        write_product(dx, outer, a)
        beta = 1
    for dy, weight in zip(dys, weights, strict=False):
        torch.addmm(dx, dy, weight.dense(), beta=beta, out=dx)
        beta = 1
    if not beta:
        dx.zero_()
    if a.shape[0] and not starts:
        add_product(dx, outer, a)
    return dx
