"""glu: the kernels and the op against the reference, in every activation and layout."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fxopt.kernels import glu as file
from fxopt.kernels.activations import ACTIVATIONS
from fxopt.kernels.glu import LAYOUTS, Form, glu, glu_reference
from fxopt.kernels.glu.launches import rows_of
from fxopt.kernels.glu.op import backward_op, forward_op
from fxopt.kernels.glu.reference import plain_backward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLACES = (("split", True), ("packed", True), ("packed", False), ("interleaved", True), ("interleaved", False))
FULL = {
    "alpha": 1.702,
    "gate_scale": 0.75,
    "gate_limit": 0.7,
    "up_limit": 0.6,
    "up_offset": 1.0,
    "scale": 1.5,
}
"""Every attribute; limits that cut off about a third."""
LIMITS = {"alpha": 1.702, "gate_limit": 7.0, "up_limit": 7.0, "up_offset": 1.0}
PLAIN = {
    "silu": F.silu,
    "sigmoid_alpha": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


UNITS = [(act, *place) for act, place in itertools.product(ACTIVATIONS, PLACES)]


def spread(values: Sequence[Any], rest: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return every pair of `values` and `rest`: one value for each of the rest, by turns, where not exhaustive."""
    return [
        pytest.param(value, *others, marks=[pytest.mark.exhaustive] * ((at + place) % len(values) != 0))
        for (at, others), (place, value) in itertools.product(enumerate(rest), enumerate(values))
    ]


def stock(*tensors: torch.Tensor, **attributes: Any) -> torch.Tensor:
    """Return the unit as models write it, rounded in between."""
    form = Form(**attributes)
    if form.layout == "split":
        gate, up = tensors
    elif form.layout == "packed":
        gate, up = tensors[0].chunk(2, dim=-1)
    else:
        gate, up = tensors[0][..., ::2], tensors[0][..., 1::2]
    if not form.gate_first:
        gate, up = up, gate
    gate = gate * form.gate_scale if form.gate_scale != 1 else gate
    gate = gate if form.gate_limit is None else gate.clamp(max=form.gate_limit)
    up = up if form.up_limit is None else up.clamp(min=-form.up_limit, max=form.up_limit)
    up = up + form.up_offset if form.up_offset else up
    y = PLAIN[form.act](gate) * up
    return y * form.scale if form.scale != 1 else y


def make(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str = "split"
) -> list[torch.Tensor]:
    """Return what `layout` takes for an output of `shape`."""
    count, width = (2, 1) if layout == "split" else (1, 2)
    shape = (*shape[:-1], shape[-1] * width) if shape else shape
    return [(torch.randn(shape, device=device) * 2).to(dtype).requires_grad_() for _ in range(count)]


def compare(
    tensors: list[torch.Tensor], dy: torch.Tensor, check: Any, gradients: Any, **attributes: Any
) -> None:
    form = Form(**attributes)
    exact_y, exact = gradients(functools.partial(glu_reference, **attributes), tensors, dy, torch.float64)
    eager_y, eager = gradients(functools.partial(stock, **attributes), tensors, dy)
    both = (*tensors, None)[:2]
    needed = [tensor is not None and tensor.requires_grad for tensor in both]
    with torch.no_grad():
        y = file.launch_forward(*both, *form.astuple())
        found = file.launch_backward(dy.to(y.dtype), *both, *form.astuple(), *needed)
        again = torch.empty_like(y)
        beside = file.launch_backward(dy.to(y.dtype), *both, *form.astuple(), *needed, y=again)
    check("y", y, eager_y, exact_y)
    check("y, by the gradients' kernel", again, eager_y, exact_y)
    assert all(
        (one is None and other is None) or torch.equal(one, other)
        for one, other in zip(found, beside, strict=True)
    )
    for name, value, eager_value, exact_value in zip(("gate", "up"), found, eager, exact, strict=False):
        check(name, value, eager_value, exact_value)


