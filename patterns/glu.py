"""Gated linear unit: an activation of one value times another -> one op.

Source: transformers `LlamaMLP`, `GemmaMLP`, `Phi3MLP` (`ACT2FN`: silu, gelu, gelu_new, gelu_pytorch_tanh).
Saved for backward: gate, up. Stock saves gate, up and the activated gate.
Numerics: all in fp32, rounded once; stock rounds the activation first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fxopt.graph.arguments import same_shape
from fxopt.graph.vocabulary import cast as cast_tensor
from fxopt.kernels.glu import glu
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    choice,
    downcast,
    either,
    erf,
    gelu,
    maybe,
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
    gate, up = tensor("gate", "* I"), tensor("up", "* I")
    g = maybe(upcast, gate)
    cube = either(g**3, g * g * g, g * (g**2))
    inner = either((g + cube * 0.044715) * SQRT_2_OVER_PI, g * SQRT_2_OVER_PI * (g * 0.044715 * g + 1))
    activated = choice(
        "act",
        silu=either(silu(g), g * sigmoid(g)),
        gelu=either(gelu(g), half_of(g, erf(either(g * SQRT_HALF, g / math.sqrt(2))))),
        gelu_tanh=either(gelu(g, "tanh"), half_of(g, tanh(inner))),
    )
    return maybe(downcast, maybe(downcast, activated) * maybe(upcast, up))


def half_of(g: Term, curve: Term) -> Term:
    """Return `g * (1 + curve) / 2` in the orders in which it is written."""
    return either(g * 0.5 * (curve + 1), g * (curve + 1) * 0.5, g * ((curve + 1) * 0.5))


def check(m: Match) -> Mismatch | None:
    """Refuse factors of different shapes."""
    gate, up = m.example("gate"), m.example("up")
    if not same_shape(gate, up):
        return m.fail(f"up has shape {list(up.shape)}, expected that of the gate {list(gate.shape)}", "up")
    if not (gate.is_floating_point() and up.is_floating_point()):
        return m.fail(f"expected floats, got {gate.dtype} and {up.dtype}", "gate", "up")
    return None


def replace(m: Match) -> Call:
    """Return one call of the fused op, in a dtype no narrower than the model's result."""
    gate, up, dtype = m.example("gate").dtype, m.example("up").dtype, m.output.dtype
    product = torch.promote_types(gate, up)
    if product == dtype:
        return call(glu, m["gate"], m["up"], act=m["act"])
    if torch.promote_types(product, dtype) == product:
        return call(cast_tensor, call(glu, m["gate"], m["up"], act=m["act"]), dtype=dtype)
    return call(glu, call(cast_tensor, m["gate"], dtype=dtype), m["up"], act=m["act"])


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


def _packed(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return up * F.silu(gate)


def _inputs(device: torch.device, dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(*shape, dtype=dtype, device=device, requires_grad=True) for _ in range(2))


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield the spellings above at odd sizes; halves of one tensor are not contiguous."""
    forms = (_silu, _gelu, _gelu_tanh, _times_sigmoid, _gelu_new, _gelu_fast, _gelu_by_erf, _in_fp32, _wide)
    for function in forms:
        yield f"{function.__name__.strip('_')} bf16", (function, _inputs(device, torch.bfloat16, 2, 5, 63))
    for function in (_silu, _gelu_new):
        yield f"{function.__name__.strip('_')} fp32", (function, _inputs(device, torch.float32, 1, 7, 33))
    yield "packed bf16", (_packed, _inputs(device, torch.bfloat16, 2, 5, 126)[:1])


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
        "expected cast or mul above silu, got the graph's output",
    )
    yield "broadcast", (lambda gate, up: F.silu(gate) * up, (thin, up)), "up: expected size I = 1, got 8"
    yield (
        "the activation is read elsewhere",
        (escaping, (gate, up)),
        "activated (silu) is also read by the graph's output",
    )
    yield (
        "summed",
        (lambda gate, up: F.silu(gate) + up, (gate, up)),
        "expected cast or mul above silu, got add",
    )


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield broken units: they must be left alone, or be computed as they stand."""
    pair = _inputs(device, torch.float32, 4, 8)
    yield "both activated", (lambda g, u: F.silu(g) * F.silu(u), pair)
    yield "sigmoid of the other", (lambda g, u: g * torch.sigmoid(u) * u, pair)
    yield "sigmoid alone", (lambda g, u: torch.sigmoid(g) * u, pair)
    yield "steeper sigmoid", (lambda g, u: g * torch.sigmoid(1.702 * g) * u, pair)
    yield (
        "another cube",
        (lambda g, u: 0.5 * g * (1 + torch.tanh(SQRT_2_OVER_PI * (g + 0.05 * g**3))) * u, pair),
    )
    yield "not halved", (lambda g, u: g * (1 + torch.erf(g * SQRT_HALF)) * u, pair)
    yield "itself", (lambda g, u: F.silu(g) * g + u, pair)


GLU = Pattern(
    name="glu",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    source="transformers LlamaMLP, GemmaMLP, Phi3MLP and ACT2FN",
)
