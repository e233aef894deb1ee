"""attention: the kernels and the op against the reference, over masks of every kind."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxopt.kernels.attention import attention, attention_reference, backends, choice, op
from fxopt.kernels.attention.call import Call
from fxopt.kernels.attention.launches import launch_backward, launch_forward
from fxopt.kernels.attention.masks import (
    launch_intervals,
    launch_key_ranges,
    mask_intervals,
    plain_intervals,
)
from fxopt.kernels.attention.plans import plans_for, plans_of
from fxopt.kernels.launcher import run_as_backward

# The interpreter multiplies the bits of bfloat16 tiles as integers.
ON_CPU = (torch.float32, torch.float16)
HALVES = [
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
SCALE = 0.3
FEW_ROWS = (2, 2, 7, 21)
"""A shape of masks for kernels of one program a row: a hole is in the sixth."""
KINDS = (
    *("none", "causal", "interval", "left", "right", "sliding", "packed", "random"),
    *("added left", "added random", "infinite left", "biased", "mixed", "per head", "per key"),
    *("one row", "added one row"),
)


def make_mask(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Any:
    """Return a mask for [batch, heads, queries, keys]; where rows can be empty, some are."""
    batch, heads, queries, keys = shape
    at, row = torch.arange(keys, device=device), torch.arange(queries, device=device)[:, None]
    causal = (row + keys - queries >= at).expand(batch, 1, -1, -1)
    seen = causal.clone()
    match kind.split()[-1]:
        case "none" | "causal":
            return None
        case "interval":
            ends = torch.randint(0, keys + 1, (2, batch, 1, queries, 1), device=device)
            seen = (at >= ends.amin(0)) & (at < ends.amax(0))
        case "left":
            seen[0, :, :, : keys // 3] = False
        case "right":
            seen = seen & (at < keys - keys // 3)
            seen[-1, :, -5:] = False
        case "sliding":
            seen = seen & (at > row + keys - queries - 6)
        case "row":  # the only one that is no interval; other tiles see all of their first keys
            seen[0, :, 5, 2] = False
        case "packed":
            seen = seen & (at // 9 == (row + keys - queries) // 9)
        case "head":
            seen = torch.rand(batch, heads, queries, keys, device=device) > 0.4
        case "key":
            seen = torch.rand(batch, 1, 1, keys, device=device) > 0.4
        case _:
            seen = torch.rand(batch, 1, queries, keys, device=device) > 0.4
            seen[0, :, 1:3] = False
    if kind.startswith(("added", "infinite", "biased", "mixed")):
        lowest = -torch.inf if kind.startswith("infinite") else torch.finfo(dtype).min
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, lowest)
        if kind == "biased":
            mask = torch.where(seen, torch.randn(seen.shape, device=device).to(dtype), mask)
        if kind == "mixed":
            mask[0, 0, 1, 2 : keys // 2] = -torch.inf  # a row of both -inf and the lowest number
        return mask
    return seen


def make(
    dtype: torch.dtype,
    device: str,
    *,
    heads: tuple[int, int] = (2, 1),
    lengths: tuple[int, int] = (17, 21),
    widths: tuple[int, int] = (16, 16),
    batch: int = 2,
) -> list[torch.Tensor]:
    """Return q, k, v as models have them: views of [B, S, H, D]."""
    sizes = (
        (lengths[0], heads[0], widths[0]),
        (lengths[1], heads[1], widths[0]),
        (lengths[1], heads[1], widths[1]),
    )
    return [
        torch.randn(batch, *size, device=device).to(dtype).transpose(1, 2).requires_grad_() for size in sizes
    ]


def stock(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    mask: torch.Tensor | None,
    causal: bool,
    softcap: float,
) -> torch.Tensor:
    """Return attention as models spell it, rounded in between; rows without a key are 0."""
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    scores = q @ k.transpose(2, 3) * SCALE
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        shut = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        added = (
            torch.zeros_like(mask, dtype=q.dtype) if mask.dtype == torch.bool else mask.masked_fill(shut, 0.0)
        )
        scores = (scores + added).masked_fill(shut, -torch.inf)
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32))
    weights = weights.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
    return weights.to(q.dtype)[..., : k.shape[2]] @ v


def compare(
    inputs: list[torch.Tensor],
    mask: torch.Tensor | None,
    check: Any,
    gradients: Any,
    *,
    causal: bool = False,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    q, k, v = inputs
    dout = (
        torch.randn(q.shape[0], q.shape[2], q.shape[1], v.shape[3], device=q.device)
        .transpose(1, 2)
        .to(q.dtype)
    )
    every = [*inputs, sinks]

    def exact_function(q: Any, k: Any, v: Any, sinks: Any) -> torch.Tensor:
        return attention_reference(q, k, v, mask, sinks, causal=causal, scale=SCALE, softcap=softcap)

    eager_function = functools.partial(stock, mask=mask, causal=causal, softcap=softcap)
    exact_y, exact = gradients(exact_function, every, dout, torch.float64)
    eager_y, eager = gradients(eager_function, every, dout)
    with torch.no_grad():
        intervals = reads = None
        if mask is not None:
            intervals, reads = launch_intervals(mask, sinks is not None, True)
        call = Call(q, k, v, mask, intervals, reads, sinks, causal, SCALE, softcap, True)
        out, lse = launch_forward(call)
        needs = [tensor is not None and tensor.requires_grad for tensor in every]
        found = launch_backward(call, out, lse, dout, needs)
    check("out", out, eager_y, exact_y)
    for name, value, eager_value, exact_value in zip("qkvs", found, eager, exact, strict=True):
        check(name, value, eager_value, exact_value)


@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind: str, device: str, check: Any, gradients: Any) -> None:
    heads = (2, 1) if kind == "per head" or device == "cuda" else (1, 1)
    inputs = make(torch.float32, device, heads=heads, lengths=(17, 17) if kind == "causal" else (17, 21))
    mask = make_mask(kind, (2, heads[0], 17, 21), torch.float32, device)
    compare(inputs, mask, check, gradients, causal=kind == "causal")


@pytest.mark.parametrize("kind", ["one row", "added one row"])
def test_one_row_that_is_no_interval_among_many(kind: str, device: str, check: Any, gradients: Any) -> None:
    torch.manual_seed(0)
    length, width = (70, 64) if device == "cuda" else (40, 16)  # tiles are smaller in the interpreter
    inputs = make(torch.float32, device, heads=(1, 1), lengths=(length, length), widths=(width, width))
    compare(inputs, make_mask(kind, (2, 1, length, length), torch.float32, device), check, gradients)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", ["causal", "left", "added left"])
def test_half_precision(kind: str, dtype: torch.dtype, device: str, check: Any, gradients: Any) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip(
            "Triton's interpreter multiplies the bits of bfloat16 tiles as integers; the GPU variant runs"
        )
    heads = (2, 1) if device == "cuda" else (1, 1)
    inputs = make(dtype, device, heads=heads, lengths=(17, 17))
    mask = make_mask(kind, (2, heads[0], 17, 17), dtype, device)
    if mask is not None and mask.dtype != torch.bool:
        mask[0, :, :5] = 0.0  # float16 models round a shut row to multiples of 32, not to an even one
    compare(inputs, mask, check, gradients, causal=kind == "causal")


@pytest.mark.parametrize("widths", [(64, 64), (80, 40), (128, 128), (256, 256)], ids=str)
def test_widths(widths: tuple[int, int], device: str, check: Any, gradients: Any) -> None:
    inputs = make(torch.float32, device, lengths=(17, 17), widths=widths, batch=1)
    compare(inputs, None, check, gradients, causal=True)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (6, 2)], ids=str)
def test_grouped_heads(heads: tuple[int, int], device: str, check: Any, gradients: Any) -> None:
    compare(
        make(torch.float32, device, heads=heads, lengths=(17, 17), batch=1),
        None,
        check,
        gradients,
        causal=True,
    )


@pytest.mark.parametrize("lengths", [(1, 1), (1, 33), (16, 16), (33, 32), (19, 5)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(lengths: tuple[int, int], causal: bool, device: str, check: Any, gradients: Any) -> None:
    inputs = make(torch.float32, device, lengths=lengths, heads=(2, 1), batch=1)
    compare(inputs, None, check, gradients, causal=causal)


@pytest.mark.parametrize("kind", ["causal", "added left", "random"])
@pytest.mark.parametrize(
    ("softcap", "with_sinks"),
    [
        (2.0, False),
        (0.0, True),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in ((50.0, False), (2.0, True))),
    ],
)
def test_softcap_and_sinks(
    kind: str, softcap: float, with_sinks: bool, device: str, check: Any, gradients: Any
) -> None:
    """Eight sinks: the gradient of one is a sum of terms that cancel, whose relative error says little by itself.

    Over 300 draws stock itself was off by 2e-7 on average and at most 1.6e-6 with two sinks, 3.7e-7 with eight.
    """
    heads = (8, 4) if with_sinks else (2, 1)
    batch = 2 if device == "cuda" else 1
    inputs = make(torch.float32, device, heads=heads, lengths=(17, 17), batch=batch)
    sinks = torch.linspace(-1.0, 1.5, 8, device=device).requires_grad_() if with_sinks else None
    mask = make_mask(kind, (batch, heads[0], 17, 17), torch.float32, device)
    compare(inputs, mask, check, gradients, causal=kind == "causal", softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("layout", ["heads first", "packed", "column stride", "expanded batch"])
def test_strides(layout: str, device: str, check: Any, gradients: Any) -> None:
    def lay_out(place: int) -> torch.Tensor:
        base = torch.randn(2, 2, 17, 64, device=device)
        return {
            "heads first": base[..., :16].contiguous(),
            "packed": base[..., place * 16 : (place + 1) * 16],
            "column stride": base[..., place : place + 32 : 2],
            "expanded batch": base[:1, ..., :16].expand(2, -1, -1, -1),
        }[layout]

    inputs = [lay_out(place).detach().requires_grad_() for place in range(3)]
    compare(inputs, None, check, gradients, causal=True)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 2), (0, 1)], ids=str)
def test_only_the_gradients_needed(frozen: tuple[int, ...], device: str, check: Any, gradients: Any) -> None:
    inputs = make(torch.float32, device, lengths=(17, 17), batch=1)
    for place in frozen:
        inputs[place] = inputs[place].detach()
    compare(inputs, None, check, gradients, causal=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("none", "causal")])
@pytest.mark.parametrize(
    ("has_sinks", "safe"),
    [
        (False, False),
        (False, True),
        (True, False),
        pytest.param(True, True, marks=pytest.mark.exhaustive),  # with sinks the kernel asks for no more
    ],
)
def test_intervals(kind: str, has_sinks: bool, safe: bool, device: str) -> None:
    mask = make_mask(kind, FEW_ROWS, torch.float32, device)
    for value, expected in zip(
        launch_intervals(mask, has_sinks, safe), plain_intervals(mask, has_sinks, safe), strict=True
    ):
        assert torch.equal(value, expected)


def test_pure_masks_are_not_read(device: str) -> None:
    """What a mask of this kind means is all in its intervals, so its kernels skip what nobody sees."""
    for kind in ("interval", "left", "right", "sliding", "packed", "added left", "infinite left"):
        mask = make_mask(kind, FEW_ROWS, torch.float32, device)
        assert launch_intervals(mask, False, True)[1].item() == 0, kind
    for kind in ("random", "added random", "biased", "mixed", "per head", "per key", "one row"):
        mask = make_mask(kind, FEW_ROWS, torch.float32, device)
        assert launch_intervals(mask, False, True)[1].item() == 1, kind


def test_key_ranges(device: str) -> None:
    mask = make_mask("sliding", (1, 1, 40, 40), torch.float32, device)
    intervals, _ = launch_intervals(mask, False, True)
    ranges = launch_key_ranges(intervals, 40, 40, 16)
    assert ranges[:, 0, 0].tolist() == [[0, 16, 32], [21, 37, 40]]
    per_key = torch.ones(1, 1, 1, 40, dtype=torch.bool, device=device)
    intervals, _ = launch_intervals(per_key, False, True)
    assert launch_key_ranges(intervals, 33, 40, 32)[:, 0, 0].tolist() == [[0, 0], [33, 33]]


def test_a_row_shut_by_minus_infinity_is_nan_where_the_model_has_no_guard(device: str) -> None:
    q, k, v = (x.detach() for x in make(torch.float32, device, lengths=(17, 17)))
    mask = make_mask("infinite random", (2, 1, 17, 17), torch.float32, device)
    intervals, reads = launch_intervals(mask, False, False)
    out, _ = launch_forward(Call(q, k, v, mask, intervals, reads, None, False, SCALE, 0.0, False))
    expected = stock_without_guard(q, k, v, mask)
    assert expected.isnan().any()
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def stock_without_guard(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return (q @ k.transpose(2, 3) * SCALE + mask).softmax(-1) @ v


def test_nan_and_infinity_pass(device: str) -> None:
    q, k, v = (x.detach() for x in make(torch.float32, device, lengths=(17, 17), heads=(2, 2), batch=1))
    q[0, 0, 3] = torch.nan
    v[0, 1, 5] = torch.inf
    out, _ = launch_forward(Call(q, k, v, None, None, None, None, True, SCALE, 0.0, True))
    exact = attention_reference(q, k, v, causal=True, scale=SCALE)
    assert torch.equal(out[0, 0].isnan(), exact[0, 0].isnan())
    assert out[0, 1, 5:].isinf().all()


OP_KINDS = ("none", "causal", "left", "random", "added left", "infinite left", "biased", "per key")


@pytest.mark.parametrize("kind", OP_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("extras", ["", "softcap", "sinks"])
def test_op(kind: str, dtype: torch.dtype, extras: str, op_device: str, check: Any, gradients: Any) -> None:
    inputs = make(dtype, op_device, lengths=(17, 17))
    sinks = torch.randn(2, device=op_device).to(dtype).requires_grad_() if extras == "sinks" else None
    mask = make_mask(kind, (2, 2, 17, 17), dtype, op_device)
    softcap, causal = 2.0 if extras == "softcap" else 0.0, kind == "causal"
    if mask is not None and dtype == torch.float16 and mask.is_floating_point() and extras != "sinks":
        mask = mask.masked_fill((mask < -1e4).all(-1, keepdim=True), 0.0)  # see test_half_precision
    dout = torch.randn(2, 17, 2, 16, device=op_device).transpose(1, 2).to(dtype)

    def function(which: Any, q: Any, k: Any, v: Any, sinks: Any) -> torch.Tensor:
        return which(q, k, v, mask, sinks, causal=causal, scale=SCALE, softcap=softcap)

    exact_y, exact = gradients(
        functools.partial(function, attention_reference), [*inputs, sinks], dout, torch.float64
    )
    eager_y, eager = gradients(
        functools.partial(stock, mask=mask, causal=causal, softcap=softcap), [*inputs, sinks], dout
    )
    y, found = gradients(functools.partial(function, attention), [*inputs, sinks], dout)
    assert y.transpose(1, 2).is_contiguous()
    check("out", y, eager_y, exact_y)
    for name, value, eager_value, exact_value in zip("qkvs", found, eager, exact, strict=True):
        check(name, value, eager_value, exact_value)


@pytest.mark.parametrize("kind", ["left", "added random", "infinite random", "biased"])
def test_op_equals_torchs_math_on_rows_without_keys(kind: str, gradients: Any) -> None:
    """Torch's flash attention for CPUs is no oracle: its gradients of rows shut by the lowest number are wrong."""
    inputs = make(torch.float32, "cpu", lengths=(17, 17), heads=(4, 4))
    mask = make_mask(kind, (2, 2, 17, 17), torch.float32, "cpu")
    mask[:, :, 4] = torch.finfo(torch.float32).min if kind == "added random" else mask[:, :, 4]
    dout = torch.randn(2, 4, 17, 16)

    def torchs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE)

    expected_y, expected = gradients(torchs, inputs, dout)
    y, found = gradients(functools.partial(attention, mask=mask, scale=SCALE), inputs, dout)
    torch.testing.assert_close(y, expected_y)
    for value, expected_value in zip(found, expected, strict=True):
        torch.testing.assert_close(value, expected_value, rtol=1e-4, atol=1e-5)


