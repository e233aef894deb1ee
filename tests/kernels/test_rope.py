"""rope: the kernel and the op against the reference, and against what models write."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.kernels import rope as file
from fxopt.kernels.rope import rope, rope_reference
from fxopt.kernels.rope.launches import dense_heads
from fxopt.kernels.rope.op import backward_op, forward_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCH, TOKENS = 2, 5
FORMS = {
    "half": dict(pairing="half", out_pairing="half"),
    "interleaved": dict(pairing="interleaved", out_pairing="interleaved"),
    "apart": dict(pairing="interleaved", out_pairing="half"),
}


def stock(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairing: str = "half") -> torch.Tensor:
    """Return x, [batch, tokens, heads, D], embedded as models write it, rounded three times."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if pairing == "half":
        x1, x2 = x.chunk(2, -1)
        turned = torch.cat((-x2, x1), -1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


def make(
    heads: tuple[int, int], size: int, items: int, dtype: torch.dtype, device: str, batch: int = 1
) -> tuple[torch.Tensor, ...]:
    """Return q and k, [batch, tokens, heads, D], and tables; no half of a table is like the other."""
    q, k = (torch.randn(BATCH, TOKENS, each, size, device=device).to(dtype) for each in heads)
    cos, sin = (torch.randn(batch, TOKENS, items, device=device).to(dtype) for _ in range(2))
    return q, k, cos, sin


def attributes(size: int, dtype: torch.dtype, **given: Any) -> tuple[Any, ...]:
    form = (
        dict(pairing="half", out_pairing="half", start=0, length=size, sign=1, head_major=[False, False])
        | given
    )
    return (*form.values(), dtype)


def reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, form: tuple[Any, ...]) -> torch.Tensor:
    pairing, out_pairing, start, length, sign, _, _ = form
    given = dict(pairing=pairing, out_pairing=out_pairing, start=start, length=length, sign=sign)
    return rope_reference(x, cos, sin, **given)


def compare(tensors: tuple[torch.Tensor, ...], form: tuple[Any, ...], check: Any, gradients: Any) -> None:
    """Check forward and backward of the kernel against the reference: in fp64 and, as eager, in its own dtype."""
    q, k, cos, sin = tensors
    y, k_y = file.launch_forward(q, k, cos, sin, *form)
    dy, dk_y = torch.randn_like(y), torch.randn_like(k_y)
    dq, dk = file.launch_backward(dy, dk_y, cos, sin, *form)
    for x, value, gradient, found in ((q, y, dy, dq), (k, k_y, dk_y, dk)):
        inputs = [x.detach().requires_grad_(), cos, sin]
        exact_y, exact = gradients(lambda *t: reference(*t, form), inputs, gradient, torch.float64)
        eager_y, eager = gradients(lambda *t: reference(*t, form), inputs, gradient)
        check("y", value, eager_y, exact_y)
        check("dx", found, eager[0], exact[0])


