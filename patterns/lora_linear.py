"""A linear layer and the low-rank adapters added to its result -> one op of few products.

Source: peft `lora.Linear`, `lora.bnb.Linear4bit`: `result + lora_B(lora_A(dropout(x))) * scaling` with casts of x and
of the results around it, also rank-stabilized (another factor) and with a bias on B. A further adapter of the same
layer is added to the op that the first became. The weight may be a decoded four-bit one.
Saved for backward: x (and what an adapter reads in its place: x after dropout); stock saves x in fp32, x A^T, and
the result of the adapter.
Numerics: what an adapter adds is rounded once, in the sum; stock rounds it before and after the factor as well.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.graph.arguments import same_shape
from fxopt.graph.vocabulary import cast as cast_tensor
from fxopt.kernels.lora_linear import lora_linear
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    attribute,
    cast,
    choice,
    either,
    keep,
    linear,
    maybe,
    named,
    number,
    operation,
    tensor,
)


def search() -> Term:
    """Return the sum of a linear layer's result, or of the op's, and one adapter's."""
    x = tensor("x", "* K")
    read = maybe(lambda x: keep(cast(x), cheap=True), x)
    weight = tensor("weight", "N K")
    plain = either(linear(read, weight, tensor("bias", "N")), linear(read, weight))
    adapted = operation(
        lora_linear,
        x,
        *map(attribute, ("weights", "biases", "inputs", "a", "b")),
        **{name: attribute(name) for name in ("owners", "scales", "dtype", "adapter_dtype")},
        out_dtype=...,
    )
    base = choice("base_kind", plain=named("base", plain), adapted=named("base", adapted[0]))
    own = choice("reads", x=read, own=tensor("own", "* L"))
    inner = named("inner", linear(own, tensor("A", "R L")))
    factor = tensor("B", "N R")
    part = named("part", either(linear(inner, factor, tensor("B_bias", "N")), linear(inner, factor)))
    part = maybe(cast, maybe(lambda part: part * number("scale"), part))
    return maybe(cast, named("sum", maybe(cast, base) + part))


def check(m: Match) -> Mismatch | None:
    """Refuse what is no adapter (a second layer as wide as the first), and results of other shapes."""
    base, part, a, b = (m.example(name) for name in ("base", "part", "A", "B"))
    rank = a.shape[0]
    if not all(isinstance(size, int) for size in (*a.shape, *b.shape)):
        return m.fail("an adapter's shape is symbolic, expected numbers", "A", "B")
    if rank >= min(a.shape[1], b.shape[0]):
        return m.fail(f"rank {rank} of a layer of {a.shape[1]} by {b.shape[0]}, expected a smaller one", "A")
    if not same_shape(base, part):
        return m.fail(f"adds {list(part.shape)} to {list(base.shape)}, expected equal shapes", "part")
    for name in ("x", "base", "part", "inner"):
        if not m.example(name).is_floating_point():
            return m.fail(f"{name} is {m.example(name).dtype}, expected floating-point numbers", name)
    if not m.output.is_floating_point():
        return m.fail(f"the sum is cast to {m.output.dtype}, expected floating-point numbers")
    if m.output.dtype != m.example("sum").dtype and m.output.dtype == torch.promote_types(
        m.output.dtype, m.example("sum").dtype
    ):
        return m.fail(f"the sum is widened to {m.output.dtype}, which is its reader's", "sum")
    if m["base_kind"] == "adapted":
        if len(m["weights"]) != 1:
            return m.fail("the op has several layers, expected the one that the adapter belongs to", "base")
        if m["adapter_dtype"] != m.example("inner").dtype:
            found = m.example("inner").dtype
            return m.fail(
                f"the adapter computes in {found}, expected {m['adapter_dtype']} as the others", "inner"
            )
        if m["B_bias"] is not None:
            return m.fail("a bias on the second adapter of a layer, expected one on the first only", "B_bias")
    return None


def replace(m: Match) -> Call:
    """Return the result of the layer with the adapter, in the dtypes that the model computes in."""
    scale = 1.0 if m["scale"] is None else float(m["scale"])
    x, inner = m.example("x"), m.example("inner")
    if m["base_kind"] == "adapted":
        dtype = m["dtype"]
        weights, biases = m["weights"], m["biases"]
        others = [m[name] for name in ("inputs", "a", "b", "owners", "scales")]
    else:
        dtype = m.example("base").dtype
        weights, biases = (m["weight"],), (_bias_of(m, dtype, scale),)
        others = [()] * 5
    own = m["own"] if m["reads"] == "own" else None
    if own is None and torch.promote_types(x.dtype, dtype) != dtype and inner.dtype != dtype:
        own = m["x"]  # an adapter wider than its layer reads more of x than the layer does
    mine = (own, m["A"], m["B"], 0, scale)
    inputs, a, b, owners, scales = ((*other, item) for other, item in zip(others, mine, strict=True))
    options = dict(owners=owners, scales=scales, dtype=dtype, adapter_dtype=inner.dtype)
    results = call(lora_linear, m["x"], weights, biases, inputs, a, b, **options, out_dtype=m.output.dtype)
    return call(operator.getitem, results, 0)


def _bias_of(m: Match, dtype: torch.dtype, scale: float) -> Any:
    """Return the bias of the layer and that of the adapter as one."""
    if m["B_bias"] is None:
        return m["bias"]
    own: Any = m["B_bias"]
    wide = torch.promote_types(dtype, torch.float32)
    own = own if m.example("B_bias").dtype == wide else call(cast_tensor, own, dtype=wide)
    own = own if scale == 1.0 else call(torch.mul, own, scale)
    if m["bias"] is not None:
        own = call(torch.add, own, m["bias"])
    return own