def test_no_matrix_of_scores_is_saved() -> None:
    sizes: list[int] = []
    for softcap in (0.0, 5.0):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            attention(*make(torch.float32, "cpu", lengths=(64, 64)), causal=True, scale=1.0, softcap=softcap)
        assert max(sizes) == 2 * 2 * 64 * 16


def test_backward_twice(op_device: str) -> None:
    inputs = make(torch.float32, op_device, lengths=(17, 17))
    y = attention(*inputs, causal=True, scale=SCALE).sum()
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    second = torch.autograd.grad(y, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("kind", "extras"),
    [
        ("causal", ""),
        ("left", "sinks and softcap"),
        ("added left", ""),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (("causal", "sinks and softcap"), ("left", ""), ("added left", "sinks and softcap"))
        ),
    ],
)
def test_opcheck(kind: str, extras: str, op_device: str, opcheck: Any) -> None:
    q, k, v = make(torch.float32, op_device, lengths=(17, 17))
    mask = make_mask(kind, (2, 2, 17, 17), torch.float32, op_device)
    sinks = torch.randn(2, device=op_device).requires_grad_() if extras else None
    found = (None, None) if mask is None else mask_intervals(mask, bool(extras), True)
    rest = mask, *found, sinks
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in (q, k, v, *rest)]
    inputs += kind == "causal", SCALE, 5.0 if extras else 0.0, True
    opcheck(op._forward_op, tuple(inputs))
    with torch.no_grad():
        out, lse = op._forward_op(*inputs)
        dout = torch.randn_like(out)
        for needs in ([True, True, True, bool(extras)], [True, False, False, False]):
            opcheck(op._backward_op, (*inputs, out, lse, dout, needs))
    if mask is not None:
        opcheck(mask_intervals, (mask, bool(extras), True))


