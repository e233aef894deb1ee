"""glu: the kernels and the op against the reference."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fxopt.kernels import glu as file
from fxopt.kernels.glu import ACTIVATIONS, glu, glu_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stock(gate: torch.Tensor, up: torch.Tensor, *, act: str) -> torch.Tensor:
    """Return act(gate) * up as models write it, rounded in between."""
    if act == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none") * up


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    return [(torch.randn(shape, device=device) * 2).to(dtype).requires_grad_() for _ in range(2)]


def compare(
    gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, act: str, check: Any, gradients: Any
) -> None:
    exact_y, exact = gradients(functools.partial(glu_reference, act=act), [gate, up], dy, torch.float64)
    eager_y, eager = gradients(functools.partial(stock, act=act), [gate, up], dy)
    with torch.no_grad():
        y = file.launch_forward(gate, up, act)
        found = file.launch_backward(dy.to(y.dtype), gate, up, act, gate.requires_grad, up.requires_grad)
    check("y", y, eager_y, exact_y)
    for name, value, eager_value, exact_value in zip(("gate", "up"), found, eager, exact, strict=True):
        check(name, value, eager_value, exact_value)


@pytest.mark.parametrize("size", [1, 63, 1000, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_sizes(size: int, dtype: torch.dtype, act: str, device: str, check: Any, gradients: Any) -> None:
    gate, up = make((2, 3, size), dtype, device)
    compare(gate, up, torch.randn(2, 3, size, device=device).to(dtype), act, check, gradients)


@pytest.mark.parametrize("layout", ["packed", "transposed", "column_stride", "expanded"])
def test_strides(layout: str, device: str, check: Any, gradients: Any) -> None:
    def lay_out(half: int) -> torch.Tensor:
        base = torch.randn(3, 4, 10000, device=device)
        return {
            "packed": base[..., half * 5000 : (half + 1) * 5000],
            "transposed": base[..., :5000].transpose(0, 1),
            "column_stride": base[..., half::2],
            "expanded": base[:1, :1, :5000].expand(3, 4, 5000),
        }[layout]

    gate, up, dy = lay_out(0).detach().requires_grad_(), lay_out(1).detach().requires_grad_(), lay_out(0)
    compare(gate, up, dy, "silu", check, gradients)


def test_packed_halves_are_read_in_place(device: str) -> None:
    gate, up = torch.randn(6, 64, device=device).chunk(2, -1)
    gate_rows, up_rows = file._rows_of(gate, up)
    assert (gate_rows.data_ptr(), up_rows.data_ptr()) == (gate.data_ptr(), up.data_ptr())


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_the_gradients_needed(frozen: int, device: str, check: Any, gradients: Any) -> None:
    inputs = make((3, 40), torch.float32, device)
    inputs[frozen] = inputs[frozen].detach()
    compare(*inputs, torch.randn(3, 40, device=device), "silu", check, gradients)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_extreme_values(act: str, device: str) -> None:
    values = torch.tensor(
        [-1e4, -88.0, -20.0, -1e-8, 0.0, 1e-8, 20.0, 88.0, 1e4, float("nan")], device=device
    )
    one = torch.ones_like(values)
    y = file.launch_forward(values, one, act)
    dgate, dup = file.launch_backward(one, values, one, act, True, True)
    gate, up = values.double().requires_grad_(), one.double().requires_grad_()
    exact = glu_reference(gate, up, act=act)
    exact.sum().backward()
    for value, exact_value in ((y, exact), (dgate, gate.grad), (dup, up.grad)):
        torch.testing.assert_close(value.double(), exact_value, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_backward_twice(op_device: str) -> None:
    gate, up = make((3, 40), torch.float32, op_device)
    y = glu(gate, up, act="silu").sum()
    first = torch.autograd.grad(y, [gate, up], retain_graph=True)
    second = torch.autograd.grad(y, [gate, up])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (5,), ()])
def test_shapes_at_the_edge(shape: tuple[int, ...], device: str, check: Any, gradients: Any) -> None:
    gate, up = make(shape, torch.float32, device)
    compare(gate, up, torch.randn(shape, device=device), "silu", check, gradients)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op(act: str, dtype: torch.dtype, op_device: str, check: Any, gradients: Any) -> None:
    inputs, dy = make((2, 5, 24), dtype, op_device), torch.randn(2, 5, 24, device=op_device)
    exact_y, exact = gradients(functools.partial(glu_reference, act=act), inputs, dy.to(dtype), torch.float64)
    eager_y, eager = gradients(functools.partial(stock, act=act), inputs, dy)
    y, found = gradients(functools.partial(glu, act=act), inputs, dy)
    check("y", y, eager_y, exact_y)
    for name, value, eager_value, exact_value in zip(("gate", "up"), found, eager, exact, strict=True):
        check(name, value, eager_value, exact_value)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_opcheck(act: str, op_device: str) -> None:
    gate, up = make((4, 24), torch.float32, op_device)
    torch.library.opcheck(file._forward_op, (gate, up, act))
    dy = torch.randn(4, 24, device=op_device)
    torch.library.opcheck(file._backward_op, (dy, gate.detach(), up.detach(), act, True, True))
    torch.library.opcheck(file._backward_op, (dy, gate.detach(), up.detach(), act, False, True))


def test_both_ops_stand_in_the_joint_graph(op_device: str, joint_targets: Any) -> None:
    gate, up = make((4, 24), torch.float32, op_device)
    targets = joint_targets(lambda gate, up: glu(gate, up, act="silu"), gate, up)
    assert targets == ["fxopt.glu.default", "fxopt.glu_backward.default"]


def test_second_derivatives_are_refused(op_device: str) -> None:
    gate, up = make((4, 24), torch.float32, op_device)
    (dgate,) = torch.autograd.grad(glu(gate, up, act="silu").sum(), [gate], create_graph=True)
    with pytest.raises(RuntimeError, match="fxopt::glu: second derivatives are not implemented"):
        dgate.sum().backward()


def test_errors() -> None:
    with pytest.raises(ValueError, match="act, expected one of"):
        glu(torch.ones(2), torch.ones(2), act="relu")
    with pytest.raises(ValueError, match=r"up, expected the shape of gate \(2,\), got \(3,\)"):
        glu(torch.ones(2), torch.ones(3), act="silu")


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    """Rows 2^30 elements apart in a small view of a large tensor: the third starts at 2^31."""
    base = torch.zeros(2**31 + 64, dtype=torch.bfloat16, device="cuda")
    gate = base.as_strided((3, 64), (2**30, 1))
    gate.copy_(torch.randn(3, 64, device="cuda"))
    up = torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
    y = file.launch_forward(gate, up, "silu")
    exact = glu_reference(gate.double(), up.double(), act="silu")
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)
