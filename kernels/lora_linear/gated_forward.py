"""The op `fxopt::glu_layers`: a gated unit and the layer with an adapter that alone reads its value.

On a GPU one kernel writes the value and, behind each row of it, its product with A, so nothing but the layer's own
product reads the value. Such a row is already as `extended` wants it: where the weight is decoded anyway, B is written
beside it, and base and adapter are one product. Elsewhere the two ops run one after the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.glu.form import Form as Unit
from fxopt.kernels.glu.op import ATTRIBUTES as UNIT_ATTRIBUTES
from fxopt.kernels.glu.op import forward_op
from fxopt.kernels.launch import Declared, register_op
from fxopt.kernels.lora_linear.costs import (
    Call,
    forward_flops,
    forward_launches,
    forward_moved,
    forward_workspace,
)
from fxopt.kernels.lora_linear.extend import FEW_ROWS, MOST_RANK, SIXTEEN_BITS
from fxopt.kernels.lora_linear.extended import extends_forward, multiply, multiply_longer, new_longer
from fxopt.kernels.lora_linear.forward import run_forward
from fxopt.kernels.lora_linear.gated_rows import launch_gated_rows, writes_rows_once
from fxopt.kernels.lora_linear.products import add_product, as_rows

NUM_UNIT = len(dataclasses.fields(Unit))
"""Attributes of the unit, before the layer's arguments."""


def _run_apart(gate: Tensor, up: Tensor, *arguments: Any) -> list[Tensor]:
    """Return the layer's result, by the ops for the unit and for the layer."""
    return run_forward([forward_op(gate, up, *arguments[:NUM_UNIT])], *arguments[NUM_UNIT:])


def _run_together(gate: Tensor, up: Tensor, *arguments: Any) -> list[Tensor]:
    """Return the same, the value and its product with A by one kernel where that can be."""
    call = Call([gate], *arguments[NUM_UNIT:])
    gate_rows, up_rows = as_rows(gate), as_rows(up)
    if not _is_plain(call) or not writes_rows_once(gate_rows, up_rows, call.a[0].t()):
        return _run_apart(gate, up, *arguments)
    biases = arguments[NUM_UNIT + 1]
    ((layer,), (a,), (b,), (scale,)) = call.layers, call.a, call.b, call.form.scales
    longer = new_longer(gate_rows, a.shape[0])
    value, products = longer.split([call.in_width, longer.shape[1] - call.in_width], 1)
    with torch.autocast(gate.device.type, enabled=False):
        launch_gated_rows(gate_rows, up_rows, Unit(*arguments[:NUM_UNIT]), a.t(), scale, longer)
        if _is_one_product(call):
            (y,) = multiply_longer(longer, value, [layer], biases, [b], call.form)
        else:
            y = multiply(value, layer.dense(), biases[0])
            add_product(y, products[:, : a.shape[0]], b.t())
    return [y.view(*gate.shape[:-1], y.shape[-1])]


def _is_plain(call: Call) -> bool:
    """Return whether one adapter of x belongs to one layer, and all is in one dtype."""
    if len(call.layers) != 1 or len(call.a) != 1 or len(call.b) != 1 or call.form.inputs != (0,):
        return False
    return {call.a[0].dtype, call.b[0].dtype, call.layers[0].dtype, call.last} == {call.x.dtype}


def _is_one_product(call: Call) -> bool:
    return extends_forward(call.x, call.layers, call.a[0], call.b, call.form, is_copied=False)


def _suits(gate: Tensor, call: Call) -> bool:
    """Return whether one kernel does both on a GPU, as far as dtypes and sizes tell."""
    is_large = call.num_rows >= FEW_ROWS and call.rank <= MOST_RANK
    return is_large and _is_plain(call) and gate.dtype in SIXTEEN_BITS and gate.device.type != "cpu"


def _fake(gate: Tensor, up: Tensor, *arguments: Any) -> list[Tensor]:
    widths, out_dtype = arguments[NUM_UNIT + 6], arguments[-1]
    return [gate.new_empty((*gate.shape[:-1], width), dtype=out_dtype) for width in widths]


def _flops(gate: Any, up: Any, *arguments: Any) -> int:
    """Count the layer's products; the unit's own arithmetic is none of them."""
    return forward_flops([gate], *arguments[NUM_UNIT:])


def _workspace(gate: Tensor, up: Tensor, *arguments: Any) -> int:
    """Return the bytes of the longer rows and of the weight under them, or of the value and of the layer."""
    call, size = Call([gate], *arguments[NUM_UNIT:]), gate.element_size()
    if not _suits(gate, call):
        return gate.numel() * size + forward_workspace([gate], *arguments[NUM_UNIT:])
    width = call.in_width + call.rank
    weight = width * call.layers[0].width if _is_one_product(call) else call.largest_weight
    return size * (width * call.num_rows + weight)


def _moved(gate: Tensor, up: Tensor, *arguments: Any) -> int:
    """Return the bytes of decoding, of both inputs, of the value, and of a copied weight or of the sum."""
    call, size = Call([gate], *arguments[NUM_UNIT:]), gate.element_size()
    if not _suits(gate, call):
        return 3 * gate.numel() * size + forward_moved([gate], *arguments[NUM_UNIT:])
    width = call.in_width + call.rank
    added = 2 * (call.copied * width if _is_one_product(call) else call.num_rows * sum(call.widths))
    return int(call.decoded_bytes + size * (call.num_rows * (2 * call.in_width + width) + added))


def _launches(gate: Tensor, up: Tensor, *arguments: Any) -> int:
    """Return the kernels: of the unit, of a weight that is decoded or copied, of the product and of a sum."""
    call = Call([gate], *arguments[NUM_UNIT:])
    if not _suits(gate, call):
        return 1 + forward_launches([gate], *arguments[NUM_UNIT:])
    return 3 if _is_one_product(call) else 3 + bool(call.layers[0].coding)


register_op(
    f"glu_layers(Tensor gate, Tensor up, {UNIT_ATTRIBUTES}, Tensor[] weights, Tensor?[] biases, Tensor[] a, "
    "Tensor[] b, Tensor?[] codes, str[] codings, int[] widths, int[] inputs, int[] owners, float[] scales, "
    "ScalarType out_dtype) -> Tensor[]",
    plain=_run_apart,
    fused=_run_together,
    fake=_fake,
    flops=_flops,
    declared=Declared(workspace=_workspace, moved=_moved, rows=("gate", "up"), launches=_launches),
)
