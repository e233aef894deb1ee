"""rms_norm: the kernels and the op against the reference."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fxopt.kernels import rms_norm as file
from fxopt.kernels.rms_norm import launches, rms_norm, rms_norm_reference
from fxopt.kernels.rms_norm.launches import MOST_TILE_COLUMNS
from fxopt.kernels.rms_norm.op import backward_op, forward_op

FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": {"offset": 1.0, "cast_first": False},
    "centred": {"centre": True},
    "gate_after": {"gate_act": "silu"},
    "gate_before": {"gate_act": "silu", "gate_before": True, "cast_first": False},
    "centred_gate_before": {"gate_act": "sigmoid", "gate_before": True, "centre": True},
    "sigmoid_gate": {"gate_act": "sigmoid", "cast_first": False},
    "float32_out": {"out_dtype": torch.float32},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attributes_of(form: dict[str, Any]) -> tuple[Any, ...]:
    """Return the attributes in the order of the op."""
    defaults = {
        "offset": 0.0,
        "cast_first": True,
        "centre": False,
        "gate_act": "silu",
        "gate_before": False,
        "groups": 1,
        "out_dtype": None,
    }
    return (1e-6, *(defaults | form).values())


def run_kernel(
    inputs: list[torch.Tensor | None], dy: torch.Tensor, form: dict[str, Any], needs: tuple[bool, bool, bool]
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    attributes = attributes_of(form)
    _, offset, _, centre, gate_act, gate_before, groups, _ = attributes
    y, statistics = file.launch_forward(*inputs, *attributes)
    found = file.launch_backward(
        dy.to(y.dtype), *inputs, statistics, offset, centre, gate_act, gate_before, groups, *needs
    )
    return y, found


def make(
    shape: tuple[int, ...], form: dict[str, Any], dtype: torch.dtype, device: str, weight: bool = True
) -> list[torch.Tensor | None]:
    return [
        torch.randn(shape, device=device).to(dtype).requires_grad_(),
        (torch.randn(shape[-1], device=device) * 0.2 + 1).to(dtype).requires_grad_() if weight else None,
        torch.randn(shape, device=device).to(dtype).requires_grad_() if "gate_act" in form else None,
    ]


def compare(
    inputs: list[torch.Tensor | None], form: dict[str, Any], check: Any, gradients: Any, dy: Any = None
) -> None:
    x = inputs[0]
    assert x is not None
    reference = functools.partial(rms_norm_reference, eps=1e-6, **form)
    exact_form = {key: value for key, value in form.items() if key != "out_dtype"}
    exact_reference = functools.partial(rms_norm_reference, eps=1e-6, **exact_form)
    dy = torch.randn(x.shape, device=x.device).to(x.dtype) if dy is None else dy
    exact_y, exact = gradients(exact_reference, inputs, dy, torch.float64)
    eager_y, eager = gradients(reference, inputs, dy)
    needs = tuple(tensor is not None and tensor.requires_grad for tensor in inputs)
    with torch.no_grad():
        y, found = run_kernel(inputs, dy, form, needs)  # type: ignore[arg-type]
    check("y", y, eager_y, exact_y, x.dtype)
    for name, value, eager_value, exact_value in zip(
        ("x", "weight", "gate"), found, eager, exact, strict=True
    ):
        check(name, value, eager_value, exact_value, x.dtype)


@pytest.mark.usefixtures("wide_sums")
@pytest.mark.parametrize("width", [1, 63, 1000, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths(width: int, dtype: torch.dtype, device: str, check: Any, gradients: Any) -> None:
    form = FORMS["llama"]
    compare(make((2, 5, width), form, dtype, device), form, check, gradients)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [True, False])
def test_forms(name: str, dtype: torch.dtype, weight: bool, device: str, check: Any, gradients: Any) -> None:
    form = FORMS[name]
    compare(make((7, 63), form, dtype, device, weight), form, check, gradients)


@pytest.mark.parametrize("name", ["llama", "centred_gate_before", "gate_after"])
def test_groups(name: str, device: str, check: Any, gradients: Any) -> None:
    form = FORMS[name] | {"groups": 3}
    compare(make((70, 3 * 40), form, torch.bfloat16, device), form, check, gradients)


@pytest.mark.usefixtures("wide_sums")
@pytest.mark.parametrize(
    "name",
    [
        "centred_gate_before",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gate_after")),
    ],
)
def test_rows_longer_than_a_tile(name: str, device: str, check: Any, gradients: Any) -> None:
    width = MOST_TILE_COLUMNS + 3
    compare(make((4, width), FORMS[name], torch.bfloat16, device), FORMS[name], check, gradients)


def test_many_short_rows(device: str, check: Any, gradients: Any) -> None:
    compare(make((2, 301, 1, 128), {}, torch.bfloat16, device), {}, check, gradients)


@pytest.mark.usefixtures("wide_sums")
@pytest.mark.parametrize("name", ["llama", "gate_after", "centred_gate_before"])
@pytest.mark.parametrize("width", [512, 700])
def test_programs_take_several_turns(width: int, name: str, device: str, check: Any, gradients: Any) -> None:
    rows = 61 if device == "cpu" else 5003
    compare(make((rows, width), FORMS[name], torch.bfloat16, device), FORMS[name], check, gradients)


def test_a_tile_that_leaves_no_room_for_stages_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = launches.backward_tiles_of(1024, gated=True)
    assert wide != narrow
    monkeypatch.setattr(
        launches, "num_stages_for", lambda loop_bytes, device, stages: stages * (stages in fit)
    )
    plan = launches.plan_backward.__wrapped__
    for fit, tile in (((3, 4), wide), ((3,), narrow), ((), narrow)):
        rows, warps, stages = plan(1024, 12, 0, torch.device("cuda"), gated=True)
        assert (rows, warps) == (tile[0], tile[2])
        assert stages == (tile[3] if fit else 0)
    assert plan(1024, 12, 0, torch.device("cpu"), gated=True) == (wide[0], wide[2], 0)


def test_weight_of_another_dtype(device: str, check: Any, gradients: Any) -> None:
    inputs = make((5, 96), {}, torch.bfloat16, device)
    inputs[1] = torch.rand(96, device=device).requires_grad_()
    compare(inputs, {}, check, gradients)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("name", ["gate_after", "gate_before"])
def test_only_the_gradients_needed(
    frozen: tuple[int, ...], name: str, device: str, check: Any, gradients: Any
) -> None:
    inputs = make((5, 96), FORMS[name], torch.float32, device)
    for index in frozen:
        inputs[index] = inputs[index].detach()  # type: ignore[union-attr]
    compare(inputs, FORMS[name], check, gradients)


@pytest.mark.parametrize("layout", ["row_stride", "transposed", "column_stride", "expanded"])
def test_strides(layout: str, device: str, check: Any, gradients: Any) -> None:
    form = FORMS["gate_after"]

    def lay_out(seed: int) -> torch.Tensor:
        base = torch.randn(3, 8, 128, device=device)
        return {
            "row_stride": base[..., :64],
            "transposed": base[..., :64].transpose(0, 1),
            "column_stride": base[..., ::2],
            "expanded": base[:1, :1, :64].expand(3, 8, 64),
        }[layout]

    x, gate, dy = lay_out(0).detach().requires_grad_(), lay_out(1).detach().requires_grad_(), lay_out(2)
    weight = torch.randn(128, device=device)[::2].detach().requires_grad_()
    compare([x, weight, gate], form, check, gradients, dy)


@pytest.mark.usefixtures("wide_sums")
@pytest.mark.parametrize(
    ("name", "width", "dtype"),
    [
        *((name, 63, dtype) for name in ("llama", "centred_gate_before", "gate_after") for dtype in DTYPES),
        ("llama", MOST_TILE_COLUMNS + 3, torch.bfloat16),
        *(
            pytest.param(name, MOST_TILE_COLUMNS + 3, dtype, marks=pytest.mark.slow)
            for name, dtype in (("centred_gate_before", torch.float32), ("gate_after", torch.float16))
        ),
    ],
    ids=str,
)
def test_a_gradient_from_elsewhere_is_added_before_rounding(
    name: str, width: int, dtype: torch.dtype, device: str, check: Any, gradients: Any
) -> None:
    form = FORMS[name]
    inputs = make((3, width), form, dtype, device)
    dy, dskip = (torch.randn(3, width, device=device).to(dtype) for _ in range(2))
    reference = functools.partial(rms_norm_reference, eps=1e-6, **form)
    _, exact = gradients(reference, inputs, dy, torch.float64)
    _, eager = gradients(reference, inputs, dy)
    _, offset, _, centre, gate_act, gate_before, groups, _ = attributes_of(form)
    rest = (offset, centre, gate_act, gate_before, groups, True, True, "gate_act" in form, dskip)
    with torch.no_grad():
        y, statistics = file.launch_forward(*inputs, *attributes_of(form))
        found = file.launch_backward(dy.to(y.dtype), *inputs, statistics, *rest)
        by_op = backward_op(dy.to(y.dtype), *inputs, statistics, *rest)
    check("x", found[0], eager[0] + dskip, exact[0] + dskip.double(), dtype)
    check("weight", found[1], eager[1], exact[1], dtype)
    for value, kernel in zip(by_op, found, strict=True):
        check("op", value, kernel, None if kernel is None else kernel.double(), dtype)


def test_the_same_bits_twice(device: str) -> None:
    inputs = make((100, 256), {}, torch.bfloat16, device)
    dy = torch.randn(100, 256, device=device)
    needs = (True, True, False)
    with torch.no_grad():
        first, second = run_kernel(inputs, dy, {}, needs), run_kernel(inputs, dy, {}, needs)
    assert torch.equal(first[0], second[0])
    for a, b in zip(first[1][:2], second[1][:2], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_a_planted_nan_stays_in_its_row(device: str) -> None:
    x, weight, _ = make((5, 96), {}, torch.float32, device)
    assert x is not None
    with torch.no_grad():
        x[2, 7] = float("nan")
        y, found = run_kernel([x, weight, None], torch.ones_like(x), {}, (True, True, False))
    bad = torch.tensor([False, False, True, False, False], device=device)
    dx = found[0]
    assert dx is not None
    assert torch.equal(y.isnan().any(1), bad)
    assert torch.equal(dx.isnan().any(1), bad)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows(shape: tuple[int, ...], op_device: str) -> None:
    x = torch.randn(shape, device=op_device, requires_grad=True)
    weight = torch.randn(64, device=op_device, requires_grad=True)
    rms_norm(x, weight, eps=1e-6).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("name", FORMS)
def test_op(name: str, op_device: str, check: Any, gradients: Any) -> None:
    form = FORMS[name]
    inputs = make((2, 5, 24), form, torch.float32, op_device)
    dy = torch.randn(2, 5, 24, device=op_device)
    exact_y, exact = gradients(functools.partial(rms_norm_reference, eps=1e-6, **form), inputs, dy)
    y, found = gradients(functools.partial(rms_norm, eps=1e-6, **form), inputs, dy)
    torch.testing.assert_close(y, exact_y)
    for value, exact_value in zip(found, exact, strict=True):
        torch.testing.assert_close(value, exact_value)


@pytest.mark.parametrize("name", ["llama", "centred", "gate_after"])
def test_opcheck(name: str, op_device: str, opcheck: Any) -> None:
    inputs = make((4, 24), FORMS[name], torch.float32, op_device)
    attributes = attributes_of(FORMS[name])
    opcheck(forward_op, (*inputs, *attributes))
    with torch.no_grad():
        y, statistics = forward_op(*inputs, *attributes)
    _, offset, _, centre, gate_act, gate_before, groups, _ = attributes
    fixed = [None if tensor is None else tensor.detach() for tensor in inputs]
    opcheck(
        backward_op,
        (
            y,
            *fixed,
            statistics,
            offset,
            centre,
            gate_act,
            gate_before,
            groups,
            True,
            True,
            fixed[2] is not None,
            torch.randn(4, 24, device=op_device),
        ),
    )


def test_both_ops_stand_in_the_joint_graph(op_device: str, joint_targets: Any) -> None:
    x, weight, _ = make((4, 24), {}, torch.float32, op_device)
    targets = joint_targets(lambda x, weight: rms_norm(x, weight, eps=1e-6), x, weight)
    assert targets == ["fxopt.rms_norm.default", "fxopt.rms_norm_backward.default"]


def test_second_derivatives_are_refused(op_device: str) -> None:
    x, weight, _ = make((4, 24), {}, torch.float32, op_device)
    y = rms_norm(x, weight, eps=1e-6)  # type: ignore[arg-type]
    (dx,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="fxopt::rms_norm: second derivatives are not implemented"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("weight", "gate", "groups", "text"),
    [
        (torch.ones(3), None, 1, r"weight, expected shape \(4,\), got \(3,\)"),
        (None, torch.ones(2, 3), 1, r"gate, expected shape \(2, 4\)"),
        (None, None, 3, "groups, expected a divisor of 4, got 3"),
    ],
)
def test_errors(weight: Any, gate: Any, groups: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        rms_norm(torch.ones(2, 4), weight, gate, eps=1e-6, groups=groups)


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    """Rows 2^30 elements apart in a small view of a large tensor: the third starts at 2^31."""
    base = torch.zeros(2**31 + 64, dtype=torch.bfloat16, device="cuda")
    x = base.as_strided((3, 64), (2**30, 1))
    x.copy_(torch.randn(3, 64, device="cuda"))
    y, statistics = file.launch_forward(x, None, None, *attributes_of({}))
    found = file.launch_backward(
        torch.ones_like(y), x, None, None, statistics, 0.0, False, "silu", False, 1, True, False, False
    )
    exact = rms_norm_reference(x.double(), eps=1e-6)
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)
    assert found[0] is not None
    assert found[0].isfinite().all()
