"""The layers' results."""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.kernels.lora_linear.extended import extended_forward, extends_forward, multiply
from fxopt.kernels.lora_linear.form import Form, read_weights
from fxopt.kernels.lora_linear.products import add_product, as_rows, inner_product


def run_forward(
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
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """Return the layers' results: adapters of x within the base's product where that moves less, others added."""
    form = Form(tuple(inputs), tuple(owners), tuple(scales), out_dtype)
    leading = xs[0].shape[:-1]
    with torch.autocast(xs[0].device.type, enabled=False):
        rows = [as_rows(x) for x in xs]
        layers = read_weights(xs[0], weights, codes, codings, widths)
        if is_extended := extends_forward(rows[0], layers, a[0], b, form):
            results = extended_forward(rows[0], layers, biases, a[0], b, form)
        else:
            results = [
                multiply(rows[0], layer.dense(), bias).to(out_dtype)
                for layer, bias in zip(layers, biases, strict=True)
            ]
        inner: dict[int, Tensor] = {}
        for (source, columns), owner, scale, factor in zip(form.places(b), owners, scales, b, strict=True):
            if is_extended and source == 0:
                continue
            if source not in inner:
                inner[source] = inner_product(rows[source], a[source])
            add_product(results[owner], inner[source][:, columns], factor.t(), scale)
    return [y.view(*leading, y.shape[-1]) for y in results]
