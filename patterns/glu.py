"""Gated linear unit: an activation of one value times another -> one op.

Source: transformers `LlamaMLP`, `GemmaMLP`, `Phi3MLP`, `GptOssExperts` (`ACT2FN`: silu, gelu, gelu_new, ...).
Saved for backward: gate, up, or the one tensor whose halves or columns they are. Stock saves gate, up and the
activated gate, and joins the gradients of two halves by copying them.
Numerics: all in fp32, rounded once; stock rounds the activation first.

Where the gate is a bare sigmoid, the product is rewritten only if matrix products alone read it: such gates
stand in many places (attention, recurrences) where a compiler fuses them with what follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.graph.arguments import same_shape
from fxopt.graph.neighbours import find_fusible_reader, is_function_of
from fxopt.graph.vocabulary import cast as cast_tensor
from fxopt.kernels.glu import glu
from fxopt.kernels.glu.form import round_limit
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    attribute,
    choice,
    chunk,
    clamp,
    downcast,
    either,
    erf,
    gelu,
    maybe,
    named,
    number,
    operation,
    relu,
    sigmoid,
    silu,
    tanh,
    tensor,
    upcast,
)

SQRT_HALF = math.sqrt(0.5)
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def search() -> Term:
    """Return act(gate) * up; of the two factors the activated one is the gate."""
    both = tensor("both", "* B")
    halves = either(chunk(both, 2), operation(torch.split, both, split_size_or_sections=..., dim=-1))
    gate = choice(
        "place",
        first=named("gate", halves[0]),
        last=named("gate", halves[1]),
        sliced=named("gate", both[attribute("gate_index")]),
        apart=tensor("gate", "* I"),
    )
    up = choice(
        "place",
        first=named("up", halves[1]),
        last=named("up", halves[0]),
        sliced=named("up", both[attribute("up_index")]),
        apart=tensor("up", "* I"),
    )
    # A gate read twice is scaled and cut off in both places or in none.
    g = maybe(lambda g: g * number("gate_scale"), maybe(upcast, gate), "is_gate_scaled")
    g = maybe(lambda g: named("cut_gate", clamp(g, max=number("gate_limit"))), g, "is_gate_limited")
    u = maybe(lambda u: named("cut_up", clamp(u, number("up_lowest"), number("up_limit"))), maybe(upcast, up))
    u = maybe(lambda u: u + number("up_offset"), u)
    unit = maybe(downcast, activated(g)) * u
    by_name = operation(F.glu, both, dim=-1)
    return either(maybe(downcast, maybe(lambda unit: unit * number("scale"), unit)), by_name)


def activated(g: Term) -> Term:
    """Return the activations of `g`, the name bound to `act`."""
    cube = either(g**3, g * g * g, g * (g**2))
    inner = either((g + cube * 0.044715) * SQRT_2_OVER_PI, g * SQRT_2_OVER_PI * (g * 0.044715 * g + 1))
    return choice(
        "act",
        silu=either(silu(g), g * sigmoid(g)),
        sigmoid_alpha=g * sigmoid(g * number("alpha")),
        gelu=either(gelu(g), half_of(g, erf(either(g * SQRT_HALF, g / math.sqrt(2))))),
        gelu_tanh=either(gelu(g, "tanh"), half_of(g, tanh(inner))),
        relu2=either(relu(g) ** 2, relu(g) * relu(g)),
        relu=relu(g),
        sigmoid=sigmoid(g),
    )


def half_of(g: Term, curve: Term) -> Term:
    """Return `g * (1 + curve) / 2` in the orders in which it is written."""
    return either(g * 0.5 * (curve + 1), g * (curve + 1) * 0.5, g * ((curve + 1) * 0.5))


def check(m: Match) -> Mismatch | None:
    """Refuse factors of different shapes, pieces that are no halves, and sigmoids that are no gate of an MLP."""
    if m["act"] is not None:
        gate, up = m.example("gate"), m.example("up")
        if not same_shape(gate, up):
            reason = f"up has shape {list(up.shape)}, expected that of the gate {list(gate.shape)}"
            return m.fail(reason, "up")
        if not (gate.is_floating_point() and up.is_floating_point()):
            return m.fail(f"expected floats, got {gate.dtype} and {up.dtype}", "gate", "up")
        if layout_of(m) is None:
            return m.fail(
                "gate and up are pieces of one tensor, expected its halves or every other column", "gate"
            )
        if m["up_limit"] is not None and m["up_lowest"] != -m["up_limit"]:
            reason = f"up is cut off at {m['up_lowest']} and {m['up_limit']}, expected limits of one size"
            return m.fail(reason, "up")
        for side in ("gate", "up"):
            limit, dtype = m[f"{side}_limit"], m.example(side).dtype
            wide = dtype if limit is None else m.example(f"cut_{side}").dtype
            if round_limit(limit, wide) != round_limit(limit, dtype):
                return m.fail(f"{side} is cut off at {limit} in {wide}, which is no number of {dtype}", side)
        if m["act"] == "sigmoid" and is_function_of(m["gate"], m["up"]):
            return m.fail("expected another factor beside sigmoid, got what it was computed from", "gate")
    if m["act"] in (None, "sigmoid"):
        reader = find_fusible_reader(m.outputs[0])
        if reader is not None:
            name = getattr(reader.target, "__name__", str(reader.target))
            return m.fail(
                f"the gated value is read by {name}, with which a compiler fuses it, expected a projection"
            )
    return None


def layout_of(m: Match) -> tuple[str, bool] | None:
    """Return the layout of gate and up and whether the gate is first; None if they are other pieces."""
    if m["act"] is None:
        return "packed", False
    if m["place"] == "apart":
        return "split", True
    both, width = m.example("both"), m.example("gate").shape[-1]
    if not (isinstance(width, int) and both.shape[-1] == 2 * width):
        return None
    if m["place"] != "sliced":
        return "packed", m["place"] == "first"
    pieces = m["gate_index"], m["up_index"]
    if any(not isinstance(index, tuple) or len(index) != min(both.dim(), 2) for index in pieces):
        return None
    gate, up = (index[-1] for index in pieces)
    pairs: dict[str, tuple[slice, slice]] = {
        "packed": (slice(None, width), slice(width, None)),
        "interleaved": (slice(None, None, 2), slice(1, None, 2)),
    }
    for layout, pair in pairs.items():
        if (gate, up) in (pair, pair[::-1]):
            return layout, gate == pair[0]
    return None


def attributes_of(m: Match) -> dict[str, Any]:
    """Return the attributes of the op, those left out that have their defaults."""
    layout = layout_of(m)
    assert layout is not None
    found: dict[str, Any] = {"act": m["act"] or "sigmoid"}
    for name in ("alpha", "gate_scale", "gate_limit", "up_limit", "up_offset", "scale"):
        if m[name] is not None:
            found[name] = float(m[name])
    if layout[0] != "split":
        found |= {"layout": layout[0], "gate_first": layout[1]}
    return found


def replace(m: Match) -> Call:
    """Return one call of the fused op, in a dtype no narrower than the model's result."""
    attributes, dtype = attributes_of(m), m.output.dtype
    names = ("gate", "up") if "layout" not in attributes else ("both",)
    first, *rest = (m[name] for name in names)
    product = m.example(names[0]).dtype
    for name in names:
        product = torch.promote_types(product, m.example(name).dtype)
    if product == dtype:
        return call(glu, first, *rest, **attributes)
    if torch.promote_types(product, dtype) == product:
        return call(cast_tensor, call(glu, first, *rest, **attributes), dtype=dtype)
    return call(glu, call(cast_tensor, first, dtype=dtype), *rest, **attributes)


