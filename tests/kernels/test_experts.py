"""experts: the kernels and the ops against the reference, with empty experts, biases, limits and ids of none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.kernels.experts import experts, experts_reference, launches, order_of
from fxopt.kernels.experts import op as ops
from fxopt.kernels.experts.reference import plain_down_backward, plain_up_backward
from fxopt.kernels.glu import Form

# The interpreter multiplies the bits of bfloat16 tiles as integers.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
CLAMPED = {"alpha": 1.702, "gate_limit": 0.7, "up_limit": 0.6, "up_offset": 1.0}
FORMS: dict[str, dict[str, Any]] = {
    "packed": {"act": "silu"},
    "up first": {"act": "gelu", "gate_first": False, "scale": 1.5},
    "interleaved": {"act": "sigmoid_alpha", "layout": "interleaved", **CLAMPED},
    "interleaved, up first": {
        "act": "relu2",
        "layout": "interleaved",
        "gate_first": False,
        "gate_scale": 0.5,
    },
}
Arguments = list[torch.Tensor | None]


def make_inputs(
    device: str,
    dtype: torch.dtype,
    *,
    num_tokens: int = 13,
    num_choices: int = 2,
    num_experts: int = 5,
    width: int = 48,
    inner: int = 40,
    bias: bool = True,
    weight_dtype: torch.dtype | None = None,
    is_stored_transposed: bool = True,
) -> tuple[Arguments, torch.Tensor]:
    """Return x, the choices' weights, both products' weights and biases, and ids, one in seven of no expert."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, kind: torch.dtype | None = None) -> torch.Tensor:
        value = torch.randn(*shape, device=device, generator=generator) * scale
        return value.to(kind or dtype).requires_grad_()

    def matrix(inner: int, outer: int) -> torch.Tensor:
        if is_stored_transposed:
            return draw(num_experts, outer, inner, scale=inner**-0.5).detach().mT.requires_grad_()
        return draw(num_experts, inner, outer, scale=inner**-0.5)

    x = draw(num_tokens, width)
    weights = draw(num_tokens * num_choices, kind=weight_dtype)
    w_up, w_down = matrix(width, 2 * inner), matrix(inner, width)
    biases = (draw(num_experts, 2 * inner), draw(num_experts, width)) if bias else (None, None)
    # Expert 1 stays without rows.
    names = torch.tensor([e for e in range(num_experts) if e != 1], device=device)
    ids = torch.arange(num_tokens * num_choices, device=device) * 5 % len(names)
    ids = names[ids]
    ids[3::7] = num_experts
    return [x, weights, w_up, w_down, *biases], ids


def by_kernels(ids: torch.Tensor, attributes: dict[str, Any], arguments: Arguments, dy: torch.Tensor) -> Any:
    """Return the result and all gradients as the op makes them, from launches alone."""
    x, weights, w_up, w_down, b_up, b_down = arguments
    order = order_of(ids, w_up.shape[0])
    form = Form(**({"layout": "packed"} | attributes)).astuple()
    a = launches.launch_up(x, w_up, b_up, *order)
    y = launches.launch_down(a, w_down, b_down, weights, *order, *form, x.shape[0], x.dtype)
    needs = (True, True, b_down is not None, True)
    da, dw_down, db_down, dweights = launches.launch_down_backward(
        dy, a, w_down, b_down, weights, *order, *form, *needs
    )
    dx, dw_up, db_up = launches.launch_up_backward(da, x, w_up, *order, True, True, b_up is not None)
    return y, [dx, dweights, dw_up, dw_down, db_up, db_down]


def compute(ids: torch.Tensor, attributes: dict[str, Any], *arguments: torch.Tensor | None) -> torch.Tensor:
    x, weights, *rest = arguments
    return experts_reference(x, ids, weights, *rest, **attributes)


NAMES = ("x", "weights", "w_up", "w_down", "b_up", "b_down")


def between_values(limits: dict[str, Any], arguments: Arguments, ids: torch.Tensor) -> dict[str, Any]:
    """Return the attributes with each limit moved to where no value that it may cut off comes near it.

    What is rounded onto a limit passes a gradient, and whether it is depends on the order of a sum.
    """
    x, _, w_up, _, b_up, _ = (None if value is None else value.detach().double() for value in arguments)
    assert x is not None
    assert w_up is not None
    token = torch.arange(ids.numel(), device=ids.device) // (ids.numel() // x.shape[0])
    token, expert = token[ids < w_up.shape[0]], ids[ids < w_up.shape[0]]
    values = (x[token, None] @ w_up[expert]).squeeze(1) + (0 if b_up is None else b_up[expert])
    moved, eps = dict(limits), torch.finfo(torch.float16).eps
    for name in {"gate_limit", "up_limit"} & set(limits):
        known = values.abs().flatten().sort()[0]
        known = known[(known > limits[name] - 0.1) & (known < limits[name] + 0.5)]
        gap, place = known.diff().max(0)
        assert gap > 2 * eps
        moved[name] = (known[place] + gap / 2).item()
    return moved


