"""activation: the kernels and the op against the reference."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fxopt.kernels import activation as file
from fxopt.kernels.activation import activation, activation_reference
from fxopt.kernels.activations import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALPHA = 1.702


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


STOCK = {
    "silu": F.silu,
    "sigmoid_alpha": lambda x: x * torch.sigmoid(ALPHA * x),
    "gelu": F.gelu,
    "gelu_tanh": gelu_new,
    "relu2": lambda x: F.relu(x).square(),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    return (torch.randn(shape, device=device) * 2).to(dtype).requires_grad_()


def compare(x: torch.Tensor, dy: torch.Tensor, act: str, check: Any, gradients: Any) -> None:
    reference = functools.partial(activation_reference, act=act, alpha=ALPHA)
    exact_y, exact = gradients(reference, [x], dy, torch.float64)
    eager_y, eager = gradients(STOCK[act], [x], dy)
    with torch.no_grad():
        y = file.launch_forward(x, act, ALPHA)
        dx = file.launch_backward(dy.to(y.dtype), x, act, ALPHA)
    check("y", y, eager_y, exact_y)
    check("x", dx, eager[0], exact[0])


@pytest.mark.parametrize("size", [1, 63, 1000, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_sizes(size: int, dtype: torch.dtype, act: str, device: str, check: Any, gradients: Any) -> None:
    x = make((2, 3, size), dtype, device)
    compare(x, torch.randn(2, 3, size, device=device).to(dtype), act, check, gradients)


@pytest.mark.parametrize("layout", ["half", "transposed", "column_stride", "expanded"])
def test_strides(layout: str, device: str, check: Any, gradients: Any) -> None:
    def lay_out() -> torch.Tensor:
        base = torch.randn(3, 4, 10000, device=device)
        return {
            "half": base[..., 5000:],
            "transposed": base[..., :5000].transpose(0, 1),
            "column_stride": base[..., ::2],
            "expanded": base[:1, :1, :5000].expand(3, 4, 5000),
        }[layout]

    compare(lay_out().detach().requires_grad_(), lay_out(), "gelu_tanh", check, gradients)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_extreme_values(act: str, device: str) -> None:
    """Infinities and NaN come out, and go into gradients, as in torch's autograd over the reference."""
    inf, nan = float("inf"), float("nan")
    values = [-inf, -1e4, -88.0, -20.0, -1e-8, -0.0, 0.0, 1e-8, 20.0, 88.0, 1e4, inf, nan]
    x = torch.tensor(values, device=device).repeat(2)
    dy = torch.cat([torch.ones(len(values)), torch.full((len(values),), nan)]).to(device)
    # On a CPU, torch's fp32 gelu of inf is NaN, though inf in fp64 and on a GPU.
    wide = torch.float64 if act == "gelu" else torch.float32
    leaf = x.to(wide).requires_grad_()
    exact = activation_reference(leaf, act=act, alpha=ALPHA)
    (exact_dx,) = torch.autograd.grad(exact, [leaf], dy.to(wide))
    y, dx = file.launch_forward(x, act, ALPHA), file.launch_backward(dy, x, act, ALPHA)
    torch.testing.assert_close(y, exact.to(y.dtype), rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(dx, exact_dx.to(dx.dtype), rtol=1e-5, atol=1e-6, equal_nan=True)
    plain = file.plain_backward(dy.to(wide), x.to(wide), act, ALPHA)
    torch.testing.assert_close(plain, exact_dx, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (5,), ()])
def test_shapes_at_the_edge(shape: tuple[int, ...], device: str, check: Any, gradients: Any) -> None:
    x = make(shape, torch.float32, device)
    compare(x, torch.randn(shape, device=device), "silu", check, gradients)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op(act: str, dtype: torch.dtype, op_device: str, check: Any, gradients: Any) -> None:
    x, dy = make((2, 5, 24), dtype, op_device), torch.randn(2, 5, 24, device=op_device)
    reference = functools.partial(activation_reference, act=act, alpha=ALPHA)
    exact_y, exact = gradients(reference, [x], dy.to(dtype), torch.float64)
    eager_y, eager = gradients(STOCK[act], [x], dy)
    y, found = gradients(functools.partial(activation, act=act, alpha=ALPHA), [x], dy)
    check("y", y, eager_y, exact_y)
    check("x", found[0], eager[0], exact[0])


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_opcheck(act: str, op_device: str, opcheck: Any) -> None:
    x = make((4, 24), torch.float32, op_device)
    opcheck(file._forward_op, (x, act, ALPHA))
    opcheck(file._backward_op, (torch.randn(4, 24, device=op_device), x.detach(), act, ALPHA))


def test_its_input_alone_is_saved(op_device: str) -> None:
    x = make((4, 24), torch.float32, op_device)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda v: v):
        activation(x, act="gelu_tanh")
    assert [value.data_ptr() for value in saved] == [x.data_ptr()]


def test_both_ops_stand_in_the_joint_graph(op_device: str, joint_targets: Any) -> None:
    targets = joint_targets(lambda x: activation(x, act="gelu"), make((4, 24), torch.float32, op_device))
    assert targets == ["fxopt.activation.default", "fxopt.activation_backward.default"]


def test_second_derivatives_are_refused(op_device: str) -> None:
    x = make((4, 24), torch.float32, op_device)
    (dx,) = torch.autograd.grad(activation(x, act="silu").sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="fxopt::activation: second derivatives are not implemented"):
        dx.sum().backward()


def test_errors() -> None:
    with pytest.raises(ValueError, match="activation: act, expected one of"):
        activation(torch.ones(2), act="tanh")


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    """Rows 2^30 elements apart in a small view of a large tensor: the third starts at 2^31."""
    base = torch.zeros(2**31 + 64, dtype=torch.bfloat16, device="cuda")
    x = base.as_strided((3, 64), (2**30, 1))
    x.copy_(torch.randn(3, 64, device="cuda"))
    y = file.launch_forward(x, "silu", 1.0)
    exact = activation_reference(x.double(), act="silu")
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)