@pytest.mark.parametrize("size", [2, 16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_sizes(size: int, dtype: torch.dtype, form: str, device: str, check: Any, gradients: Any) -> None:
    tensors = make((3, 1), size, size, dtype, device)
    compare(tensors, attributes(size, dtype, **FORMS[form]), check, gradients)


@pytest.mark.parametrize(
    "heads",
    [
        (1, 1),
        (28, 4),
        (5, 3),
        pytest.param((32, 8), marks=pytest.mark.exhaustive),
        pytest.param((64, 64), marks=pytest.mark.slow),
    ],
)
def test_numbers_of_heads(heads: tuple[int, int], device: str, check: Any, gradients: Any) -> None:
    tensors = make(heads, 128, 128, torch.bfloat16, device)
    compare(tensors, attributes(128, torch.bfloat16), check, gradients)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("start", "length"), [(0, 4), (12, 4), (0, 14), (2, 14), (0, 16)])
@pytest.mark.parametrize("per_pair", [False, True])
def test_parts(
    form: str, start: int, length: int, per_pair: bool, device: str, check: Any, gradients: Any
) -> None:
    tensors = make((3, 2), 16, length // 2 if per_pair else length, torch.float32, device, batch=BATCH)
    given = attributes(16, torch.float32, start=start, length=length, sign=-1, **FORMS[form])
    compare(tensors, given, check, gradients)


def test_what_is_passed_on_keeps_its_bits(device: str) -> None:
    q, k, cos, sin = make((3, 2), 16, 4, torch.bfloat16, device)
    q[0, 0, 0, 5], q[0, 0, 0, 6], q[0, 0, 0, 7] = float("nan"), float("inf"), -0.0
    y, _ = file.launch_forward(q, k, cos, sin, *attributes(16, torch.bfloat16, length=4))
    assert torch.equal(y[..., 4:].view(torch.int16), q[..., 4:].view(torch.int16))


@pytest.mark.parametrize("layout", ["heads_first", "packed", "column_stride", "expanded"])
@pytest.mark.parametrize("head_major", [False, True])
def test_strides(layout: str, head_major: bool, device: str, check: Any, gradients: Any) -> None:
    def lay_out(heads: int) -> torch.Tensor:
        base = torch.randn(BATCH, 6, TOKENS, 64, device=device)
        return {
            "heads_first": base[:, :heads, :, :16].transpose(1, 2),
            "packed": base.transpose(1, 2)[:, :, heads : 2 * heads, 16:32],
            "column_stride": base.transpose(1, 2)[:, :, :heads, ::4],
            "expanded": base[:1, :1, :, :16].expand(BATCH, heads, TOKENS, 16).transpose(1, 2),
        }[layout]

    _, _, cos, sin = make((3, 2), 16, 32, torch.float32, device)
    tensors = (lay_out(3), lay_out(2), cos[..., :16], sin[..., 16:])
    given = attributes(16, torch.float32, head_major=[head_major, not head_major])
    compare(tensors, given, check, gradients)
    y, k_y = file.launch_forward(*tensors, *given)
    for value, is_head_major in ((y, head_major), (k_y, not head_major)):
        assert (value.transpose(1, 2) if is_head_major else value).is_contiguous()


def test_views_of_a_projection_are_read_in_place(device: str) -> None:
    packed = torch.randn(BATCH, TOKENS, 6 * 16, device=device)
    q = packed[..., 16:64].view(BATCH, TOKENS, 3, 16)
    assert dense_heads(q).data_ptr() == q.data_ptr()


@pytest.mark.parametrize("missing", ["q", "k", "k_at_all"])
def test_one_gradient_or_one_tensor(missing: str, device: str) -> None:
    q, k, cos, sin = make((3, 2), 16, 16, torch.float32, device)
    form = attributes(16, torch.float32)
    both = file.launch_backward(q, k, cos, sin, *form)
    if missing == "k_at_all":
        y, nothing = file.launch_forward(q, None, cos, sin, *form)
        assert nothing is None
        assert torch.equal(y, file.launch_forward(q, k, cos, sin, *form)[0])
        return
    dq, dk = file.launch_backward(
        None if missing == "q" else q, None if missing == "k" else k, cos, sin, *form
    )
    assert (dq is None, dk is None) == (missing == "q", missing == "k")
    assert torch.equal(dq if dk is None else dk, both[0] if dk is None else both[1])


@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes(
    tables: torch.dtype, out_dtype: torch.dtype, device: str, check: Any, gradients: Any
) -> None:
    q, k, cos, sin = make((3, 2), 16, 16, torch.bfloat16, device)
    cos, sin = cos.to(tables), sin.to(tables)
    y, _ = file.launch_forward(q, k, cos, sin, *attributes(16, out_dtype))
    exact = rope_reference(q.double(), cos.double(), sin.double())
    check("y", y, stock(q, cos, sin).to(out_dtype), exact)


@pytest.mark.parametrize("shape", [(0, 5, 3, 16), (2, 0, 3, 16)])
def test_nothing_to_turn(shape: tuple[int, ...], device: str) -> None:
    q, table = torch.randn(shape, device=device), torch.randn(1, shape[1], 16, device=device)
    y, k_y = file.launch_forward(q, q, table, table, *attributes(16, torch.float32))
    assert y.shape == k_y.shape == shape


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [-3, -2])
def test_op(heads: int, dtype: torch.dtype, pairing: str, op_device: str, check: Any, gradients: Any) -> None:
    q, k, cos, sin = make((3, 2), 16, 16, dtype, op_device)
    q, k = q.requires_grad_(), k.requires_grad_()

    def both(run: Any) -> Any:
        return lambda q, k: torch.cat([run(q), run(k)], 2)

    def by_op(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        if heads == -2:
            return torch.cat(rope(q, k, cos.unsqueeze(2), sin.unsqueeze(2), pairing=pairing, heads=-2), 2)
        turned = rope(
            q.transpose(1, 2), k.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1), pairing=pairing
        )
        assert [y.transpose(1, 2).is_contiguous() for y in turned] == [True, True]
        return torch.cat([y.transpose(1, 2) for y in turned], 2)

    dy = torch.randn(BATCH, TOKENS, 5, 16, device=op_device)
    wide = (cos.double(), sin.double())
    exact_y, exact = gradients(both(lambda x: stock(x, *wide, pairing)), [q, k], dy, torch.float64)
    eager_y, eager = gradients(both(lambda x: stock(x, cos, sin, pairing)), [q, k], dy)
    y, found = gradients(by_op, [q, k], dy)
    check("y", y, eager_y, exact_y)
    for name, value, eager_value, exact_value in zip("qk", found, eager, exact, strict=True):
        check(name, value, eager_value, exact_value)


def test_a_turn_there_and_back_is_none(op_device: str) -> None:
    q, k, angle, _ = make((3, 2), 16, 8, torch.float64, op_device)
    cos, sin = (torch.cat((t, t), -1).unsqueeze(2) for t in (angle.cos(), angle.sin()))
    turned = rope(q, k, cos, sin, heads=-2)
    back = rope(*turned, cos, sin, sign=-1, heads=-2)
    torch.testing.assert_close(back, (q, k))


def test_a_frozen_tensor_stays_without_gradient(op_device: str) -> None:
    q, k, cos, sin = make((3, 2), 16, 16, torch.float32, op_device)
    y, k_y = rope(q, k.requires_grad_(), cos.unsqueeze(2), sin.unsqueeze(2), heads=-2)
    assert (y.requires_grad, k_y.requires_grad) == (False, True)
    k_y.sum().backward()
    assert k.grad is not None
    y, k_y = rope(q, k.detach(), cos.unsqueeze(2), sin.unsqueeze(2), heads=-2)
    assert (y.requires_grad, k_y.requires_grad) == (False, False)


def test_only_the_tables_are_saved(op_device: str) -> None:
    q, k, cos, sin = make((3, 2), 16, 16, torch.float32, op_device)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        rope(q.requires_grad_(), k.requires_grad_(), cos.unsqueeze(2), sin.unsqueeze(2), heads=-2)
    assert saved == [cos.numel(), sin.numel()]


def test_one_output_alone_is_differentiated(op_device: str) -> None:
    q, k, cos, sin = make((3, 2), 16, 16, torch.float32, op_device)
    y, _ = rope(q.requires_grad_(), k.requires_grad_(), cos.unsqueeze(2), sin.unsqueeze(2), heads=-2)
    dq, dk = torch.autograd.grad(y.sum(), [q, k], allow_unused=True)
    assert dk is None
    assert torch.equal(dq, torch.autograd.grad(stock(q, cos, sin).sum(), q)[0])


def test_opcheck(op_device: str, opcheck: Any) -> None:
    q, k, cos, sin = make((3, 2), 16, 16, torch.float32, op_device)
    for form in (attributes(16, torch.float32), attributes(16, torch.float32, head_major=[True, False])):
        opcheck(forward_op, (q.requires_grad_(), k.requires_grad_(), cos, sin, *form))
        opcheck(backward_op, (q.detach(), k.detach(), cos, sin, *form))
    opcheck(backward_op, (None, k.detach(), cos, sin, *form))


def test_both_ops_stand_in_the_joint_graph(op_device: str, joint_targets: Any) -> None:
    q, k, cos, sin = make((3, 2), 16, 16, torch.float32, op_device)

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.cat(rope(*tensors, heads=-2), 2)

    q, k = q.requires_grad_(), k.requires_grad_()
    targets = joint_targets(function, q, k, cos.unsqueeze(2), sin.unsqueeze(2))
    assert targets == ["fxopt.rope.default", "fxopt.rope_backward.default"]


def test_second_derivatives_are_refused(op_device: str) -> None:
    q, _, cos, sin = make((3, 2), 16, 16, torch.float32, op_device)
    y, _ = rope(q.requires_grad_(), None, cos.unsqueeze(2), sin.unsqueeze(2), heads=-2)
    (dq,) = torch.autograd.grad(y.square().sum(), [q], create_graph=True)
    with pytest.raises(RuntimeError, match="fxopt::rope: second derivatives are not implemented"):
        dq.sum().backward()


def test_errors() -> None:
    x, table = torch.ones(2, 3, 5, 8), torch.ones(1, 5, 8)
    for inputs, options, text in (
        ((x, x[..., :4], table, table), {}, r"k, expected 3 or 4 dims, the last 8, .* got \(2, 3, 5, 4\)"),
        ((x, x.double(), table, table), {}, "k, expected .* in torch.float32, got .* in torch.float64"),
        ((x, x, table, table.double()), {}, "sin, expected 8 or 4 items"),
        ((x, x, table, table), {"pairing": "thirds"}, "expected pairings of"),
        ((x, x, table, table), {"start": 1, "length": 4}, "start and length, expected an even number"),
        ((x, x, table[:, :4], table[:, :4]), {}, "expected to broadcast over 2 batch items of 5 tokens"),
        ((x, x, x, x), {}, "expected to broadcast"),
    ):
        with pytest.raises(ValueError, match=text):
            rope(*inputs, **options)


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    """Tokens 2^30 items apart in a small view of a large tensor: the third starts at 2^31."""
    base = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    q = base.as_strided((1, 3, 4, 64), (0, 2**30, 64, 1))
    q.copy_(torch.randn(1, 3, 4, 64, device="cuda"))
    cos, sin = (torch.randn(1, 3, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    y, _ = file.launch_forward(q, None, cos, sin, *attributes(64, torch.bfloat16))
    exact = rope_reference(q.double(), cos.double(), sin.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)
