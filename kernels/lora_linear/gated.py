"""The op `fxopt::glu_layers_backward`: the backward of a gated unit and of the layers with adapters around it, in part.

`after` is the layer that reads the unit's value, of whose backward the gradient of that value is already there;
`before` are the two that compute gate and up. Their adapters' gradients read the unit, dgate and dup, 3 x [T, N], which
the unit's gradient kernel has in registers: on a GPU one kernel does both (`gated_products`), elsewhere, and where
that is not worth it, the three backward ops run one after the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.glu.form import Form as Unit
from fxopt.kernels.glu.op import ATTRIBUTES as UNIT_ATTRIBUTES
from fxopt.kernels.launch import Declared, InPlace, register_op
from fxopt.kernels.lora_linear.backward import Products, run_backward
from fxopt.kernels.lora_linear.costs import (
    backward_flops,
    backward_launches,
    backward_moved,
    backward_workspace,
)
from fxopt.kernels.lora_linear.extend import SIXTEEN_BITS
from fxopt.kernels.lora_linear.form import split_lists
from fxopt.kernels.lora_linear.gated_products import (
    Narrow,
    gated_parts_bytes,
    launch_gated_products,
    reads_gated_once,
)
from fxopt.kernels.lora_linear.one_read import LEAST_BYTES, MOST_RANK
from fxopt.kernels.lora_linear.op import fake_backward
from fxopt.kernels.lora_linear.products import as_rows, write_product

NUM_UNIT = len(dataclasses.fields(Unit)) + 2
"""Attributes of the unit, and whether the gradients of gate and of up are needed, which they always are here."""
NUM_LAYER = 11
"""Arguments of a layer's backward behind `dys` and `xs`."""


