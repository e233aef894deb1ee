"""Linear layers of one input with low-rank adapters: y_j = x W_j^T + bias_j + sum of scale_i * (x_i A_i^T) B_i^T.

Source: LoRA (Hu et al., 2021). Several layers may share x (q, k and v; gate and up); an adapter belongs to one of
them and reads x, or an input of its own (x after dropout). A decoded four-bit weight is a weight like any other.
Saved for backward: x and the adapters' own inputs, W, A and B; nothing of the products. x A^T is computed again.
Numerics: products accumulate in fp32. The base result is rounded, the adapter's part is added to it in fp32 within
the product with B and the sum is rounded once; stock also rounds the part before and after the factor. In backward
all that flows into x is summed in the products that compute it.

Every product is a GEMM of torch's. The A of all adapters that read one tensor are joined: one product reads it for
all. Where adapters are wider than x, rows are widened a chunk at a time, so no whole copy of an activation exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.launch import register_gradient, register_op

WIDENED_BYTES = 64 * 2**20
"""The most bytes of rows that are held in another dtype at a time."""


class Form(NamedTuple):
    """Which adapter reads which input and belongs to which layer, in the order of the inputs; and the factors."""

    inputs: tuple[int, ...]
    owners: tuple[int, ...]
    scales: tuple[float, ...]
    out_dtype: torch.dtype

    def places(self, b: Sequence[Tensor]) -> Iterator[tuple[int, slice]]:
        """Yield of each adapter its input, and its columns among those of all adapters of that input."""
        starts: dict[int, int] = {}
        for source, factor in zip(self.inputs, b, strict=True):
            start = starts.get(source, 0)
            starts[source] = start + factor.shape[1]
            yield source, slice(start, starts[source])


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[tuple[Tensor, Tensor, Tensor, float]],
) -> Tensor:
    """Return one layer in plain torch: the specification. `adapters` are (input, A, B, scale)."""
    y = torch.nn.functional.linear(x, weight, bias)
    for own, a, b, scale in adapters:
        y = y + (own.to(a.dtype) @ a.t() @ b.t()) * scale
    return y.to(x.dtype)


def _chunks(rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows in `dtype`: all at once where they are, else as many as `WIDENED_BYTES` hold."""
    if rows.dtype == dtype:
        yield slice(None), rows
        return
    step = max(WIDENED_BYTES // (max(rows.shape[1], 1) * dtype.itemsize), 1)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        yield part, rows[part].to(dtype)


def _write_product(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Write scale * left @ right, computed in the dtype of `right`, which is that of `out`."""
    for part, rows in _chunks(left, right.dtype):
        torch.addmm(out[part], rows, right, beta=0, alpha=scale, out=out[part])


def _add_product(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Add scale * left @ right to `out`, in the wider of their dtypes, and round once."""
    if out.dtype == right.dtype == left.dtype:
        out.addmm_(left, right, alpha=scale)
    elif torch.promote_types(out.dtype, right.dtype) == out.dtype:
        out.addmm_(left.to(out.dtype), right.to(out.dtype), alpha=scale)  # as narrow as an adapter
    else:
        for part, rows in _chunks(out, right.dtype):
            out[part] = rows.addmm_(left[part], right, alpha=scale)


def _sum_product(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Return scale * left^T @ right over all rows, in the dtype of `left`."""
    out = left.new_empty((left.shape[1], right.shape[1]))
    beta = 0
    for part, rows in _chunks(right, left.dtype):
        torch.addmm(out, left[part].t(), rows, beta=beta, alpha=scale, out=out)
        beta = 1
    return out if beta else out.zero_()


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _inner_products(xs: Sequence[Tensor], a: Sequence[Tensor]) -> list[Tensor]:
    """Return x A^T of each input with all its adapters."""
    found = [factor.new_empty((x.shape[0], factor.shape[0])) for x, factor in zip(xs, a, strict=True)]
    for out, x, factor in zip(found, xs, a, strict=True):
        _write_product(out, x, factor.t())
    return found


def _forward(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    inputs: list[int],
    owners: list[int],
    scales: list[float],
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """Return the layers' results, by products alone."""
    form = Form(tuple(inputs), tuple(owners), tuple(scales), out_dtype)
    leading = xs[0].shape[:-1]
    with torch.autocast(xs[0].device.type, enabled=False):
        rows = [_rows(x) for x in xs]
        inner = _inner_products(rows, a)
        results: list[Tensor] = []
        for weight, bias in zip(weights, biases, strict=True):
            y = torch.mm(rows[0], weight.t()) if bias is None else torch.addmm(bias, rows[0], weight.t())
            results.append(y.to(out_dtype))
        for (source, columns), owner, scale, factor in zip(form.places(b), owners, scales, b, strict=True):
            _add_product(results[owner], inner[source][:, columns], factor.t(), scale)
    return [y.view(*leading, y.shape[-1]) for y in results]


def _backward(
    dys: list[Tensor],
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    inputs: list[int],
    owners: list[int],
    scales: list[float],
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients that are needed of xs, weights, biases, a and b, in this order."""
    form = Form(tuple(inputs), tuple(owners), tuple(scales), dys[0].dtype)
    need_xs, need_weights, need_biases, need_a, need_b = _split(needs, len(xs), len(weights))
    found: list[Tensor] = []
    with torch.autocast(xs[0].device.type, enabled=False):
        rows = [_rows(x) for x in xs]
        dy_rows = [_rows(dy).to(weight.dtype) for dy, weight in zip(dys, weights, strict=True)]
        outer = [factor.new_empty((x.shape[0], factor.shape[0])) for x, factor in zip(rows, a, strict=True)]
        places = list(form.places(b))
        if any(need_xs) or any(need_a):
            for (source, columns), owner, scale, factor in zip(places, owners, scales, b, strict=True):
                _write_product(outer[source][:, columns], dy_rows[owner], factor, scale)
        for source, x in enumerate(rows):
            if need_xs[source]:
                dx = _input_gradient(x, dy_rows if source == 0 else [], weights, outer[source], a[source])
                found.append(dx.view(xs[source].shape))
        for weight, dy, needed in zip(weights, dy_rows, need_weights, strict=True):
            if needed:
                found.append(_sum_product(dy, rows[0]).to(weight.dtype))
        for bias, dy, needed in zip(biases, dys, need_biases, strict=True):
            if needed and bias is not None:
                found.append(
                    _rows(dy).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(bias.dtype)
                )
        found += [_sum_product(outer[g], rows[g]) for g, needed in enumerate(need_a) if needed]
        if any(need_b):
            inner = _inner_products(rows, a)
            for (source, columns), owner, scale, needed in zip(places, owners, scales, need_b, strict=True):
                if needed:
                    factor = _sum_product(inner[source][:, columns], dy_rows[owner], scale)
                    found.append(factor.t().contiguous())
    return found


def _input_gradient(
    x: Tensor, dys: Sequence[Tensor], weights: Sequence[Tensor], outer: Tensor, a: Tensor
) -> Tensor:
    """Return the gradient of one input: through the layers, each product added to the last, and the adapters."""
    dx = x.new_empty(x.shape)
    beta = 0
    for dy, weight in zip(dys, weights, strict=False):
        torch.addmm(dx, dy, weight, beta=beta, out=dx)
        beta = 1
    if not beta:
        dx.zero_()
    if a.shape[0]:
        _add_product(dx, outer, a)
    return dx


def _split(items: Sequence[Any], num_inputs: int, num_layers: int) -> list[list[Any]]:
    """Return what there is for xs, weights, biases, a and b."""
    lists: list[list[Any]] = []
    start = 0
    for count in (num_inputs, num_layers, num_layers, num_inputs, len(items)):
        lists.append(list(items[start : start + count]))
        start += count
    return lists


def _fake_forward(xs: list[Tensor], weights: list[Tensor], *arguments: Any) -> list[Tensor]:
    leading = xs[0].shape[:-1]
    return [xs[0].new_empty((*leading, weight.shape[0]), dtype=arguments[-1]) for weight in weights]


def _fake_backward(
    dys: list[Tensor],
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    inputs: list[int],
    owners: list[int],
    scales: list[float],
    needs: list[bool],
) -> list[Tensor]:
    tensors = (*xs, *weights, *biases, *a, *b)
    return [
        tensor.new_empty(tensor.shape)
        for tensor, needed in zip(tensors, needs, strict=True)
        if needed and tensor is not None
    ]


def _forward_flops(
    xs: list[Tensor], weights: list[Tensor], biases: Any, a: list[Tensor], b: list[Tensor], *_: Any
) -> int:
    """Count the products with the weights and with both factors of each adapter."""
    rows = xs[0].numel() // xs[0].shape[-1]
    return 2 * rows * sum(factor.numel() for factor in (*weights, *a, *b))


def _backward_flops(
    dys: list[Tensor],
    xs: list[Tensor],
    weights: list[Tensor],
    biases: Any,
    a: list[Tensor],
    b: list[Tensor],
    *_: Any,
) -> int:
    """Count one product per weight, and per factor one for its own gradient and one for its input's; x A^T again."""
    rows = xs[0].numel() // xs[0].shape[-1]
    return 2 * rows * sum(factor.numel() for factor in (*weights, *a, *a, *a, *b, *b))


_TENSORS = "Tensor[] xs, Tensor[] weights, Tensor?[] biases, Tensor[] a, Tensor[] b"
_ATTRIBUTES = "int[] inputs, int[] owners, float[] scales"
_forward_op = register_op(
    f"lora_linear({_TENSORS}, {_ATTRIBUTES}, ScalarType out_dtype) -> Tensor[]",
    plain=_forward,
    fused=_forward,
    fake=_fake_forward,
    flops=_forward_flops,
)
_backward_op = register_op(
    f"lora_linear_backward(Tensor[] dys, {_TENSORS}, {_ATTRIBUTES}, bool[] needs) -> Tensor[]",
    plain=_backward,
    fused=_backward,
    fake=_fake_backward,
    flops=_backward_flops,
)


def _run_forward(form: Form, num_inputs: int, num_layers: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    lists = _split(tensors, num_inputs, num_layers)
    return tuple(_forward_op(*lists, *map(list, form[:3]), form.out_dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.form, ctx.num_inputs, ctx.num_layers, *tensors = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
    needs = [bool(needed) for needed in ctx.needs_input_grad[3:]]
    lists = _split(ctx.saved_tensors, ctx.num_inputs, ctx.num_layers)
    found = iter(_backward_op(list(dys), *lists, *map(list, ctx.form[:3]), needs))
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
