"""layer_norm: the kernels and the op against the reference, and the reference against torch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt.kernels import layer_norm as file
from fxopt.kernels.layer_norm import launches, layer_norm, layer_norm_reference
from fxopt.kernels.layer_norm.launches import LONG_MULTIPLE, MOST_KEPT_COLUMNS
from fxopt.kernels.layer_norm.op import backward_op, forward_op
from fxopt.kernels.rms_norm.launches import MOST_TILE_COLUMNS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Values = list[torch.Tensor | None]
EPS = 1e-5


def make(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, *, weight: bool = True, bias: bool = True
) -> Values:
    return [
        (torch.randn(shape, device=device) + 0.5).to(dtype).requires_grad_(),
        (torch.randn(shape[-1], device=device) * 0.2 + 1).to(dtype).requires_grad_() if weight else None,
        torch.randn(shape[-1], device=device).to(dtype).requires_grad_() if bias else None,
    ]


def run_kernel(
    inputs: Values, dy: torch.Tensor, needs: tuple[bool, ...], out_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, Values]:
    y, statistics = file.launch_forward(*inputs, EPS, out_dtype)  # type: ignore[arg-type]
    return y, list(file.launch_backward(dy.to(y.dtype), *inputs, statistics, *needs))  # type: ignore[arg-type]


def compare(
    inputs: Values, check: Any, gradients: Any, dy: Any = None, out_dtype: torch.dtype | None = None
) -> None:
    x = inputs[0]
    assert x is not None
    dy = torch.randn(x.shape, device=x.device).to(x.dtype) if dy is None else dy
    reference = functools.partial(layer_norm_reference, eps=EPS)
    exact_y, exact = gradients(reference, inputs, dy, torch.float64)
    eager_y, eager = gradients(functools.partial(reference, out_dtype=out_dtype), inputs, dy)
    needs = tuple(tensor is not None and tensor.requires_grad for tensor in inputs)
    with torch.no_grad():
        y, found = run_kernel(inputs, dy, needs, out_dtype)
    check("y", y, eager_y, exact_y, x.dtype)
    for name, value, stock, truth in zip(("x", "weight", "bias"), found, eager, exact, strict=True):
        check(name, value, stock, truth, x.dtype)


@pytest.mark.usefixtures("wide_sums")
@pytest.mark.parametrize("width", [1, 63, 1000, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths(width: int, dtype: torch.dtype, device: str, check: Any, gradients: Any) -> None:
    compare(make((2, 5, width), dtype, device), check, gradients)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_and_without_weight_and_bias(
    weight: bool, bias: bool, dtype: torch.dtype, device: str, check: Any, gradients: Any
) -> None:
    compare(make((7, 63), dtype, device, weight=weight, bias=bias), check, gradients)


@pytest.mark.usefixtures("wide_sums")
@pytest.mark.parametrize(
    ("width", "frozen"),
    [
        (MOST_TILE_COLUMNS + 3, ()),
        (MOST_TILE_COLUMNS - 5, (1, 2)),
        *(
            pytest.param(width, frozen, marks=pytest.mark.slow)
            for width, frozen in (
                (MOST_TILE_COLUMNS - 5, ()),
                (MOST_TILE_COLUMNS - 5, (1,)),
                (MOST_TILE_COLUMNS + 3, (2,)),
                (MOST_TILE_COLUMNS + 3, (1, 2)),
            )
        ),
    ],
)
def test_long_rows(width: int, frozen: tuple[int, ...], device: str, check: Any, gradients: Any) -> None:
    inputs = make((4, width), torch.bfloat16, device)
    for index in frozen:
        inputs[index] = inputs[index].detach()  # type: ignore[union-attr]
    compare(inputs, check, gradients)


LONG_WIDTH = MOST_KEPT_COLUMNS + LONG_MULTIPLE


@pytest.fixture
def _in_pieces_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "layer_norm_backward_kernel", None)


@pytest.mark.usefixtures("wide_sums", "_in_pieces_only")
@pytest.mark.parametrize(
    ("frozen", "weight", "dtype"),
    [
        ((), True, torch.bfloat16),
        ((0,), True, torch.float16),
        ((1,), True, torch.bfloat16),
        ((2,), True, torch.bfloat16),
        ((), False, torch.bfloat16),
    ],
    ids=str,
)
def test_long_rows_in_pieces(
    frozen: tuple[int, ...], weight: bool, dtype: torch.dtype, device: str, check: Any, gradients: Any
) -> None:
    inputs = make((4, LONG_WIDTH), dtype, device, weight=weight)
    for index in frozen:
        inputs[index] = inputs[index].detach()  # type: ignore[union-attr]
    compare(inputs, check, gradients)


@pytest.mark.usefixtures("wide_sums", "_in_pieces_only")
@pytest.mark.parametrize("num_rows", [5, pytest.param(300, marks=pytest.mark.gpu)])
def test_long_rows_of_a_larger_tensor_in_pieces(
    num_rows: int, device: str, check: Any, gradients: Any
) -> None:
    inputs = make((num_rows, LONG_WIDTH), torch.bfloat16, device)
    inputs[1:] = [value.detach().float().requires_grad_() for value in inputs[1:] if value is not None]
    x, dy = (
        torch.randn(num_rows, 2 * LONG_WIDTH, device=device).bfloat16()[:, :LONG_WIDTH] for _ in range(2)
    )
    inputs[0] = x.detach().requires_grad_()
    assert not inputs[0].is_contiguous()
    compare(inputs, check, gradients, dy, out_dtype=torch.bfloat16)


@pytest.mark.usefixtures("wide_sums")
@pytest.mark.parametrize(
    ("width", "stride", "dtype"),
    [
        (LONG_WIDTH + 8, LONG_WIDTH + 8, torch.bfloat16),
        (LONG_WIDTH, LONG_WIDTH + 8, torch.bfloat16),
        (LONG_WIDTH, LONG_WIDTH, torch.float32),
    ],
    ids=str,
)
def test_long_rows_that_do_not_go_in_pieces(
    width: int,
    stride: int,
    dtype: torch.dtype,
    device: str,
    check: Any,
    gradients: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launches, "layer_norm_long_backward_kernel", None)
    inputs = make((2, width), dtype, device)
    inputs[0] = torch.randn(2, stride, device=device).to(dtype)[:, :width].detach().requires_grad_()
    compare(inputs, check, gradients)


@pytest.mark.usefixtures("_in_pieces_only")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_a_long_row_spoils_no_other(value: float, device: str) -> None:
    inputs = make((4, LONG_WIDTH), torch.bfloat16, device)
    dy = torch.randn(4, LONG_WIDTH, device=device).to(torch.bfloat16)
    dy[0, 5] = value  # in the interpreter the first of three programs takes the last row too
    with torch.no_grad():
        _, (dx, *sums) = run_kernel(inputs, dy, (True, True, True))
    assert dx is not None
    assert not dx[0].isfinite().any()
    assert dx[1:].isfinite().all()
    for total in sums:
        assert total is not None
        assert total.isfinite().logical_not().nonzero().tolist() == [[5]]


@pytest.mark.usefixtures("wide_sums")
@pytest.mark.parametrize(
    ("num_rows", "width"),
    [
        (7, 4096),
        (13, 2048),
        (13, 1500),
        pytest.param(1, MOST_TILE_COLUMNS, marks=pytest.mark.slow),
        pytest.param(7, MOST_TILE_COLUMNS, marks=pytest.mark.slow),
        pytest.param(300, 4096, marks=pytest.mark.gpu),
        pytest.param(5003, 2048, marks=pytest.mark.gpu),
        pytest.param(5003, 1500, marks=pytest.mark.gpu),
        pytest.param(300, MOST_TILE_COLUMNS, marks=pytest.mark.gpu),
    ],
)
def test_several_turns_of_the_loop_over_rows(
    num_rows: int, width: int, device: str, check: Any, gradients: Any
) -> None:
    compare(make((num_rows, width), torch.bfloat16, device), check, gradients)


def test_many_short_rows(device: str, check: Any, gradients: Any) -> None:
    compare(make((2, 301, 1, 128), torch.bfloat16, device), check, gradients)


def test_a_mean_far_from_zero(device: str, check: Any, gradients: Any) -> None:
    inputs = make((5, 96), torch.float32, device)
    inputs[0] = (inputs[0].detach() + 1000).requires_grad_()  # type: ignore[union-attr]
    compare(inputs, check, gradients)


def test_an_output_in_float32(device: str, check: Any, gradients: Any) -> None:
    compare(make((5, 96), torch.bfloat16, device), check, gradients, out_dtype=torch.float32)


def test_weight_and_bias_of_another_dtype(device: str, check: Any, gradients: Any) -> None:
    inputs = make((5, 96), torch.bfloat16, device)
    inputs[1:] = [value.detach().float().requires_grad_() for value in inputs[1:] if value is not None]
    compare(inputs, check, gradients)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_only_the_gradients_needed(frozen: tuple[int, ...], device: str, check: Any, gradients: Any) -> None:
    inputs = make((5, 96), torch.float32, device)
    for index in frozen:
        inputs[index] = inputs[index].detach()  # type: ignore[union-attr]
    compare(inputs, check, gradients)


@pytest.mark.parametrize("layout", ["row_stride", "transposed", "column_stride", "expanded"])
def test_strides(layout: str, device: str, check: Any, gradients: Any) -> None:
    def lay_out() -> torch.Tensor:
        base = torch.randn(3, 8, 128, device=device)
        return {
            "row_stride": base[..., :64],
            "transposed": base[..., :64].transpose(0, 1),
            "column_stride": base[..., ::2],
            "expanded": base[:1, :1, :64].expand(3, 8, 64),
        }[layout]

    weight, bias = (torch.randn(128, device=device)[::2].requires_grad_() for _ in range(2))
    compare([lay_out().detach().requires_grad_(), weight, bias], check, gradients, lay_out())


def test_the_same_bits_twice(device: str) -> None:
    inputs = make((100, 256), torch.bfloat16, device)
    dy = torch.randn(100, 256, device=device)
    with torch.no_grad():
        first, second = (run_kernel(inputs, dy, (True, True, True)) for _ in range(2))
    for a, b in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_a_planted_nan_stays_in_its_row(device: str) -> None:
    inputs = make((5, 96), torch.float32, device)
    assert inputs[0] is not None
    with torch.no_grad():
        inputs[0][2, 7] = float("nan")
        y, found = run_kernel(inputs, torch.ones(5, 96, device=device), (True, True, True))
    bad = torch.tensor([False, False, True, False, False], device=device)
    assert found[0] is not None
    assert torch.equal(y.isnan().any(1), bad)
    assert torch.equal(found[0].isnan().any(1), bad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_reference_is_torchs_own_norm(dtype: torch.dtype) -> None:
    x, weight, bias = make((3, 5, 40), dtype, "cpu")
    assert x is not None
    torch.testing.assert_close(
        layer_norm_reference(x, weight, bias, eps=EPS), F.layer_norm(x, (40,), weight, bias, EPS)
    )


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows(shape: tuple[int, ...], op_device: str) -> None:
    x = torch.randn(shape, device=op_device, requires_grad=True)
    weight, bias = (torch.randn(64, device=op_device, requires_grad=True) for _ in range(2))
    layer_norm(x, weight, bias, eps=EPS).sum().backward()
    for value in (weight, bias):
        assert value.grad is not None
        assert torch.equal(value.grad, torch.zeros_like(value))


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_op(weight: bool, bias: bool, op_device: str, gradients: Any) -> None:
    inputs = make((2, 5, 24), torch.float32, op_device, weight=weight, bias=bias)
    dy = torch.randn(2, 5, 24, device=op_device)
    exact_y, exact = gradients(functools.partial(layer_norm_reference, eps=EPS), inputs, dy)
    y, found = gradients(functools.partial(layer_norm, eps=EPS), inputs, dy)
    torch.testing.assert_close(y, exact_y)
    for value, exact_value in zip(found, exact, strict=True):
        torch.testing.assert_close(value, exact_value)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias: bool, op_device: str, opcheck: Any) -> None:
    inputs = make((4, 24), torch.float32, op_device, bias=bias)
    opcheck(forward_op, (*inputs, EPS, None))
    with torch.no_grad():
        y, statistics = forward_op(*inputs, EPS, None)
    fixed = [None if tensor is None else tensor.detach() for tensor in inputs]
    opcheck(backward_op, (y, *fixed, statistics, True, True, bias))


def test_both_ops_stand_in_the_joint_graph(op_device: str, joint_targets: Any) -> None:
    inputs = make((4, 24), torch.float32, op_device)
    targets = joint_targets(lambda x, w, b: layer_norm(x, w, b, eps=EPS), *inputs)
    assert targets == ["fxopt.layer_norm.default", "fxopt.layer_norm_backward.default"]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_errors(name: str) -> None:
    with pytest.raises(ValueError, match=rf"layer_norm: {name}, expected shape \(4,\), got \(3,\)"):
        layer_norm(torch.ones(2, 4), eps=EPS, **{name: torch.ones(3)})


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    """Rows 2^30 elements apart in a small view of a large tensor: the third starts at 2^31."""
    base = torch.zeros(2**31 + 64, dtype=torch.bfloat16, device="cuda")
    x = base.as_strided((3, 64), (2**30, 1))
    x.copy_(torch.randn(3, 64, device="cuda"))
    with torch.no_grad():
        y, found = run_kernel([x, None, None], x, (True, False, False))
    torch.testing.assert_close(y.double(), layer_norm_reference(x.double(), eps=EPS), rtol=1e-2, atol=1e-2)
    assert found[0] is not None
    assert found[0].isfinite().all()