class Layer(NamedTuple):
    """The arguments of a layer's backward behind `dys` and `xs`."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    a: list[Tensor]
    b: list[Tensor]
    codes: list[Tensor | None]
    codings: list[str]
    widths: list[int]
    inputs: list[int]
    owners: list[int]
    scales: list[float]
    needs: list[bool]

    def is_plain(self, dtype: torch.dtype, num_layers: int) -> bool:
        """Return whether each layer has one adapter, of x, whose gradients are needed, and all is in `dtype`.

        A weight that trains reads the unit's value, which is never in memory then.
        """
        if len(self.a) != 1 or self.inputs != [0] * num_layers or self.owners != list(range(num_layers)):
            return False
        _, need_weights, _, need_a, need_b = split_lists(self.needs, 1, num_layers)
        stored = (weight for weight, coding in zip(self.weights, self.codings, strict=True) if not coding)
        is_narrow = all(tensor.dtype == dtype for tensor in (*stored, *self.a, *self.b))
        return is_narrow and all((*need_a, *need_b)) and not any(need_weights)


class Call(NamedTuple):
    """The arguments of the op behind `dy`, `gate` and `up`."""

    unit: tuple[Any, ...]
    dys: list[Tensor]
    after: Layer
    xs: list[Tensor]
    before: Layer


def _read(arguments: tuple[Any, ...]) -> Call:
    unit, layers = arguments[:NUM_UNIT], arguments[NUM_UNIT:]
    dys, *after = layers[: -1 - NUM_LAYER]
    xs, *before = layers[-1 - NUM_LAYER :]
    return Call(unit, dys, Layer(*after), xs, Layer(*before))


def _run_apart(dy: Tensor, gate: Tensor, up: Tensor, *arguments: Any) -> list[Tensor]:
    """Return the gradients that are needed of `after`, then of `before`, by the ops for each."""
    call = _read(arguments)
    dgate, dup, value = torch.ops.fxopt.glu_backward_output(dy, gate, up, *call.unit)
    run = torch.ops.fxopt.lora_linear_backward
    return [*run(call.dys, [value], *call.after), *run([dgate, dup], call.xs, *call.before)]


def _run_together(dy: Tensor, gate: Tensor, up: Tensor, *arguments: Any) -> list[Tensor]:
    """Return the same, by one kernel for the unit and all narrow products of it where that moves less."""
    return _run_over("", dy, gate, up, *arguments)


def _run_over(written: str, dy: Tensor, gate: Tensor, up: Tensor, *arguments: Any) -> list[Tensor]:
    """Return the same; dgate and dup may be written over the "unit", gate and up, or dup over "dy"."""
    call = _read(arguments)
    if not call.after.is_plain(dy.dtype, 1) or not call.before.is_plain(dy.dtype, 2):
        return _run_apart(dy, gate, up, *arguments)
    dy_rows, gate_rows, up_rows = as_rows(dy), as_rows(gate), as_rows(up)
    num_rows = dy_rows.shape[0]
    (after_a,), (a,), (gate_b, up_b) = call.after.a, call.before.a, call.before.b
    value_inner, value_outer = (after_a.new_empty((num_rows, after_a.shape[0])) for _ in range(2))
    inner, outer = (a.new_empty((num_rows, a.shape[0])) for _ in range(2))
    gate_columns, up_columns = slice(0, gate_b.shape[1]), slice(gate_b.shape[1], None)
    narrow = [
        Narrow(after_a.t(), value_outer, value_inner, 1.0),
        Narrow(gate_b, inner[:, gate_columns], outer[:, gate_columns], call.before.scales[0]),
        Narrow(up_b, inner[:, up_columns], outer[:, up_columns], call.before.scales[1]),
    ]
    if not reads_gated_once(dy_rows, gate_rows, up_rows, narrow):
        return _run_apart(dy, gate, up, *arguments)
    with torch.autocast(dy.device.type, enabled=False):
        write_product(value_outer, as_rows(call.dys[0]), call.after.b[0], call.after.scales[0])
        write_product(inner, as_rows(call.xs[0]), a.t())
        memory = {"": (None, None), "unit": (gate_rows, up_rows), "dy": (None, dy_rows)}[written]
        unit = Unit(*call.unit[:-2])
        dgate, dup, sums = launch_gated_products(dy_rows, gate_rows, up_rows, unit, narrow, memory)
    of_value = Products({0: value_outer}, {0: value_inner}, {0: sums[0].t().contiguous()})
    of_pair = Products({0: outer}, {0: inner}, sums={0: sums[1], 1: sums[2]})
    found = run_backward(call.dys, [dy], *call.after, of_value)
    dgate, dup = dgate.view(gate.shape), dup.view(up.shape)
    return [*found, *run_backward([dgate, dup], call.xs, *call.before, of_pair)]


def _fake(dy: Tensor, gate: Tensor, up: Tensor, *arguments: Any) -> list[Tensor]:
    call = _read(arguments)
    assert all(call.unit[-2:])
    return [*fake_backward(call.dys, [dy], *call.after), *fake_backward([gate, up], call.xs, *call.before)]


def _flops(dy: Any, gate: Any, up: Any, *arguments: Any) -> int:
    """Count the products of the gradients that are needed; the unit's own arithmetic is none of them."""
    call = _read(arguments)
    after = backward_flops(call.dys, [dy], *call.after)
    return after + backward_flops([gate, up], call.xs, *call.before)


def _workspace(dy: Tensor, gate: Tensor, up: Tensor, *arguments: Any) -> int:
    """Return the bytes of both gradients, and of the parts of the sums or what comes after them."""
    call = _read(arguments)
    after = backward_workspace(call.dys, [dy], *call.after)
    before = backward_workspace([gate, up], call.xs, *call.before)
    if not _suits(dy, call):
        return max(after, before) + _num_bytes(gate, up, gate)  # the value as well
    ranks = [factor.shape[1] for factor in (*call.after.b, *call.before.b)]
    parts = sum(gated_parts_bytes(as_rows(dy), rank) for rank in ranks)
    return max(parts, after, before) + _num_bytes(gate, up)