def _silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return up * F.gelu(gate)


def _gelu_tanh(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _times_sigmoid(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate * torch.sigmoid(gate) * up


def _gelu_new(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    inner = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * torch.pow(gate, 3.0))
    return 0.5 * gate * (1.0 + torch.tanh(inner)) * up


def _gelu_fast(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return 0.5 * gate * (1.0 + torch.tanh(gate * 0.7978845608 * (1.0 + 0.044715 * gate * gate))) * up


def _gelu_by_erf(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate * 0.5 * (1.0 + torch.erf(gate / math.sqrt(2.0))) * up


def _in_fp32(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (F.silu(gate.float()) * up).to(up.dtype)


def _wide(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate.float()) * up


def _relu_squared(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.relu(gate).square() * up


def _relu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.relu(gate) * up


def _sigmoid(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.sigmoid() * up


def _quick_gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate * torch.sigmoid(1.702 * gate) * up


def _multiplied(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return up * F.silu(gate * 0.75) * 1.5


def _cut_off(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate.clamp(max=0.5)) * up.clamp(min=-0.5, max=0.5)


def _cut_off_between(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (F.silu(gate.float().clamp(max=0.7)) * up.float()).to(up.dtype)


def _cut_off_in_fp32(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (F.silu(torch.clip(gate.float(), max=0.5)) * torch.clip(up.float(), -0.5, 0.5)).to(up.dtype)


def _packed(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return up * F.silu(gate)


def _up_first(both: torch.Tensor) -> torch.Tensor:
    up, gate = both.split(both.shape[-1] // 2, dim=-1)
    return F.gelu(gate) * up


def _sliced(both: torch.Tensor) -> torch.Tensor:
    half = both.shape[-1] // 2
    return F.silu(both[..., :half]) * both[..., half:]


def _interleaved(both: torch.Tensor) -> torch.Tensor:
    gate, up = both[..., ::2], both[..., 1::2]
    gate = gate.clamp(min=None, max=0.7)
    up = up.clamp(min=-0.7, max=0.7)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def _interleaved_up_first(both: torch.Tensor) -> torch.Tensor:
    return F.silu(both[..., 1::2]) * both[..., ::2]


def _halved(both: torch.Tensor) -> torch.Tensor:
    return F.glu(both)


def _inputs(device: torch.device, dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(*shape, dtype=dtype, device=device, requires_grad=True) for _ in range(2))


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield the spellings above at odd sizes."""
    forms = (
        *(_silu, _gelu, _gelu_tanh, _times_sigmoid, _gelu_new, _gelu_fast, _gelu_by_erf, _in_fp32, _wide),
        *(_relu_squared, _relu, _sigmoid, _quick_gelu, _multiplied, _cut_off, _cut_off_in_fp32),
    )
    for function in forms:
        yield f"{function.__name__.strip('_')} bf16", (function, _inputs(device, torch.bfloat16, 2, 5, 63))
    for function in (_silu, _gelu_new):
        yield f"{function.__name__.strip('_')} fp32", (function, _inputs(device, torch.float32, 1, 7, 33))
    for function in (_packed, _up_first, _sliced, _interleaved, _interleaved_up_first, _halved):
        both = _inputs(device, torch.bfloat16, 2, 5, 126)[:1]
        yield f"{function.__name__.strip('_')} bf16", (function, both)


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield code that must be left alone, and a part of the reason."""
    gate, up = _inputs(device, torch.float32, 2, 5, 8)
    thin = torch.randn(2, 5, 1, device=device, requires_grad=True)

    def escaping(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        activated = F.silu(gate)
        return activated * up, activated

    yield (
        "the product is activated",
        (lambda gate, up: F.silu(gate * up), (gate, up)),
        "expected cast or glu or mul above silu, got the graph's output",
    )
    yield "broadcast", (lambda gate, up: F.silu(gate) * up, (thin, up)), "up: expected size I = 1, got 8"
    yield (
        "the activation is read elsewhere",
        (escaping, (gate, up)),
        "silu is also returned",
    )
    yield (
        "summed",
        (lambda gate, up: F.silu(gate) + up, (gate, up)),
        "expected cast or glu or mul above silu, got add",
    )
    yield (
        "a gate on the way to a sum",
        (lambda gate, up: torch.sigmoid(gate) * up + gate, (gate, up)),
        "the gated value is read by add, with which a compiler fuses it, expected a projection",
    )
    yield (
        "silu alone",
        (lambda gate, up: gate * torch.sigmoid(gate), (gate, up)),
        "expected another factor beside sigmoid, got what it was computed from",
    )


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield broken units: they must be left alone, or be computed as they stand."""
    pair = _inputs(device, torch.float32, 4, 8)
    (both, _) = _inputs(device, torch.float32, 4, 12)
    yield "both activated", (lambda g, u: F.silu(g) * F.silu(u), pair)
    yield "sigmoid of the other", (lambda g, u: g * torch.sigmoid(u) * u, pair)
    yield "sigmoid alone", (lambda g, u: torch.sigmoid(g) * u, pair)
    yield "steeper sigmoid", (lambda g, u: g * torch.sigmoid(1.702 * g) * u, pair)
    yield "sigmoid of a multiple", (lambda g, u: (2 * g) * torch.sigmoid(g) * u, pair)
    yield "sigmoid of what is cut off", (lambda g, u: g * torch.sigmoid(g.clamp(max=0.5)) * u, pair)
    yield "gate cut off below", (lambda g, u: F.silu(g.clamp(min=-0.5)) * u, pair)
    yield "cut off in fp32", (_cut_off_between, _inputs(device, torch.bfloat16, 2, 5, 63))
    yield "gate cut off late", (lambda g, u: F.silu(g).clamp(max=0.5) * u, pair)
    yield "up cut off unevenly", (lambda g, u: F.silu(g) * u.clamp(-0.5, 0.7), pair)
    yield "cut off and divided", (lambda g, u: F.silu(g / 3) * (u.clamp(-0.5, 0.5) - 1), pair)
    yield (
        "another cube",
        (lambda g, u: 0.5 * g * (1 + torch.tanh(SQRT_2_OVER_PI * (g + 0.05 * g**3))) * u, pair),
    )
    yield "not halved", (lambda g, u: g * (1 + torch.erf(g * SQRT_HALF)) * u, pair)
    yield "itself", (lambda g, u: F.silu(g) * g + u, pair)
    yield "one half twice", (lambda b: F.silu(b.chunk(2, -1)[0]) * b.chunk(2, -1)[0], (both,))
    yield "thirds", (lambda b: F.silu(b.chunk(3, -1)[0]) * b.chunk(3, -1)[1], (both,))
    yield "two of three", (lambda b: F.silu(b.split(4, -1)[0]) * b.split(4, -1)[1], (both,))
    yield "overlapping", (lambda b: F.silu(b[..., :8]) * b[..., 4:], (both,))
    yield "every third", (lambda b: F.silu(b[..., ::3]) * b[..., 1::3], (both,))
    yield "halves of the rows", (lambda b: F.silu(b[:2]) * b[2:], (both,))
    yield "halves of other tensors", (lambda b: F.silu(b[..., :6]) * (b * 2)[..., 6:], (both,))


GLU = Pattern(
    name="glu",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    source="transformers LlamaMLP, GemmaMLP, Phi3MLP, GptOssExperts and ACT2FN",
)
