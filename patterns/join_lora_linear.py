"""Adapted linear layers that read one tensor -> one op, which reads it once for all their adapters.

q, k and v read the result of one norm, gate and up that of another. This pattern works on the ops that
`patterns/lora_linear.py` leaves, and takes along the decoding of their weights, so that all of it may stand before
the first reader of the first layer.
Saved for backward: x once. The gradients that flow into x are summed in the products that compute them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from fxopt.kernels.dequantize_4bit import dequantize_4bit
from fxopt.kernels.lora_linear import lora_linear
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import Term, also, attribute, choice, operation, tensor

DECODED = ("packed", "absmax", "codebook", "nested_absmax", "offset")
DECODING = ("shape", "blocksize", "quant_type", "dtype")
LISTS = ("biases", "inputs", "a", "b")
SHARED = ("dtype", "adapter_dtype", "out_dtype")
PLACES = (1, 2, 3)


def search() -> tuple[Term, ...]:
    """Return two or three layers with adapters that read the same x."""
    x = tensor("x")
    first, second, third = (_layer(x, place) for place in PLACES)
    return first, second, also(third)


def _layer(x: Term, place: int) -> Term:
    decoded = operation(
        dequantize_4bit,
        *(attribute(f"{name}_{place}") for name in DECODED),
        **{name: attribute(f"decoded_{name}_{place}") for name in DECODING},
    )
    weight = choice(f"weight_kind_{place}", decoded=decoded, given=tensor(f"weight_{place}"))
    layer = operation(
        lora_linear,
        x,
        (weight,),
        *(attribute(f"{name}_{place}") for name in LISTS),
        owners=...,
        scales=attribute(f"scales_{place}"),
        **{name: attribute(name) for name in SHARED},
    )
    return layer[0]


def check(m: Match) -> Mismatch | None:
    """Refuse one layer taken twice."""
    if len(set(m.outputs)) != len(m.outputs):
        return m.fail("one layer, expected two or three that read the same tensor", "x")
    return None


def replace(m: Match) -> tuple[Call, ...]:
    """Return the results of one op."""
    places = PLACES[: len(m.outputs)]
    weights = tuple(_weight_of(m, place) for place in places)
    joined = [tuple(item for place in places for item in m[f"{name}_{place}"]) for name in LISTS]
    scales = tuple(scale for place in places for scale in m[f"scales_{place}"])
    owners = tuple(index for index, place in enumerate(places) for _ in m[f"scales_{place}"])
    shared = {name: m[name] for name in SHARED}
    results = call(lora_linear, m["x"], weights, *joined, owners=owners, scales=scales, **shared)
    return tuple(call(operator.getitem, results, index) for index in range(len(places)))


def _weight_of(m: Match, place: int) -> Call | torch.fx.Node:
    if m[f"weight_kind_{place}"] == "given":
        return m[f"weight_{place}"]
    operands = [m[f"{name}_{place}"] for name in DECODED]
    return call(dequantize_4bit, *operands, **{name: m[f"decoded_{name}_{place}"] for name in DECODING})


def _adapted(x: torch.Tensor, weights: Sequence[torch.Tensor], scale: float = 2.0) -> torch.Tensor:
    weight, a, b = weights
    return F.linear(x, weight) + F.linear(F.linear(x, a), b) * scale


def _two(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _adapted(x, weights[:3]), _adapted(x, weights[3:])


def _three(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    q = torch.tanh(_adapted(x, weights[:3]))
    k = torch.tanh(_adapted(x, weights[3:6], scale=0.5))
    return q + k * torch.tanh(_adapted(x, weights[6:]))


def _inputs(
    device: torch.device, count: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    x = torch.randn(2, 5, 32, device=device).to(dtype).requires_grad_()
    weights: list[torch.Tensor] = []
    for _ in range(count):
        weights.append((torch.randn(24, 32, device=device) / 5).to(dtype))
        weights.append((torch.randn(4, 32, device=device) / 5).to(dtype).requires_grad_())
        weights.append((torch.randn(24, 4, device=device) / 2).to(dtype).requires_grad_())
    return x, *weights


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield layers of one input."""
    yield "two", (_two, _inputs(device, 2))
    yield "three", (_three, _inputs(device, 3))
    yield "fp32", (_three, _inputs(device, 3, torch.float32))


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield layers of different inputs, and one that reads the other's result."""
    x, *weights = _inputs(device, 2)

    def apart(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _adapted(x, weights[:3]), _adapted(x * 2, weights[3:])

    yield "two inputs", (apart, (x, *weights)), "one layer, expected two or three"


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield layers that must not be moved before what they read."""
    x, *weights = _inputs(device, 2, torch.float32)

    def dependent(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        first = _adapted(x, weights[:3])
        return F.linear(x, weights[3]) + F.linear(F.linear(x, weights[4]), weights[5] * first.mean()) + first

    yield "the second reads the first", (dependent, (x, *weights))


JOIN_LORA_LINEAR = Pattern(
    name="join_lora_linear",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    source="transformers Qwen2Attention, Qwen2MLP with peft adapters",
)
