"""norm_rope: the kernels and the op against the reference, and against its two steps alone."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from fxopt.kernels import norm_rope as file
from fxopt.kernels.norm_rope import Form, norm_rope, norm_rope_reference
from fxopt.kernels.norm_rope.launches import _programs_of, tile_of
from fxopt.kernels.norm_rope.op import backward_op, forward_op
from fxopt.kernels.norm_rope.reference import plain_backward
from fxopt.kernels.rms_norm import rms_norm
from fxopt.kernels.rope import rope

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCH, TOKENS = 2, 5
FEW_TOKENS = 2  # for norms over all heads, of which a tile holds one token: programs still walk several tiles
SIZES = (2, 16, 80, 128, 256)
PARTS = ((0, 4), (12, 4), (0, 14), (0, 16))
PAIRS = {
    "half": dict(pairing="half", out_pairing="half"),
    "interleaved": dict(pairing="interleaved", out_pairing="interleaved"),
    "apart": dict(pairing="interleaved", out_pairing="half"),
}


exhaustive = pytest.mark.exhaustive


def make(
    heads: tuple[int, int],
    size: int,
    items: int,
    dtype: torch.dtype,
    device: str,
    per_head: bool = True,
    tokens: int = TOKENS,
) -> list[torch.Tensor]:
    """Return q and k, [batch, tokens, heads, D], their weights, and tables."""
    pair = [torch.randn(BATCH, tokens, each, size, device=device).to(dtype) for each in heads]
    widths = [size if per_head else each * size for each in heads]
    weights = [(1 + torch.randn(width, device=device) / 4).to(dtype) for width in widths]
    tables = [torch.randn(1, tokens, items, device=device).to(dtype) for _ in range(2)]
    return [*pair, *weights, *tables]


def form_of(size: int, dtype: torch.dtype, **given: Any) -> Form:
    plain = dict(
        eps=1e-6, offset=0.0, cast_first=True, per_head=True, norm_dtype=dtype, pairing="half", out_pairing="half",
        start=0, length=size, sign=1, head_major=[False, False],
    )  # fmt: skip
    return Form(**plain | given)


def reference(x: torch.Tensor, weight: Any, cos: torch.Tensor, sin: torch.Tensor, form: Form) -> torch.Tensor:
    given = {field.name: getattr(form, field.name) for field in dataclasses.fields(form)}
    del given["head_major"], given["norm_dtype"]
    return norm_rope_reference(x, weight, cos, sin, **given)


def compare(tensors: list[torch.Tensor], form: Form, check: Any, gradients: Any) -> None:
    """Check forward and backward of the kernels against the reference: in fp64 and, as eager, in its own dtype."""
    q, k, q_w, k_w, cos, sin = tensors
    y, k_y = file.launch_forward(*tensors, *form.astuple(), q.dtype)
    dy, dk_y = torch.randn_like(y), torch.randn_like(k_y)
    dq, dk, dq_w, dk_w = file.launch_backward(dy, dk_y, *tensors, *form.astuple(), True)
    for x, w, value, gradient, found in ((q, q_w, y, dy, (dq, dq_w)), (k, k_w, k_y, dk_y, (dk, dk_w))):
        inputs = [x.detach().requires_grad_(), None if w is None else w.detach().requires_grad_(), cos, sin]
        exact_y, exact = gradients(lambda *t: reference(*t, form), inputs, gradient, torch.float64)
        eager_y, eager = gradients(lambda *t: reference(*t, form), inputs, gradient)
        check("y", value, eager_y, exact_y)
        for name, ours, theirs, right in zip(("dx", "dw"), found, eager, exact, strict=False):
            check(name, ours, theirs, right)


def cases_of_sizes() -> list[Any]:
    """Return every size, norm and dtype: one dtype of each size and norm, by turns, where not exhaustive."""
    return [
        pytest.param(
            size, per_head, dtype, marks=[exhaustive] * ((size_at + dtype_at + per_head) % len(DTYPES) != 1)
        )
        for (size_at, size), per_head, (dtype_at, dtype) in itertools.product(
            enumerate(SIZES), (True, False), enumerate(DTYPES)
        )
    ]


@pytest.mark.parametrize(("size", "per_head", "dtype"), cases_of_sizes(), ids=str)
def test_sizes(
    size: int, dtype: torch.dtype, per_head: bool, device: str, check: Any, gradients: Any
) -> None:
    tokens = TOKENS if per_head else FEW_TOKENS
    tensors = make((3, 1), size, size, dtype, device, per_head, tokens)
    compare(tensors, form_of(size, dtype, per_head=per_head), check, gradients)


@pytest.mark.parametrize(
    "heads",
    [
        (1, 1),
        (12, 4),
        (5, 3),
        *(pytest.param(heads, marks=pytest.mark.slow) for heads in ((28, 4), (40, 40))),
        pytest.param((32, 8), marks=exhaustive),
    ],
)
def test_numbers_of_heads(heads: tuple[int, int], device: str, check: Any, gradients: Any) -> None:
    tokens = 9 if device == "cuda" else 5  # of the tiles in backward the last is short either way
    tensors = make(heads, 128, 128, torch.bfloat16, device, tokens=tokens)
    compare(tensors, form_of(128, torch.bfloat16), check, gradients)


def cases_of_parts() -> list[Any]:
    """Return every pairing, part, norm and table: one pairing of each of the rest, by turns, where not exhaustive.

    Slow are norms by head with a table of all items, and norms over all heads with one of an item per pair.
    """
    cases: list[Any] = []
    for (at, pairs), (part_at, part), per_head, per_pair in itertools.product(
        enumerate(PAIRS), enumerate(PARTS), (True, False), (True, False)
    ):
        is_next = (at + part_at + 2 * per_head + per_pair) % len(PAIRS) == 0
        marks = [] if per_head == per_pair else [pytest.mark.slow]
        cases.append(pytest.param(pairs, *part, per_head, per_pair, marks=marks if is_next else [exhaustive]))
    return cases


@pytest.mark.parametrize(("pairs", "start", "length", "per_head", "per_pair"), cases_of_parts())
def test_parts(
    pairs: str,
    start: int,
    length: int,
    per_head: bool,
    per_pair: bool,
    device: str,
    check: Any,
    gradients: Any,
) -> None:
    items, tokens = length // 2 if per_pair else length, TOKENS if per_head else FEW_TOKENS
    tensors = make((4, 2), 16, items, torch.float32, device, per_head, tokens)
    form = form_of(16, torch.float32, start=start, length=length, sign=-1, per_head=per_head, **PAIRS[pairs])
    compare(tensors, form, check, gradients)


def cases_of_norms() -> list[Any]:
    """Return every form of the norm; any three of its options are in all their combinations without exhaustive."""
    return [
        pytest.param(
            cast_first,
            offset,
            has_weight,
            norm_dtype,
            marks=[exhaustive] * ((cast_first + int(offset) + has_weight + norm_dtype.itemsize // 2) % 2),
        )
        for cast_first, offset, has_weight, norm_dtype in itertools.product(
            (True, False), (0.0, 1.0), (True, False), (torch.bfloat16, torch.float32)
        )
    ]


@pytest.mark.parametrize(("cast_first", "offset", "has_weight", "norm_dtype"), cases_of_norms())
def test_forms_of_the_norm(
    cast_first: bool,
    offset: float,
    has_weight: bool,
    norm_dtype: torch.dtype,
    device: str,
    check: Any,
    gradients: Any,
) -> None:
    tensors = make((4, 2), 16, 16, torch.bfloat16, device)
    if not has_weight:
        tensors[2] = tensors[3] = None
    form = form_of(16, torch.bfloat16, cast_first=cast_first, offset=offset, norm_dtype=norm_dtype)
    compare(tensors, form, check, gradients)


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_rounds_as_the_two_ops_do(dtype: torch.dtype, per_head: bool, device: str) -> None:
    """Bit for bit on exact sums; a norm of ones and tables of ones leaves the roundings of weights and sums."""
    q, k, q_w, k_w, cos, sin = make((4, 2), 16, 16, dtype, device, per_head)
    q, k = torch.ones_like(q), torch.ones_like(k)
    form = form_of(16, dtype, per_head=per_head, eps=0.0)
    found = file.launch_forward(q, k, q_w, k_w, cos, sin, *form.astuple(), dtype)
    for x, w, y in ((q, q_w, found[0]), (k, k_w, found[1])):
        n = rms_norm(x if per_head else x.flatten(-2), w, eps=0.0).view(x.shape)
        exact = rope(n, None, cos.unsqueeze(2), sin.unsqueeze(2), heads=-2)[0]
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y, exact, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize(
    ("layout", "head_major"),
    [
        ("heads_first", True),
        ("packed", False),
        ("column_stride", True),
        *(
            pytest.param(*case, marks=exhaustive)  # that of q; that of k is the other
            for case in (("heads_first", False), ("packed", True), ("column_stride", False))
        ),
    ],
)
def test_strides(layout: str, head_major: bool, device: str, check: Any, gradients: Any) -> None:
    def lay_out(heads: int) -> torch.Tensor:
        base = torch.randn(BATCH, 6, TOKENS, 64, device=device)
        return {
            "heads_first": base[:, :heads, :, :16].transpose(1, 2),
            "packed": base.transpose(1, 2)[:, :, heads : 2 * heads, 16:32],
            "column_stride": base.transpose(1, 2)[:, :, :heads, ::4],
        }[layout]

    _, _, q_w, k_w, cos, sin = make((3, 2), 16, 32, torch.float32, device)
    tensors = [lay_out(3), lay_out(2), q_w[:16], k_w[:16], cos[..., :16], sin[..., 16:]]
    form = form_of(16, torch.float32, head_major=[head_major, not head_major])
    compare(tensors, form, check, gradients)
    y, k_y = file.launch_forward(*tensors, *form.astuple(), torch.float32)
    for value, is_head_major in ((y, head_major), (k_y, not head_major)):
        assert (value.transpose(1, 2) if is_head_major else value).is_contiguous()


def test_programs_are_shared_out_and_walk_several_tiles() -> None:
    assert _programs_of([700, 100], 16) == [14, 2]
    assert _programs_of([1, 1], 16) == [1, 1]
    assert _programs_of([1000, 1], 4) == [3, 1]
    assert _programs_of([9], 4) == [4]
    tile = tile_of([28, 4], 128, 128, True, 128, file.launches.BACKWARD_ELEMENTS)
    assert (tile["BLOCK_TOKENS"], tile["BLOCK_HEADS"]) == (4, 4)


def test_a_gradient_does_not_depend_on_the_other(device: str) -> None:
    tensors = make((4, 2), 16, 16, torch.float32, device)
    form = form_of(16, torch.float32).astuple()
    dy, dk_y = torch.randn_like(tensors[0]), torch.randn_like(tensors[1])
    both = file.launch_backward(dy, dk_y, *tensors, *form, True)
    again = file.launch_backward(dy, dk_y, *tensors, *form, True)
    assert all(torch.equal(a, b) for a, b in zip(both, again, strict=True)), "not deterministic"
    for index, given in enumerate(((dy, None), (None, dk_y))):
        alone = file.launch_backward(*given, *tensors, *form, True)
        assert [value is None for value in alone] == [index == 1, index == 0] * 2
        torch.testing.assert_close(alone[index], both[index])
        torch.testing.assert_close(alone[index + 2], both[index + 2])
    frozen = file.launch_backward(dy, dk_y, *tensors, *form, False)
    assert frozen[2:] == (None, None)
    torch.testing.assert_close(frozen[:2], both[:2])


@pytest.mark.parametrize("shape", [(0, 5, 3, 16), (2, 0, 3, 16)])
def test_nothing_to_turn(shape: tuple[int, ...], device: str) -> None:
    q, table, w = (
        torch.randn(shape, device=device),
        torch.randn(1, shape[1], 16, device=device),
        torch.ones(16),
    )
    form = form_of(16, torch.float32).astuple()
    y, k_y = file.launch_forward(q, q, w, w, table, table, *form, torch.float32)
    assert y.shape == k_y.shape == shape
    _, _, dq_w, dk_w = file.launch_backward(y, k_y, q, q, w, w, table, table, *form, True)
    assert torch.equal(dq_w, torch.zeros(16))
    assert torch.equal(dk_w, torch.zeros(16))


def test_rows_of_zeros_and_of_nan(device: str) -> None:
    tensors = make((4, 2), 16, 16, torch.float32, device)
    q = tensors[0]
    q[0, 0, 0], q[0, 1, 1, 3], q[1, 2, 3, 0] = 0.0, float("nan"), float("inf")
    form = form_of(16, torch.float32)
    y, _ = file.launch_forward(*tensors, *form.astuple(), torch.float32)
    exact = reference(q, tensors[2], tensors[4], tensors[5], form)
    torch.testing.assert_close(y, exact, equal_nan=True)


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [-3, -2])
def test_op(
    heads: int, dtype: torch.dtype, per_head: bool, op_device: str, check: Any, gradients: Any
) -> None:
    q, k, q_w, k_w, cos, sin = make((4, 2), 16, 16, dtype, op_device, per_head)
    inputs = [tensor.requires_grad_() for tensor in (q, k, q_w, k_w)]

    def by_op(q: torch.Tensor, k: torch.Tensor, q_w: torch.Tensor, k_w: torch.Tensor) -> torch.Tensor:
        given: dict[str, Any] = dict(eps=1e-6, per_head=per_head, heads=heads)
        if heads == -2:
            return torch.cat(norm_rope(q, k, q_w, k_w, cos.unsqueeze(2), sin.unsqueeze(2), **given), 2)
        pair = norm_rope(
            q.transpose(1, 2), k.transpose(1, 2), q_w, k_w, cos.unsqueeze(1), sin.unsqueeze(1), **given
        )
        return torch.cat([y.transpose(1, 2) for y in pair], 2)

    def by_steps(q: torch.Tensor, k: torch.Tensor, q_w: torch.Tensor, k_w: torch.Tensor) -> torch.Tensor:
        tables = cos.to(q.dtype), sin.to(q.dtype)
        given: dict[str, Any] = dict(eps=1e-6, per_head=per_head)
        return torch.cat([norm_rope_reference(x, w, *tables, **given) for x, w in ((q, q_w), (k, k_w))], 2)

    dy = torch.randn(BATCH, TOKENS, 6, 16, device=op_device)
    exact_y, exact = gradients(by_steps, inputs, dy, torch.float64)
    eager_y, eager = gradients(by_steps, inputs, dy)
    y, found = gradients(by_op, inputs, dy)
    check("y", y, eager_y, exact_y)
    for name, value, eager_value, exact_value in zip(
        ("q", "k", "q_w", "k_w"), found, eager, exact, strict=True
    ):
        check(name, value, eager_value, exact_value)


def test_nothing_is_saved_but_the_inputs(op_device: str) -> None:
    q, k, q_w, k_w, cos, sin = make((4, 2), 16, 16, torch.float32, op_device)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        inputs = [tensor.requires_grad_() for tensor in (q, k, q_w, k_w)]
        norm_rope(*inputs, cos.unsqueeze(2), sin.unsqueeze(2), eps=1e-6, heads=-2)
    assert saved == [tensor.numel() for tensor in (q, k, q_w, k_w, cos, sin)]


@pytest.mark.parametrize("trained", ["q", "k", "q_w", "k_w"])
def test_gradients_for_exactly_what_needs_them(trained: str, op_device: str) -> None:
    named = dict(
        zip(("q", "k", "q_w", "k_w"), make((4, 2), 16, 16, torch.float32, op_device)[:4], strict=True)
    )
    table = torch.randn(1, TOKENS, 1, 16, device=op_device)
    named[trained].requires_grad_()
    y, k_y = norm_rope(*named.values(), table, table, eps=1e-6, heads=-2)
    assert (y.requires_grad, k_y.requires_grad) == (trained[0] == "q", trained[0] == "k")
    (y if y.requires_grad else k_y).sum().backward()
    assert [name for name, tensor in named.items() if tensor.grad is not None] == [trained]


def test_opcheck(op_device: str, opcheck: Any) -> None:
    tensors = make((4, 2), 16, 16, torch.float32, op_device)
    for form in (form_of(16, torch.float32), form_of(16, torch.float32, head_major=[True, False])):
        opcheck(forward_op, (*tensors, *form.astuple(), torch.float32))
        for need_weight in (True, False):
            opcheck(backward_op, (*tensors[:2], *tensors, *form.astuple(), need_weight))
        opcheck(backward_op, (None, tensors[1], *tensors, *form.astuple(), True))


def test_both_ops_stand_in_the_joint_graph(op_device: str, joint_targets: Any) -> None:
    q, k, q_w, k_w, cos, sin = make((4, 2), 16, 16, torch.float32, op_device)

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.cat(norm_rope(*tensors, eps=1e-6, heads=-2), 2)

    inputs = [tensor.requires_grad_() for tensor in (q, k, q_w, k_w)]
    targets = joint_targets(function, *inputs, cos.unsqueeze(2), sin.unsqueeze(2))
    assert targets == ["fxopt.norm_rope.default", "fxopt.norm_rope_backward.default"]


def test_plain_backward_of_one_alone(op_device: str) -> None:
    tensors = make((4, 2), 16, 16, torch.float64, op_device)
    form = form_of(16, torch.float64).astuple()
    dq, dk, dq_w, dk_w = plain_backward(None, tensors[1], *tensors, *form, True)
    assert (dq, dq_w) == (None, None)
    assert dk is not None
    assert dk_w is not None


def test_errors() -> None:
    x, table, w = torch.ones(2, 3, 5, 8), torch.ones(1, 5, 8), torch.ones(8)
    for inputs, options, text in (
        ((x, x[..., :4], w, w, table, table), {}, "norm_rope: k, expected 3 or 4 dims, the last 8"),
        ((x, x, w, w, table[:, :4], table[:, :4]), {}, "norm_rope: cos and sin, expected to broadcast"),
        ((x, x, w, None, table, table), {}, "k_weight, expected a weight of both or of neither"),
        ((x, x, w, torch.ones(24), table, table), {}, r"k_weight, expected shape \(8,\)"),
        ((x, x, w, w.double(), table, table), {}, r"k_weight, expected shape \(8,\) in torch.float32"),
        ((x, x, w, w, table, table), {"per_head": False}, r"q_weight, expected shape \(24,\)"),
        ((x, x, w, w, table, table), {"norm_dtype": torch.float16}, "norm_dtype, expected torch.float32"),
    ):
        with pytest.raises(ValueError, match=text):
            norm_rope(*inputs, eps=1e-6, **options)
    wide = torch.ones(1, 40, 1, 512)
    with pytest.raises(ValueError, match="40 heads of 512, expected at most 8192 items"):
        norm_rope(wide, None, None, None, wide[0, :1], wide[0, :1], eps=1e-6, per_head=False)
