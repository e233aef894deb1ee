"""add_rms_norm: the kernels and the op against the reference."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fxopt.kernels import add_rms_norm as file
from fxopt.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from fxopt.kernels.rms_norm.launches import MOST_TILE_COLUMNS

FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": {"offset": 1.0, "cast_first": False},
    "granite": {"scale": 0.22},
    "centred": {"centre": True, "cast_first": False},
    "float32_out": {"out_dtype": torch.float32},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Values = list[torch.Tensor | None]


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, weight: bool = True) -> Values:
    x, skip = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    w = (torch.randn(shape[-1], device=device) * 0.2 + 1).to(dtype).requires_grad_() if weight else None
    return [x, skip, w]


def run_kernel(
    inputs: Values, dh: torch.Tensor | None, dy: torch.Tensor, form: dict[str, Any], needs: tuple[bool, ...]
) -> tuple[torch.Tensor, torch.Tensor, Values]:
    x, skip, weight = inputs
    assert x is not None
    assert skip is not None
    defaults = {
        "scale": 1.0,
        "eps": 1e-6,
        "offset": 0.0,
        "cast_first": True,
        "centre": False,
        "out_dtype": None,
    }
    scale, eps, offset, cast_first, centre, out_dtype = (defaults | form).values()
    h, y, statistics = file.launch_forward(x, skip, weight, scale, eps, offset, cast_first, centre, out_dtype)
    dh = None if dh is None else dh.to(h.dtype)
    found = file.launch_backward(
        dh, dy.to(y.dtype), h, weight, statistics, scale, offset, centre, x.dtype, skip.dtype, *needs
    )
    return h, y, list(found)


def by_autograd(
    function: Any,
    inputs: Values,
    dh: torch.Tensor | None,
    dy: torch.Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Values]:
    """Return h, y and the gradients of the inputs that require them; dh or dy is None where it is not read."""
    leaves = [
        None if value is None else value.detach().to(dtype or value.dtype).requires_grad_(value.requires_grad)
        for value in inputs
    ]
    h, y = function(*leaves)
    pairs = [
        (out, seed.to(out.dtype))
        for out, seed in ((h, dh), (y, dy))
        if seed is not None and out.requires_grad
    ]
    outs, seeds = zip(*pairs, strict=True)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = iter(torch.autograd.grad(outs, wanted, seeds, allow_unused=True) if wanted else ())
    return (
        h.detach(),
        y.detach(),
        [next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves],
    )


def compare(inputs: Values, form: dict[str, Any], check: Any, *, with_dh: bool = True) -> None:
    x = inputs[0]
    assert x is not None
    dtype = min((value.dtype for value in inputs[:2] if value is not None), key=lambda d: d.itemsize)
    exact_form = {key: value for key, value in form.items() if key != "out_dtype"}
    dh, dy = (torch.randn(x.shape, device=x.device).to(dtype) for _ in range(2))
    dh = dh if with_dh else None
    exact_reference = functools.partial(add_rms_norm_reference, eps=1e-6, **exact_form)
    reference = functools.partial(add_rms_norm_reference, eps=1e-6, **form)
    exact = by_autograd(exact_reference, inputs, dh, dy, torch.float64)
    eager = by_autograd(reference, inputs, dh, dy)
    needs = tuple(value is not None and value.requires_grad for value in inputs)
    with torch.no_grad():
        h, y, found = run_kernel(inputs, dh, dy, form, needs)
    check("h", h, eager[0], exact[0], dtype)
    check("y", y, eager[1], exact[1], dtype)
    for name, value, stock, truth in zip(("x", "skip", "weight"), found, eager[2], exact[2], strict=True):
        check(name, value, stock, truth, dtype)


@pytest.mark.usefixtures("wide_sums")
@pytest.mark.parametrize("width", [1, 63, 1000, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths(width: int, dtype: torch.dtype, device: str, check: Any) -> None:
    compare(make((2, 5, width), dtype, device), {}, check)


@pytest.mark.usefixtures("wide_sums")
@pytest.mark.parametrize("name", ["llama", "granite"])
@pytest.mark.parametrize("width", [512, 700])
def test_programs_take_several_turns(width: int, name: str, device: str, check: Any) -> None:
    rows = 61 if device == "cpu" else 5003
    compare(make((rows, width), torch.bfloat16, device), FORMS[name], check)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_dh", [True, False])
def test_forms(name: str, dtype: torch.dtype, with_dh: bool, device: str, check: Any) -> None:
    compare(make((7, 63), dtype, device, weight=with_dh), FORMS[name], check, with_dh=with_dh)


@pytest.mark.usefixtures("wide_sums")
@pytest.mark.parametrize("name", [pytest.param("granite", marks=pytest.mark.slow), "centred"])
def test_rows_longer_than_a_tile(name: str, device: str, check: Any) -> None:
    compare(make((4, MOST_TILE_COLUMNS + 3), torch.bfloat16, device), FORMS[name], check)


@pytest.mark.usefixtures("wide_sums")
@pytest.mark.parametrize(
    "num_rows",
    [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 7)), pytest.param(300, marks=pytest.mark.gpu)],
)
def test_the_longest_tile_over_several_turns(num_rows: int, device: str, check: Any) -> None:
    """On a GPU the loop over rows is pipelined, and of the tiles this long the weight is not."""
    compare(make((num_rows, MOST_TILE_COLUMNS), torch.bfloat16, device), {}, check)


@pytest.mark.parametrize("wide", [0, 1, 2])
def test_one_input_in_float32(wide: int, device: str, check: Any) -> None:
    inputs = make((5, 96), torch.bfloat16, device)
    inputs[wide] = inputs[wide].detach().float().requires_grad_()  # type: ignore[union-attr]
    compare(inputs, {}, check)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("name", ["llama", "granite"])
def test_only_the_gradients_needed(frozen: tuple[int, ...], name: str, device: str, check: Any) -> None:
    inputs = make((5, 96), torch.float32, device)
    for index in frozen:
        inputs[index] = inputs[index].detach()  # type: ignore[union-attr]
    compare(inputs, FORMS[name], check)


@pytest.mark.parametrize("layout", ["row_stride", "transposed", "column_stride", "expanded"])
def test_strides(layout: str, device: str, check: Any) -> None:
    def lay_out() -> torch.Tensor:
        base = torch.randn(3, 8, 128, device=device)
        return {
            "row_stride": base[..., :64],
            "transposed": base[..., :64].transpose(0, 1),
            "column_stride": base[..., ::2],
            "expanded": base[:1, :1, :64].expand(3, 8, 64),
        }[layout]

    weight = torch.randn(128, device=device)[::2]
    inputs: Values = [lay_out(), lay_out(), weight]
    dh, dy = lay_out(), lay_out()
    inputs = [value.detach().requires_grad_() for value in inputs if value is not None]
    exact = by_autograd(functools.partial(add_rms_norm_reference, eps=1e-6), inputs, dh, dy, torch.float64)
    eager = by_autograd(functools.partial(add_rms_norm_reference, eps=1e-6), inputs, dh, dy)
    with torch.no_grad():
        h, y, found = run_kernel(inputs, dh, dy, {}, (True, True, True))
    for value, stock, truth in zip(
        (h, y, *found), (*eager[:2], *eager[2]), (*exact[:2], *exact[2]), strict=True
    ):
        check(layout, value, stock, truth)


def test_inputs_are_not_written_to(device: str) -> None:
    inputs = make((5, 96), torch.float32, device)
    dh, dy = torch.randn(5, 96, device=device), torch.randn(5, 96, device=device)
    with torch.no_grad():
        before = [value.clone() for value in (*inputs, dh, dy) if value is not None]
        run_kernel(inputs, dh, dy, {}, (True, True, True))
    assert all(map(torch.equal, before, [value for value in (*inputs, dh, dy) if value is not None]))


def test_the_same_bits_twice(device: str) -> None:
    inputs = make((100, 256), torch.bfloat16, device)
    dh, dy = (torch.randn(100, 256, device=device) for _ in range(2))
    with torch.no_grad():
        first, second = (run_kernel(inputs, dh, dy, {}, (True, True, True)) for _ in range(2))
    for a, b in zip((*first[:2], *first[2]), (*second[:2], *second[2]), strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_a_planted_nan_stays_in_its_row(device: str) -> None:
    inputs = make((5, 96), torch.float32, device)
    assert inputs[1] is not None
    with torch.no_grad():
        inputs[1][2, 7] = float("nan")
        one = torch.ones(5, 96, device=device)
        h, y, found = run_kernel(inputs, one, one, {}, (True, True, True))
    bad = torch.tensor([False, False, True, False, False], device=device)
    assert h.isnan().sum() == 1
    assert torch.equal(y.isnan().any(1), bad)
    assert found[0] is not None
    assert torch.equal(found[0].isnan().any(1), bad)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows(shape: tuple[int, ...], op_device: str) -> None:
    x = torch.randn(shape, device=op_device, requires_grad=True)
    weight = torch.randn(64, device=op_device, requires_grad=True)
    h, y = add_rms_norm(x, x.detach(), weight, eps=1e-6)
    (h.sum() + y.sum()).backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("read", ["h", "y", "both"])
@pytest.mark.parametrize("skip_dtype", [torch.float32, torch.float64], ids=str)
def test_op(name: str, read: str, skip_dtype: torch.dtype, op_device: str) -> None:
    inputs = make((2, 5, 24), torch.float32, op_device)
    assert inputs[1] is not None
    inputs[1] = inputs[1].detach().to(skip_dtype).requires_grad_()
    dh, dy = torch.randn(2, 5, 24, device=op_device), torch.randn(2, 5, 24, device=op_device)
    seeds = (dh if read != "y" else None, dy if read != "h" else None)
    exact = by_autograd(functools.partial(add_rms_norm_reference, eps=1e-6, **FORMS[name]), inputs, *seeds)
    found = by_autograd(functools.partial(add_rms_norm, eps=1e-6, **FORMS[name]), inputs, *seeds)
    for value, truth in zip((*found[:2], *found[2]), (*exact[:2], *exact[2]), strict=True):
        if truth is None:
            assert value is None
        else:
            torch.testing.assert_close(value, truth)


@pytest.mark.parametrize("name", ["llama", "granite", "centred"])
def test_opcheck(name: str, op_device: str, opcheck: Any) -> None:
    inputs = make((4, 24), torch.float32, op_device)
    form = FORMS[name]
    scale, offset, centre = form.get("scale", 1.0), form.get("offset", 0.0), form.get("centre", False)
    arguments = (*inputs, scale, 1e-6, offset, True, centre, None)
    opcheck(file.forward_op, arguments)
    with torch.no_grad():
        h, y, statistics = file.forward_op(*arguments)
    weight = inputs[2].detach()  # type: ignore[union-attr]
    rest = (scale, offset, centre, torch.float32, torch.float32, True, scale != 1.0, True)
    for dh in (torch.randn_like(h), None):
        opcheck(file.backward_op, (dh, torch.randn_like(y), h, weight, statistics, *rest))


def test_both_ops_stand_in_the_joint_graph(op_device: str, joint_targets: Any) -> None:
    inputs = make((4, 24), torch.float32, op_device)

    def function(x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        h, y = add_rms_norm(x, skip, weight, eps=1e-6)
        return h.sin() + y

    targets = joint_targets(function, *inputs)
    assert targets == ["fxopt.add_rms_norm.default", "fxopt.add_rms_norm_backward.default"]


def test_x_and_skip_share_their_gradient() -> None:
    x, skip, weight = make((4, 24), torch.float32, "cpu")
    h, y = add_rms_norm(x, skip, weight, eps=1e-6)  # type: ignore[arg-type]
    dx, dskip = torch.autograd.grad((h, y), (x, skip), (torch.ones_like(h), torch.ones_like(y)))  # type: ignore[arg-type]
    assert dx.data_ptr() == dskip.data_ptr()


@pytest.mark.parametrize(
    ("skip", "weight", "text"),
    [
        (torch.ones(1, 4), None, r"skip, expected shape \(2, 4\), got \(1, 4\)"),
        (torch.ones(2, 4), torch.ones(3), r"weight, expected shape \(4,\), got \(3,\)"),
    ],
)
def test_errors(skip: Any, weight: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        add_rms_norm(torch.ones(2, 4), skip, weight, eps=1e-6)


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    """Rows 2^30 elements apart in small views of a large tensor: the third starts at 2^31."""
    base = torch.zeros(2**31 + 128, dtype=torch.bfloat16, device="cuda")
    x, skip = base.as_strided((3, 64), (2**30, 1)), base.as_strided((3, 64), (2**30, 1), 64)
    x.copy_(torch.randn(3, 64, device="cuda"))
    skip.copy_(torch.randn(3, 64, device="cuda"))
    with torch.no_grad():
        h, y, found = run_kernel([x, skip, None], skip, x, {}, (True, True, False))
    exact_h, exact_y = add_rms_norm_reference(x.double(), skip.double(), eps=1e-6)
    torch.testing.assert_close(h.double(), exact_h, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(y.double(), exact_y, rtol=1e-2, atol=1e-2)
    assert found[0] is not None
    assert found[0].isfinite().all()