def check_kernels(
    check: Callable[..., None],
    gradients: Callable[..., Any],
    device: str,
    dtype: torch.dtype,
    attributes: dict[str, Any],
    **sizes: Any,
) -> None:
    arguments, ids = make_inputs(device, dtype, **sizes)
    attributes = between_values(attributes, arguments, ids)
    function = functools.partial(compute, ids, attributes)
    torch.manual_seed(1)
    dy = torch.randn(arguments[0].shape, device=device).to(dtype)
    exact, exact_gradients = gradients(function, arguments, dy, torch.float64)
    eager, eager_gradients = gradients(function, arguments, dy)
    detached = [None if value is None else value.detach() for value in arguments]
    y, found = by_kernels(ids, attributes, detached, dy)
    check("y", y, eager, exact)
    for name, value, stock, oracle in zip(NAMES, found, eager_gradients, exact_gradients, strict=True):
        check(name, value, stock, oracle, dtype)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("packed", torch.float32),
        ("up first", torch.float16),
        ("interleaved", torch.float16),
        ("interleaved, up first", torch.float32),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (
                ("packed", torch.float16),
                ("up first", torch.float32),
                ("interleaved", torch.float32),
                ("interleaved, up first", torch.float16),
            )
        ),
        *(pytest.param(form, torch.bfloat16, marks=pytest.mark.gpu) for form in FORMS),
    ],
)
def test_kernels_agree_with_the_reference(
    check: Any, gradients: Any, device: str, form: str, dtype: torch.dtype
) -> None:
    check_kernels(check, gradients, device, dtype, FORMS[form])


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_tokens": 1, "num_choices": 1, "num_experts": 1},
        pytest.param(
            {"num_tokens": 20, "num_choices": 4, "num_experts": 40, "width": 130, "inner": 129},
            marks=pytest.mark.slow,
        ),
        {"num_tokens": 9, "num_choices": 3, "width": 16, "inner": 8, "is_stored_transposed": False},
        {"num_tokens": 9, "num_choices": 3, "bias": False},
        {"num_tokens": 9, "num_choices": 2, "weight_dtype": torch.float32},
        pytest.param(
            {"num_tokens": 2, "num_choices": 1, "num_experts": 2, "width": 1100, "inner": 1030},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_kernels_agree_at_other_sizes(check: Any, gradients: Any, device: str, sizes: dict[str, Any]) -> None:
    check_kernels(check, gradients, device, HALF, FORMS["packed"], **sizes)


def test_kernels_agree_where_experts_have_several_tiles_of_rows(
    check: Any, gradients: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles that belong to one expert, the last one short, and then to another; smaller ones in the interpreter."""
    num_tokens = 300
    if device == "cpu":
        num_tokens = 42
        monkeypatch.setattr(launches, "SUM_ROWS", 8)
        monkeypatch.setitem(launches.HALF_TILE, "BLOCK_ROWS", 8)
        monkeypatch.setitem(launches.HALF_GRADIENT_TILE, "BLOCK_ROWS", 8)
    sizes = {"num_tokens": num_tokens, "num_choices": 1, "num_experts": 3, "width": 63, "inner": 33}
    check_kernels(check, gradients, device, HALF, FORMS["packed"], **sizes)


@pytest.mark.parametrize("form", FORMS)
def test_the_op_agrees_with_the_reference(check: Any, gradients: Any, op_device: str, form: str) -> None:
    arguments, ids = make_inputs(op_device, torch.float32)

    def run(*given: torch.Tensor | None) -> torch.Tensor:
        x, weights, *rest = given
        return experts(x, ids, weights, *rest, **FORMS[form])

    reference = functools.partial(compute, ids, FORMS[form])
    dy = torch.randn(arguments[0].shape, device=op_device)
    exact, exact_gradients = gradients(reference, arguments, dy, torch.float64)
    eager, eager_gradients = gradients(reference, arguments, dy)
    y, found = gradients(run, arguments, dy)
    check("y", y, eager, exact)
    for name, value, stock, oracle in zip(NAMES, found, eager_gradients, exact_gradients, strict=True):
        check(name, value, stock, oracle)


def test_choices_of_no_expert_add_nothing_and_get_no_gradient(op_device: str) -> None:
    arguments, ids = make_inputs(op_device, torch.float32)
    x, weights, *rest = arguments
    y = experts(x, torch.full_like(ids, 5), weights, *rest, act="silu")
    assert torch.equal(y, torch.zeros_like(y))
    found = torch.autograd.grad(y.sum(), [value for value in arguments if value is not None])
    assert all(torch.equal(value, torch.zeros_like(value)) for value in found)


def test_gradients_that_are_not_needed_are_not_computed(op_device: str) -> None:
    arguments, ids = make_inputs(op_device, torch.float32)
    x, weights, *rest = arguments
    frozen = [value.detach() for value in rest if value is not None]
    y = experts(x, ids, weights, *frozen, act="silu")
    dx, dweights = torch.autograd.grad(y.sum(), [x, weights])
    full = experts(x, ids, weights, *rest, act="silu")
    expected = torch.autograd.grad(full.sum(), [x, weights])
    assert torch.equal(dx, expected[0])
    assert torch.equal(dweights, expected[1])


def test_a_gradient_lies_in_memory_as_its_weight(device: str) -> None:
    arguments, ids = make_inputs(device, HALF, num_tokens=5)
    detached = [None if value is None else value.detach() for value in arguments]
    _, found = by_kernels(ids, FORMS["packed"], detached, torch.ones_like(detached[0]))
    assert found[2].stride() == arguments[2].stride()
    assert found[3].stride() == arguments[3].stride()


def test_two_runs_give_the_same_bits(device: str) -> None:
    arguments, ids = make_inputs(device, HALF)
    detached = [None if value is None else value.detach() for value in arguments]
    dy = torch.ones_like(detached[0])
    first = by_kernels(ids, FORMS["packed"], detached, dy)
    second = by_kernels(ids, FORMS["packed"], detached, dy)
    for one, other in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
        assert torch.equal(one, other)


def test_both_directions_stand_in_the_joint_graph(joint_targets: Any, op_device: str) -> None:
    arguments, ids = make_inputs(op_device, torch.float32)

    def run(ids: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        x, weights, *rest = given
        return experts(x, ids, weights, *rest, act="silu")

    assert joint_targets(run, ids, *arguments) == [
        "fxopt.experts_up.default",
        "fxopt.experts_down.default",
        "fxopt.experts_down_backward.default",
        "fxopt.experts_up_backward.default",
    ]


def test_ops_are_sound(opcheck: Any, op_device: str) -> None:
    (x, weights, w_up, w_down, b_up, b_down), ids = make_inputs(op_device, torch.float32)
    order = order_of(
        ids.clamp(max=4), 5
    )  # kernels leave the rows of no expert unwritten, and nobody reads them
    form = Form("silu", layout="packed").astuple()
    a = ops.up_op(x, w_up, b_up, *order)
    y = torch.randn_like(x)
    opcheck(ops.up_op, (x, w_up, b_up, *order))
    opcheck(ops.up_backward_op, (a, x, w_up, *order, True, True, True))
    opcheck(ops.down_op, (a, w_down, b_down, weights, *order, *form, x.shape[0], torch.bfloat16))
    opcheck(ops.down_backward_op, (y, a, w_down, b_down, weights, *order, *form, True, True, True, True))


def test_what_is_saved_is_the_first_product_and_integers(op_device: str) -> None:
    arguments, ids = make_inputs(op_device, torch.float32, bias=False)
    x, weights, w_up, w_down, *_ = arguments
    given = {value.untyped_storage().data_ptr() for value in (x, weights, w_up, w_down)}
    kept: dict[int, torch.Tensor] = {}

    def note(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in given:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        y = experts(x, ids, weights, w_up, w_down, act="silu")
    floats = [tuple(value.shape) for value in kept.values() if value.is_floating_point()]
    integers = sum(value.numel() for value in kept.values() if not value.is_floating_point())
    assert floats == [(ids.numel(), 2 * 40)]
    assert integers == 2 * ids.numel() + 5
    y.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": "cosine"}, "experts: act, expected one of"),
        ({"layout": "split"}, "experts: layout, expected one of"),
    ],
)
def test_bad_attributes_are_refused(change: dict[str, Any], message: str) -> None:
    (x, weights, *rest), ids = make_inputs("cpu", torch.float32)
    with pytest.raises(ValueError, match=message):
        experts(x, ids, weights, *rest, **({"act": "silu"} | change))


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    (x, weights, w_up, w_down, *_), ids = make_inputs("cpu", torch.float32)
    with pytest.raises(ValueError, match=r"experts: expected x \[T, H\], w_up \[E, H, 2 I\]"):
        experts(x[:, 1:], ids, weights, w_up, w_down, act="silu")
    with pytest.raises(ValueError, match="experts: weights and biases, expected one dtype"):
        experts(x, ids, weights, w_up, w_down.double(), act="silu")


def test_plain_gradients_leave_out_what_is_not_needed() -> None:
    (x, weights, w_up, w_down, b_up, b_down), ids = make_inputs("cpu", torch.float32)
    order = order_of(ids, 5)
    form = Form("silu", layout="packed").astuple()
    a = ops.up_op(x, w_up, b_up, *order)
    none = (False, False, False)
    assert plain_up_backward(a, x, w_up, *order, *none) == (None, None, None)
    found = plain_down_backward(x, a, w_down, b_down, weights, *order, *form, *none, False)
    assert found == (None, None, None, None)