@pytest.mark.parametrize(
    ("size", "dtype", "act"), spread([1, 63, 1000, 4096], [*itertools.product(DTYPES, ACTIVATIONS)]), ids=str
)
def test_sizes(size: int, dtype: torch.dtype, act: str, device: str, check: Any, gradients: Any) -> None:
    dy = torch.randn(2, 3, size, device=device).to(dtype)
    compare(make((2, 3, size), dtype, device), dy, check, gradients, act=act, alpha=1.702)


@pytest.mark.parametrize(("size", "act", "layout", "gate_first"), spread([1, 63, 1000], UNITS))
def test_layouts(
    layout: str, gate_first: bool, act: str, size: int, device: str, check: Any, gradients: Any
) -> None:
    tensors = make((2, 3, size), torch.bfloat16, device, layout)
    dy = torch.randn(2, 3, size, device=device).to(torch.bfloat16)
    form = {"act": act, "alpha": 1.702, "layout": layout, "gate_first": gate_first}
    compare(tensors, dy, check, gradients, **form)


@pytest.mark.parametrize(("dtype", "act", "layout", "gate_first"), spread(DTYPES, UNITS), ids=str)
def test_limits_offsets_and_scales(
    layout: str, gate_first: bool, act: str, dtype: torch.dtype, device: str, check: Any, gradients: Any
) -> None:
    # Not scaled: rounded first, a value may end on the other side of a limit than in fp64.
    form = {**FULL, "gate_scale": 1.0, "act": act, "layout": layout, "gate_first": gate_first}
    tensors = make((5, 77), dtype, device, layout)
    compare(tensors, torch.randn(5, 77, device=device).to(dtype), check, gradients, **form)
    if dtype == torch.float32:
        compare(tensors, torch.randn(5, 77, device=device), check, gradients, **{**form, "gate_scale": 0.75})


@pytest.mark.parametrize("layout", ["packed", "transposed", "column_stride", "expanded"])
def test_strides(layout: str, device: str, check: Any, gradients: Any) -> None:
    def lay_out(half: int) -> torch.Tensor:
        base = torch.randn(2, 3, 10000, device=device)
        return {
            "packed": base[..., half * 5000 : (half + 1) * 5000],
            "transposed": base[..., :5000].transpose(0, 1),
            "column_stride": base[..., half::2],
            "expanded": base[:1, :1, :5000].expand(2, 3, 5000),
        }[layout]

    gate, up, dy = lay_out(0).detach().requires_grad_(), lay_out(1).detach().requires_grad_(), lay_out(0)
    compare([gate, up], dy, check, gradients, act="silu")