def _adapted(*, scale: float = 2.0, casts: bool = True) -> Callable[..., torch.Tensor]:
    """Return one adapted layer as peft spells it, a function of (x, weight, bias, A, B)."""

    def layer(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        b_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        result = F.linear(x, weight, bias)
        dtype = result.dtype
        x = x.to(a.dtype)
        result = result + F.linear(F.linear(x, a), b, b_bias) * scale
        return result.to(dtype) if casts else result

    return layer


def _under_autocast(*arguments: torch.Tensor) -> torch.Tensor:
    with torch.autocast(arguments[0].device.type, torch.bfloat16):
        return _adapted()(*arguments)


def _with_clone(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    output = F.linear(F.linear(x.to(a.dtype), a), b) * 0.5
    return F.linear(x, weight, bias).clone() + output.to(x.dtype)


def _own_input(
    x: torch.Tensor, own: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    return F.linear(F.linear(own, a), b) * 0.5 + F.linear(x, weight)


def _inputs(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, adapter_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    """Return x, a frozen weight, a frozen bias, A and B."""
    adapter_dtype = adapter_dtype or dtype
    x = torch.randn(2, 5, 32, device=device).to(dtype).requires_grad_()
    weight, bias = (
        (torch.randn(24, 32, device=device) / 5).to(dtype),
        torch.randn(24, device=device).to(dtype),
    )
    a = (torch.randn(4, 32, device=device) / 5).to(adapter_dtype).requires_grad_()
    b = (torch.randn(24, 4, device=device) / 2).to(adapter_dtype).requires_grad_()
    return x, weight, bias, a, b


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield adapted layers in the dtypes that peft trains them in."""
    bf16, fp32 = torch.bfloat16, torch.float32
    x, weight, bias, a, b = _inputs(device)
    yield "bf16", (_adapted(), (x, weight, bias, a, b))
    yield "no bias, no factor", (_adapted(scale=1.0), (x, weight, None, a, b))
    yield "cloned", (_with_clone, (x, weight, bias, a, b))
    yield "a frozen input", (_adapted(), (x.detach(), weight, bias, a, b))
    yield "a trained layer", (_adapted(), (x, weight.requires_grad_(), bias.requires_grad_(), a, b))
    own = torch.randn(2, 5, 32, device=device).to(bf16).requires_grad_()
    yield "an input of its own", (_own_input, (x, own, weight.detach(), a, b))
    b_bias = torch.randn(24, device=device).to(bf16).requires_grad_()
    yield "a bias on B", (_adapted(), (x, weight.detach(), bias.detach(), a, b, b_bias))
    yield "a bias on B alone", (_adapted(), (x, weight.detach(), None, a, b, b_bias))
    yield "fp32", (_adapted(), _inputs(device, fp32))
    yield "fp32 adapters", (_adapted(), _inputs(device, bf16, fp32))
    yield "fp32 adapters, wide sum", (_adapted(casts=False), _inputs(device, bf16, fp32))
    yield "fp32 adapters under autocast", (_under_autocast, _inputs(device, bf16, fp32))
    yield "widened by its reader", (lambda *args: _adapted()(*args).float().tanh(), _inputs(device, bf16))
    yield "fp32 under autocast", (_under_autocast, _inputs(device, fp32, fp32))


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield sums that are no adapted layer."""
    x, weight, bias, a, b = _inputs(device)
    wide_a = torch.randn(24, 32, device=device).to(torch.bfloat16).requires_grad_()
    wide_b = torch.randn(24, 24, device=device).to(torch.bfloat16).requires_grad_()
    yield "two layers", (_adapted(), (x, weight, bias, wide_a, wide_b)), "expected a smaller one"

    def activated(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        return F.linear(x, weight, bias) + F.linear(F.silu(F.linear(x, a)), b)

    yield "an activation between", (activated, (x, weight, bias, a, b)), "expected linear, got silu"

    def scaled(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        y = F.linear(x, weight, bias)
        return y + F.linear(F.linear(x, a), b) * torch.sigmoid(y)

    yield "a factor per item", (scaled, (x, weight, bias, a, b)), "scale: expected a number, got sigmoid"


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield sums that a careless match would compute wrongly."""
    inputs = _inputs(device, torch.float32)
    yield "subtracted", (lambda x, w, c, a, b: F.linear(x, w, c) - F.linear(F.linear(x, a), b), inputs)
    yield "both scaled", (lambda x, w, c, a, b: (F.linear(x, w, c) + F.linear(F.linear(x, a), b)) * 3, inputs)
    yield (
        "alpha",
        (lambda x, w, c, a, b: torch.add(F.linear(x, w, c), F.linear(F.linear(x, a), b), alpha=3), inputs),
    )
    yield (
        "a bias on A",
        (lambda x, w, c, a, b: F.linear(x, w, c) + F.linear(F.linear(x, a, a[:, 0]), b), inputs),
    )
    yield (
        "scaled inside",
        (lambda x, w, c, a, b: F.linear(x, w, c) + F.linear(F.linear(x, a) * 2, b) * 3, inputs),
    )
    yield "another input", (lambda x, w, c, a, b: F.linear(x, w, c) + F.linear(F.linear(x + 1, a), b), inputs)
    yield "divided", (lambda x, w, c, a, b: F.linear(x, w, c) + F.linear(F.linear(x, a), b) / 4, inputs)
    yield "one row", (lambda x, w, c, a, b: F.linear(x, w, c) + F.linear(F.linear(x[:1], a), b), inputs)


LORA_LINEAR = Pattern(
    name="lora_linear",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    source="peft lora.Linear, lora.bnb.Linear4bit",
)