def _suits(dy: Tensor, call: Call) -> bool:
    """Return whether one kernel does all on a GPU, as far as dtypes and sizes tell: else nothing is written over."""
    ranks = [factor.shape[1] for factor in (*call.after.b, *call.before.b)]
    is_plain = call.after.is_plain(dy.dtype, 1) and call.before.is_plain(dy.dtype, 2)
    return is_plain and max(ranks) <= MOST_RANK and dy.dtype in SIXTEEN_BITS and _num_bytes(dy) >= LEAST_BYTES


def _workspace_over_unit(dy: Tensor, gate: Tensor, up: Tensor, *arguments: Any) -> int:
    """Return the bytes of the same with dgate and dup written over gate and up."""
    spared = _num_bytes(gate, up) if _suits(dy, _read(arguments)) else 0
    return _workspace(dy, gate, up, *arguments) - spared


def _workspace_over_dy(dy: Tensor, gate: Tensor, up: Tensor, *arguments: Any) -> int:
    """Return the bytes of the same with dup written over dy."""
    spared = _num_bytes(up) if _suits(dy, _read(arguments)) else 0
    return _workspace(dy, gate, up, *arguments) - spared


def _moved(dy: Tensor, gate: Tensor, up: Tensor, *arguments: Any) -> int:
    """Return the bytes of the layers, with the unit's inputs in place of its value and gradients, and of the writes."""
    call = _read(arguments)
    after = backward_moved(call.dys, [dy], *call.after)
    return after + backward_moved([gate, up], call.xs, *call.before) + _num_bytes(gate, up)


def _launches(dy: Tensor, gate: Tensor, up: Tensor, *arguments: Any) -> int:
    """Return the kernels of the layers, the unit's own one in place of each narrow product that it has within it."""
    call = _read(arguments)
    after = backward_launches(call.dys, [dy], *call.after)
    return after + backward_launches([gate, up], call.xs, *call.before)


def _num_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


_LAYER = (
    "Tensor[] {0}_weights, Tensor?[] {0}_biases, Tensor[] {0}_a, Tensor[] {0}_b, Tensor?[] {0}_codes, "
    "str[] {0}_codings, int[] {0}_widths, int[] {0}_inputs, int[] {0}_owners, float[] {0}_scales, bool[] {0}_needs"
)
_LAYERS = (
    f"{UNIT_ATTRIBUTES}, bool need_gate, bool need_up, Tensor[] dys, {_LAYER.format('after')}, Tensor[] before_xs, "
    f"{_LAYER.format('before')}"
)
_RESULTS = 6
"""Of the forms in place, whose results Inductor takes only one by one: of A and B of the layer after the unit, then of
x, of A, and of B of both layers before it."""


def _register_over(written: str, tensors: str, workspace: Any) -> InPlace:
    """Register the form of the op that may write over what `written` names."""

    def run_plain(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_run_apart(*arguments))

    def run_fused(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_run_over(written, *arguments))

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_fake(*arguments))

    results = ", ".join(["Tensor"] * _RESULTS)
    op = register_op(
        f"glu_layers_backward_over_{written}({tensors}, {_LAYERS}) -> ({results})",
        plain=run_plain,
        fused=run_fused,
        fake=fake,
        declared=Declared(workspace=workspace),
    )
    return InPlace(op)


register_op(
    f"glu_layers_backward(Tensor dy, Tensor gate, Tensor up, {_LAYERS}) -> Tensor[]",
    plain=_run_apart,
    fused=_run_together,
    fake=_fake,
    flops=_flops,
    declared=Declared(
        workspace=_workspace,
        moved=_moved,
        rows=("dy", "gate", "up", "dys", "before_xs"),
        launches=_launches,
        in_place=(
            _register_over("unit", "Tensor dy, Tensor(a!) gate, Tensor(b!) up", _workspace_over_unit),
            _register_over("dy", "Tensor(a!) dy, Tensor gate, Tensor up", _workspace_over_dy),
        ),
    ),
)