def test_both_ops_stand_in_the_joint_graph(op_device: str, joint_targets: Any) -> None:
    inputs = make(torch.float32, op_device, lengths=(17, 17))
    targets = joint_targets(lambda q, k, v: attention(q, k, v, causal=True, scale=SCALE), *inputs)
    assert targets == ["fxopt.attention.default", "fxopt.attention_backward.default"]


def test_second_derivatives_are_refused(op_device: str) -> None:
    q, k, v = make(torch.float32, op_device, lengths=(17, 17))
    (dq,) = torch.autograd.grad(attention(q, k, v, scale=SCALE).sum(), [q], create_graph=True)
    with pytest.raises(RuntimeError, match="fxopt::attention: second derivatives are not implemented"):
        dq.sum().backward()


@pytest.mark.parametrize("lengths", [(0, 0), (4, 0)], ids=str)
def test_shapes_at_the_edge(lengths: tuple[int, int]) -> None:
    inputs = make(torch.float32, "cpu", lengths=lengths)
    out = attention(*inputs, scale=SCALE)
    assert out.shape == (2, 2, lengths[0], 16)
    assert not out.any()
    assert not any(value.any() for value in torch.autograd.grad(out.sum(), inputs))


def test_errors() -> None:
    q, k, v = make(torch.float32, "cpu")
    mask = torch.ones(17, 21, dtype=torch.bool)
    with pytest.raises(ValueError, match="expected 4 dims each, got 3, 4, 4"):
        attention(q[0], k, v, scale=SCALE)
    with pytest.raises(ValueError, match=r"expected the dtype of q torch.float32, got torch.float16"):
        attention(q, k.half(), v, scale=SCALE)
    with pytest.raises(ValueError, match="expected a divisor of the 2 heads of q"):
        attention(q, k.expand(-1, 3, -1, -1), v.expand(-1, 3, -1, -1), scale=SCALE)
    with pytest.raises(ValueError, match="nothing beside, got a causal mask"):
        attention(q, k, v, mask, causal=True, scale=SCALE)
    with pytest.raises(ValueError, match="got one with a gradient"):
        attention(q, k, v, torch.zeros(17, 21, requires_grad=True), scale=SCALE)
    with pytest.raises(ValueError, match=r"sinks, expected shape \(2,\), got \(4,\)"):
        attention(q, k, v, None, torch.ones(4), scale=SCALE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_there_is_a_plan_for_every_width_and_device(
    width: int, dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    for plan in plans_for(width, dtype, capability):
        assert all(min(tiles) >= 1 and min(tiles.queries, tiles.keys) >= 16 for tiles in plan)


def test_a_site_tells_what_was_chosen_for_calls_like_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_choices", {})

    def server(length: Any, **options: Any) -> choice.Server:
        shape = torch.empty(2, 4, length, 64, dtype=torch.bfloat16, device="meta")
        return choice.find_server(shape, shape[:, :2], shape[:, :2], **options)

    def choose(length: int, backend: backends.Backend, ms: dict[str, float], **options: Any) -> None:
        choice._choices[server(length, **options).kind] = choice.Choice(backend, ms, {})

    assert server(500, causal=True)() == "chosen at the first call"
    choose(500, backends.FLASH, {"cudnn": 0.25, "flash": 0.125}, causal=True)
    choose(500, backends.PLAIN, {})
    assert server(512, causal=True)() == "flash (2 x 512 x 512: cudnn 0.25 ms, flash 0.12 ms)"
    assert server(500)() == "plain torch (2 x 512 x 512)"
    assert server(513, causal=True)() == server(500, causal=True, softcap=2.0)() == "chosen at the first call"
    choose(1024, backends.CUDNN, {"cudnn": 0.5}, causal=True)
    kind = server(512, causal=True).kind._replace(queries=None, keys=None, is_square=None)
    both = "flash (2 x 512 x 512: cudnn 0.25 ms, flash 0.12 ms); cudnn (2 x 1024 x 1024: cudnn 0.50 ms)"
    assert choice.Server(kind, "")() == both
    with torch.device("cpu"):
        x = torch.empty(1, 1, 4, 8)
        assert choice.find_server(x, x, x, softcap=1.0)() == "plain torch"


def test_cudnn_is_no_candidate_where_torchs_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_is_new", lambda device: True)
    x = torch.zeros(1, 2, 16, 64, dtype=torch.bfloat16)
    call = Call(x, x, x, None, None, None, None, True, SCALE, 0.0, True)
    before = backends.find_candidates(call), choice.kind_of(call)
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        without = backends.find_candidates(call), choice.kind_of(call)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
    assert before[0] == [backends.CUDNN, backends.FLASH]
    assert without[0] == [backends.FLASH]
    assert before[1] != without[1] == before[1]._replace(cudnn=False)
    assert "cuDNN switched off" in str(without[1])
    assert "cuDNN" not in str(before[1])


@pytest.mark.gpu
def test_a_backend_may_be_chosen_within_a_backward_pass_and_is_that_of_forward_whatever_the_switch() -> None:
    device = torch.device("cuda", 0)
    x = torch.randn(1, 4, 640, 64, device=device, dtype=torch.bfloat16)
    call = Call(x, x, x, None, None, None, None, True, SCALE, 0.0, True)
    found: list[choice.Choice] = []
    run_as_backward(lambda: found.append(choice.measure(call, [backends.CUDNN, backends.FLASH])), device)
    assert found[0].ms.keys() == {"cudnn", "flash"}, "it would wait for itself"
    chosen = choice.choose(call)
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(not enabled)
    try:
        assert choice._find_chosen(call) is chosen
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def test_our_backends_agree_with_the_reference(device: str, check: Any, gradients: Any) -> None:
    inputs = make(torch.float32, device, lengths=(17, 17))
    mask = make_mask("left", (2, 2, 17, 17), torch.float32, device)
    sinks = torch.randn(2, device=device).requires_grad_()
    dout = torch.randn(2, 17, 2, 16, device=device).transpose(1, 2)

    def reference(q: Any, k: Any, v: Any, sinks: Any) -> torch.Tensor:
        return attention_reference(q, k, v, mask, sinks, scale=SCALE, softcap=3.0)

    exact_y, exact = gradients(reference, [*inputs, sinks], dout, torch.float64)
    eager_y, eager = gradients(reference, [*inputs, sinks], dout)
    q, k, v, given = (x.detach() for x in (*inputs, sinks))
    call = Call(q, k, v, mask, *launch_intervals(mask, True, True), given, False, SCALE, 3.0, True)
    for backend in (backends.triton_backend(0, plans_of(call)[0]), backends.PLAIN):
        out, lse = backend.forward(call)
        check(f"{backend.name} out", out, eager_y, exact_y)
        found = backend.backward(call, out, lse, dout, [True] * 4)
        for name, value, *others in zip("qkvs", found, eager, exact, strict=True):
            check(f"{backend.name} d{name}", value, *others)


def test_backward_passes_are_timed_where_autograd_runs_them(device: str) -> None:
    threads: list[int] = []
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():  # as an op is called
        run_as_backward(lambda: threads.append(threading.get_ident()), torch.device(device))
    assert len(threads) == 1
    assert (threads[0] == threading.get_ident()) == (device == "cpu")  # each GPU has a thread of its own

    def fail() -> None:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        run_as_backward(fail, torch.device(device))


@pytest.mark.gpu
def test_a_small_call_is_not_timed() -> None:
    q, k, v = make(torch.bfloat16, "cuda", heads=(4, 2), lengths=(7, 7), widths=(128, 128))
    attention(q, k, v, causal=True, scale=SCALE).sum().backward()
    name = "2 x 8 x 8, 4/2 heads of 128, bfloat16, causal, cuda:0"
    assert choice.chosen_backends()[name] == {"chosen": "flash", "ms": {}, "left_out": {}}


@pytest.mark.gpu
def test_a_backend_is_chosen_by_measurement_and_named() -> None:
    q, k, v = make(torch.bfloat16, "cuda", heads=(4, 2), lengths=(512, 512), widths=(128, 128))
    attention(q, k, v, causal=True, scale=SCALE).sum().backward()
    name = "2 x 512 x 512, 4/2 heads of 128, bfloat16, causal, cuda:0"
    found = choice.chosen_backends()[name]
    assert found["chosen"] == min(found["ms"], key=found["ms"].get)
    assert "flash" in found["ms"], found
    assert "differs" not in " ".join(found["left_out"].values()), found


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_every_backend_agrees_with_the_reference(causal: bool, check: Any, gradients: Any) -> None:
    inputs = make(torch.bfloat16, "cuda", heads=(4, 2), lengths=(257, 257), widths=(64, 64))
    dout = torch.randn(2, 257, 4, 64, device="cuda").transpose(1, 2).to(torch.bfloat16)
    reference = functools.partial(attention_reference, causal=causal, scale=SCALE)
    exact_y, exact = gradients(reference, inputs, dout, torch.float64)
    eager = functools.partial(stock, sinks=None, mask=None, causal=causal, softcap=0.0)
    eager_y, eager_gradients = gradients(eager, inputs, dout)
    q, k, v = (x.detach() for x in inputs)
    call = Call(q, k, v, None, None, None, None, causal, SCALE, 0.0, True)
    ours = backends.triton_backend(0, plans_of(call)[0])
    for backend in (*backends.find_candidates(call), ours):
        out, lse = backend.forward(call)
        found = backend.backward(call, out, lse, dout, [True, True, True, False])
        check(f"{backend.name} out", out, eager_y, exact_y)
        for name, value, *others in zip("qkv", found, eager_gradients, exact, strict=False):
            check(f"{backend.name} d{name}", value, *others)


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    """Rows 2^27 elements apart in a small view of a large tensor: the 17th starts at 2^31."""
    base = torch.zeros(2**31 + 64, dtype=torch.bfloat16, device="cuda")
    q = base.as_strided((1, 1, 17, 64), (0, 0, 2**27, 1))
    q.copy_(torch.randn(1, 1, 17, 64, device="cuda"))
    out, _ = launch_forward(Call(q, q, q, None, None, None, None, True, 0.1, 0.0, True))
    exact = attention_reference(q.double(), q.double(), q.double(), causal=True, scale=0.1)
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)