@pytest.mark.parametrize("strides", ["wide_rows", "transposed", "column_stride", "expanded", "one_row"])
@pytest.mark.parametrize("layout", ["packed", "interleaved"])
def test_strides_of_one_tensor(layout: str, strides: str, device: str, check: Any, gradients: Any) -> None:
    base = torch.randn(3, 4, 600, device=device)
    both = {
        "wide_rows": base[..., 100:500],
        "transposed": base[..., :400].transpose(0, 1),
        "column_stride": base[..., ::2][..., :200],
        "expanded": base[:1, :1, :400].expand(3, 4, 400),
        "one_row": base[0, 0, :400],
    }[strides]
    shape = (*both.shape[:-1], both.shape[-1] // 2)
    dy = torch.randn(*shape[:-1], 2 * shape[-1], device=device)[..., ::2]
    compare([both.detach().requires_grad_()], dy, check, gradients, act="gelu_tanh", layout=layout)


def test_packed_halves_are_read_in_place(device: str) -> None:
    gate, up = torch.randn(6, 64, device=device).chunk(2, -1)
    gate_rows, up_rows = rows_of(Form("silu"), gate, up)
    assert (gate_rows.data_ptr(), up_rows.data_ptr()) == (gate.data_ptr(), up.data_ptr())
    both = torch.randn(2, 3, 64, device=device)
    for layout in ("packed", "interleaved"):
        rows = rows_of(Form("silu", layout=layout), both, None)
        assert all(part.untyped_storage().data_ptr() == both.untyped_storage().data_ptr() for part in rows)


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_the_gradients_needed(frozen: int, device: str, check: Any, gradients: Any) -> None:
    inputs = make((3, 40), torch.float32, device)
    inputs[frozen] = inputs[frozen].detach()
    compare(inputs, torch.randn(3, 40, device=device), check, gradients, act="silu")
    compare(inputs, torch.randn(3, 40, device=device), check, gradients, act="relu2", **FULL)


def check_extremes(value: torch.Tensor, exact: torch.Tensor, *, sign: bool = True) -> None:
    """Finite values are close, infinities and NaN the same; without `sign` either stands for the other."""
    if not sign:
        value, exact = (torch.where(item.isfinite(), item, torch.nan) for item in (value, exact))
    torch.testing.assert_close(value, exact.to(value.dtype), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_passes_a_limit_that_is_no_number_of_the_dtype_as_torch_has_it(dtype, device: str) -> None:
    """torch rounds 0.7 to the dtype, in bfloat16 down and in float16 up, and values meet what it becomes."""
    limit = torch.tensor(0.7, dtype=dtype)
    around = [torch.nextafter(limit, torch.tensor(far, dtype=dtype)) for far in (-9.0, 9.0)]
    values = torch.stack([limit, *around, -limit, *(-value for value in around)]).to(device)
    gate, up = values.repeat(2).requires_grad_(), values.repeat_interleave(2).requires_grad_()
    stock = F.silu(gate.clamp(max=0.7)) * up.clamp(-0.7, 0.7)
    wanted = torch.autograd.grad(stock, [gate, up], torch.ones_like(stock))
    form = Form("silu", gate_limit=0.7, up_limit=0.7).astuple()
    with torch.no_grad():
        ones = torch.ones_like(stock)
        for backward in (file.launch_backward, plain_backward):
            found = backward(ones, gate, up, *form, True, True)
            assert [value == 0 for value in found[0].tolist()] == [value == 0 for value in wanted[0].tolist()]
            assert [value == 0 for value in found[1].tolist()] == [value == 0 for value in wanted[1].tolist()]
        y = file.launch_forward(gate, up, *form)
    torch.testing.assert_close(y, stock.detach(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("form", [{}, LIMITS], ids=["plain", "limited"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_extreme_values(act: str, layout: str, form: dict[str, Any], device: str) -> None:
    """Infinities and NaN come out, and go into gradients, as in torch's autograd over the reference."""
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([-inf, -1e4, -88.0, -20.0, -1e-8, -0.0, 0.0, 1e-8, 7.0, 20.0, 88.0, 1e4, inf, nan])
    if act == "gelu":
        values = values[values != inf]  # on a CPU, torch's fp32 gelu of inf is NaN, in fp64 and on a GPU inf
    gate = values.repeat(4).to(device)
    up = torch.tensor([1.0, -1e4, inf, nan], device=device).repeat_interleave(len(values))
    if layout == "split":
        tensors = [gate, up]
    else:
        tensors = [torch.cat([gate, up]) if layout == "packed" else torch.stack([gate, up], -1).flatten()]
    attributes = Form(act=act, **{"alpha": 1.702, **form}, layout=layout)
    both, dy = (*tensors, None)[:2], torch.ones_like(gate)
    y = file.launch_forward(*both, *attributes.astuple())
    found = file.launch_backward(dy, *both, *attributes.astuple(), True, True)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    exact = glu_reference(*leaves, act=act, **{"alpha": 1.702, **form}, layout=layout)
    gradients = torch.autograd.grad(exact.sum(), leaves)
    check_extremes(y, exact)
    # Written out, an infinite up gives this one inf - inf.
    is_one_product = act != "sigmoid_alpha"
    plain = plain_backward(dy, *both, *attributes.astuple(), True, True)
    for value, plain_value, exact_value in zip(found, plain, gradients, strict=False):
        check_extremes(value, exact_value, sign=is_one_product)
        check_extremes(plain_value, exact_value, sign=is_one_product)


def test_backward_twice(op_device: str) -> None:
    gate, up = make((3, 40), torch.float32, op_device)
    y = glu(gate, up, act="silu").sum()
    first = torch.autograd.grad(y, [gate, up], retain_graph=True)
    second = torch.autograd.grad(y, [gate, up])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (5,), ()])
def test_shapes_at_the_edge(shape: tuple[int, ...], device: str, check: Any, gradients: Any) -> None:
    dy = torch.randn(shape, device=device)
    compare(make(shape, torch.float32, device), dy, check, gradients, act="silu")
    for layout in LAYOUTS[1:] if shape else ():
        compare(make(shape, torch.float32, device, layout), dy, check, gradients, act="silu", layout=layout)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("layout", "gate_first"), PLACES)
def test_op(act: str, layout: str, gate_first: bool, op_device: str, check: Any, gradients: Any) -> None:
    for dtype, form in zip(DTYPES, ({}, LIMITS, LIMITS), strict=True):
        form = {"alpha": 1.702, **form, "act": act, "layout": layout, "gate_first": gate_first}
        inputs, dy = (
            make((2, 5, 24), dtype, op_device, layout),
            torch.randn(2, 5, 24, device=op_device).to(dtype),
        )
        exact_y, exact = gradients(functools.partial(glu_reference, **form), inputs, dy, torch.float64)
        eager_y, eager = gradients(functools.partial(stock, **form), inputs, dy)
        y, found = gradients(functools.partial(glu, **form), inputs, dy)
        check("y", y, eager_y, exact_y)
        for name, value, eager_value, exact_value in zip(("gate", "up"), found, eager, exact, strict=False):
            check(name, value, eager_value, exact_value)


@pytest.mark.parametrize(("layout", "act"), spread(LAYOUTS, [(act,) for act in ACTIVATIONS]))
def test_opcheck(act: str, layout: str, op_device: str, opcheck: Any) -> None:
    tensors = make((4, 24), torch.float32, op_device, layout)
    form = Form(act=act, **LIMITS, layout=layout).astuple()
    gate, up = (*tensors, None)[:2]
    opcheck(forward_op, (gate, up, *form))
    dy = torch.randn(4, 24, device=op_device)
    gate, up = (None if tensor is None else tensor.detach() for tensor in (gate, up))
    opcheck(backward_op, (dy, gate, up, *form, True, up is not None))
    opcheck(torch.ops.fxopt.glu_backward_output.default, (dy, gate, up, *form, True, up is not None))
    if up is not None:
        opcheck(backward_op, (dy, gate, up, *form, False, True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_ops_stand_in_the_joint_graph(layout: str, op_device: str, joint_targets: Any) -> None:
    tensors = make((4, 24), torch.float32, op_device, layout)
    targets = joint_targets(lambda *tensors: glu(*tensors, act="silu", layout=layout), *tensors)
    assert targets == ["fxopt.glu.default", "fxopt.glu_backward.default"]


@pytest.mark.parametrize("layout", ["packed", "interleaved"])
def test_nothing_is_copied_around_one_tensor(layout: str, op_device: str) -> None:
    """Between a projection and the op no half is copied or joined, forward or backward."""
    from functorch.compile import aot_function, make_boxed_func

    targets: list[str] = []

    def compiler(gm: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
        return make_boxed_func(gm.forward)

    x, weight = (torch.randn(shape, device=op_device, requires_grad=True) for shape in ((4, 8), (24, 8)))

    def unit(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return glu(F.linear(x, weight), act="silu", layout=layout)

    aot_function(unit, fw_compiler=compiler, bw_compiler=compiler)(x, weight).sum().backward()
    moving = ("cat", "slice", "split", "select", "stack", "clone", "copy", "zeros", "add", "index")
    assert [target for target in targets if any(word in target for word in moving)] == []


FORMS = [
    (op, over, layout, gate_first)
    for op in ("glu_backward", "glu_backward_output")
    for over in ("all", "dy")
    for layout, gate_first in PLACES
    # of one tensor the one gradient is as wide as two dy: there is nothing to leave in it
    if layout == "split" or (op, over) != ("glu_backward", "dy")
]


@pytest.mark.parametrize(("op", "over", "layout", "gate_first"), FORMS)
def test_forms_in_place_leave_the_same_results(
    op: str, over: str, layout: str, gate_first: bool, op_device: str
) -> None:
    torch.manual_seed(0)
    form = Form("silu", layout=layout, gate_first=gate_first, **LIMITS)
    shape = (6, 64) if layout == "split" else (6, 128)
    gate = torch.randn(shape, device=op_device)
    up = torch.randn(shape, device=op_device) if layout == "split" else None
    dy = torch.randn(6, 64, device=op_device)
    attributes = (*form.astuple(), True, True)
    stock = list(getattr(torch.ops.fxopt, op)(dy, gate, up, *attributes))
    target = getattr(torch.ops.fxopt, f"{op}_over_{over}")
    returned = target(dy, gate, up, *attributes)
    left = {"all": [gate, up, dy], "dy": [None, dy, None] if op == "glu_backward" else [None, None, dy]}[over]
    others = [] if returned is None else [returned] if isinstance(returned, torch.Tensor) else [*returned]
    for value, place in zip(stock, left, strict=False):
        found = others.pop(0) if place is None and over == "dy" else place
        assert (found is None) == (value is None)
        assert value is None or torch.equal(found, value)


@pytest.mark.parametrize(("layout", "gate_first"), PLACES)
def test_the_kernel_writes_over_what_it_has_read(layout: str, gate_first: bool, device: str) -> None:
    torch.manual_seed(0)
    attributes = (*Form("gelu", layout=layout, gate_first=gate_first).astuple(), True, True)
    shape = (5, 1000) if layout == "split" else (5, 2000)
    gate = torch.randn(shape, device=device)
    up = torch.randn(shape, device=device) if layout == "split" else None
    dy, y = (torch.randn(5, 1000, device=device) for _ in range(2))
    stock = file.launch_backward(dy, gate, up, *attributes, y=y)
    file.launch_backward(dy, gate, up, *attributes, y=dy, memory=(gate, up))
    assert torch.equal(dy, y)
    assert torch.equal(gate, stock[0])
    assert up is None or torch.equal(up, stock[1])


def test_second_derivatives_are_refused(op_device: str) -> None:
    gate, up = make((4, 24), torch.float32, op_device)
    (dgate,) = torch.autograd.grad(glu(gate, up, act="silu").sum(), [gate], create_graph=True)
    with pytest.raises(RuntimeError, match="fxopt::glu: second derivatives are not implemented"):
        dgate.sum().backward()


def test_errors() -> None:
    with pytest.raises(ValueError, match="glu: act, expected one of"):
        glu(torch.ones(2), torch.ones(2), act="tanh")
    with pytest.raises(ValueError, match="glu: layout, expected one of"):
        glu(torch.ones(2), torch.ones(2), act="silu", layout="joined")
    with pytest.raises(ValueError, match=r"up, expected the shape of gate \(2,\), got \(3,\)"):
        glu(torch.ones(2), torch.ones(3), act="silu")
    with pytest.raises(ValueError, match=r"up, expected the shape of gate \(2,\), got None"):
        glu(torch.ones(2), act="silu")
    with pytest.raises(
        ValueError, match=r"packed, expected one tensor of an even width, got \(3,\) and none"
    ):
        glu(torch.ones(3), act="silu", layout="packed")
    with pytest.raises(
        ValueError, match=r"packed, expected one tensor of an even width, got \(2,\) and \(2,\)"
    ):
        glu(torch.ones(2), torch.ones(2), act="silu", layout="packed")


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    """Rows 2^30 elements apart in a small view of a large tensor: the third starts at 2^31."""
    base = torch.zeros(2**31 + 64, dtype=torch.bfloat16, device="cuda")
    gate = base.as_strided((3, 64), (2**30, 1))
    gate.copy_(torch.randn(3, 64, device="cuda"))
    up = torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
    y = file.launch_forward(gate, up, *Form("silu").astuple())
    exact = glu_reference(gate.double(), up.double(), act="silu")
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)
    for layout in ("packed", "interleaved"):
        y = file.launch_forward(gate, None, *Form("silu", layout=layout).astuple())
        exact = glu_reference(gate.double(), act="silu", layout=layout)
        torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)
