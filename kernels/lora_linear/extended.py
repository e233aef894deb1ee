"""Base and adapters as one product of longer rows, and when that moves fewer bytes.

Added one by one, adapters read and write the whole result once more each. Beside the base's rows in one product they
cost a copy of those rows, and, for a dense weight, one of the weight; four-bit codes are decoded next to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxopt.kernels.lora_linear.extend import extend_rows
from fxopt.kernels.lora_linear.form import Form, Weight

ALIGNED = 16
"""Rows of a multiple of this are widened: GEMMs of others are slow as it is."""
PADDING = 64
"""Rows are widened by a multiple of this: in 16 bits each still starts at a cache line, and a tile of a product's inner
dim is full. QLoRA of Qwen2.5-7B, 2 x 4096 tokens, took 480.4 and 480.3 ms with 16 columns, 477.8 and 477.0 with 64."""


def padded(rank: int) -> int:
    """Return the columns that `rank` columns take.

    >>> padded(16), padded(80)
    (64, 128)
    """
    return -(-rank // PADDING) * PADDING


def adapters_of_x(form: Form, b: Sequence[Tensor]) -> list[tuple[int, slice, float, Tensor]]:
    """Return owner, columns, scale and B of each adapter that reads x itself."""
    parts = zip(form.places(b), form.owners, form.scales, b, strict=True)
    return [
        (owner, columns, scale, factor) for (source, columns), owner, scale, factor in parts if not source
    ]


def extends_forward(
    x: Tensor,
    weights: Sequence[Weight],
    a: Tensor,
    b: Sequence[Tensor],
    form: Form,
    *,
    is_copied: bool = True,
) -> bool:
    """Return whether y = [x | scale x A^T] [W | B]^T is possible and moves fewer bytes than sums would.

    `is_copied`: whether rows of x have to be copied for that; else they were written as longer ones.
    """
    adapters = adapters_of_x(form, b)
    owners = [owner for owner, *_ in adapters]
    dtypes = {x.dtype, a.dtype, form.out_dtype, *(weights[owner].dtype for owner in owners)}
    if not owners or owners != sorted(owners) or len(dtypes) > 1 or not is_extensible(x):
        return False
    width = x.shape[1] + padded(a.shape[0])
    added = 2 * x.shape[0] * sum(weights[owner].width for owner in owners)
    copied = sum(weights[owner].width for owner in set(owners) if not weights[owner].coding)
    return moves_less((x.shape[0] * width if is_copied else 0) + 2 * copied * width, added)


def extends_backward(
    x: Tensor, dys: Sequence[Tensor], weights: Sequence[Weight], a: Tensor, form: Form
) -> bool:
    """Return whether dX = [dY | scale dY B] [W ; A] is possible and moves fewer bytes than sums would."""
    dtypes = {x.dtype, a.dtype, *(dy.dtype for dy in dys), *(weight.dtype for weight in weights)}
    if not a.shape[0] or len(dtypes) > 1 or not is_extensible(x):
        return False
    width = padded(a.shape[0]) + sum(weight.width for weight in weights)
    copied = sum(weight.width for weight in weights if not weight.coding)
    added = 2 * x.shape[0] * x.shape[1] * len(weights)  # the first product only writes
    return moves_less(x.shape[0] * width + 2 * copied * x.shape[1], added)


def moves_less(copied: int, added: int) -> bool:
    """Return whether longer rows cost less than sums, by the items that each moves beside the products themselves."""
    return copied < added


def is_extensible(x: Tensor) -> bool:
    """Return whether longer rows would be as aligned as these: on a GPU, whose memory is what bounds such sums.

    Without a device, on meta, it is a GPU that is planned for.
    """
    return x.device.type != "cpu" and x.shape[1] % ALIGNED == 0


def extended_forward(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    a: Tensor,
    b: list[Tensor],
    form: Form,
    out: Tensor | None = None,
) -> list[Tensor]:
    """Return the results of the layers with the adapters that read x, those of inputs of their own left out.

    That of a single layer may be written to `out`.
    """
    in_width, rank = x.shape[1], a.shape[0]
    longer = new_longer(x, rank)
    for columns, scale in _runs_of_scale(adapters_of_x(form, b)):
        stop = longer.shape[1] if columns.stop == rank else in_width + columns.stop
        copy = longer[:, :in_width] if columns.start == 0 else None
        extend_rows(x, a[columns].t(), scale, copy, longer[:, in_width + columns.start : stop])
    return multiply_longer(longer, x, weights, biases, b, form, out)


def new_longer(x: Tensor, rank: int) -> Tensor:
    """Return memory for rows of `x`, [T, K], with `rank` columns more, filled up: [T, K + padded(rank)]."""
    return x.new_empty((x.shape[0], x.shape[1] + padded(rank)))


def multiply_longer(
    longer: Tensor,
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    b: list[Tensor],
    form: Form,
    out: Tensor | None = None,
) -> list[Tensor]:
    """Return the results of the layers on `longer`, [T, K + padded(r)], which is [x | scale x A^T | zeros].

    A layer without an adapter reads `x` alone, which may be a view of `longer`.
    """
    adapters = adapters_of_x(form, b)
    results: list[Tensor] = []
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        mine = [(columns, factor) for owner, columns, _, factor in adapters if owner == index]
        left, right = (
            (longer, _extended_weight(weight, mine, longer.shape[1])) if mine else (x, weight.dense())
        )
        results.append(multiply(left, right, bias, out))
    return results


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias, written to `out` where that is given."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _runs_of_scale(adapters: Sequence[tuple[int, slice, float, Tensor]]) -> Iterator[tuple[slice, float]]:
    """Yield the columns of neighbouring adapters of one scale."""
    start = 0
    for place, (_, columns, scale, _) in enumerate(adapters):
        if place + 1 == len(adapters) or adapters[place + 1][2] != scale:
            yield slice(start, columns.stop), scale
            start = columns.stop


def _extended_weight(weight: Weight, adapters: Sequence[tuple[slice, Tensor]], width: int) -> Tensor:
    factors = [factor for _, factor in adapters]
    tail = factors[0] if len(factors) == 1 else torch.cat(factors, 1)
    out = tail.new_empty((weight.width, width))
    weight.write(out, tail, adapters[0][0].start)
    return out


def extended_backward(
    dys: Sequence[Tensor], weights: Sequence[Weight], a: Tensor, b: Sequence[Tensor], form: Form
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and scale dY B of the adapters that read x, a part of longer rows."""
    adapters = adapters_of_x(form, b)
    rank, base = a.shape[0], sum(weight.width for weight in weights)
    longer = dys[0].new_empty((dys[0].shape[0], base + padded(rank)))
    stack = a.new_empty((longer.shape[1], a.shape[1]))
    start = 0
    for index, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
        weight.write(stack[start : start + weight.width])
        copy = longer[:, start : start + weight.width]
        mine = [adapter[1:] for adapter in adapters if adapter[0] == index]
        if not mine:
            copy.copy_(dy)
        for columns, scale, factor in mine:
            stop = longer.shape[1] if columns.stop == rank else base + columns.stop
            extend_rows(dy, factor, scale, copy, longer[:, base + columns.start : stop])
            copy = None
        start += weight.width
    stack[base : base + rank].copy_(a)
    if rank < padded(rank):
        stack[base + rank :].zero_()
    return torch.mm(longer, stack), longer[:, base : base + rank]
