"""A residual add whose sum an RMS norm reads -> one op that returns both.

The norm is the op that `patterns/rms_norm.py` made of its spelling: this pattern works on what that one leaves.
Source: transformers `LlamaDecoderLayer` (the second norm of a block), `GraniteDecoderLayer` (one side times a
multiplier), `Gemma2DecoderLayer` (the sum of the skip and a norm, normed again).
Saved for backward: the sum (live anyway), weight, one fp32 number per row. Stock reads and writes the sum and
its gradient in passes of their own.
Numerics: the multiplied side and, in backward, the two gradients of the sum are not rounded on their own.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fxopt.graph.arguments import same_shape
from fxopt.kernels.add_rms_norm import add_rms_norm as fused_add_rms_norm
from fxopt.kernels.rms_norm import rms_norm as fused_rms_norm
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    attribute,
    either,
    export,
    maybe,
    named,
    number,
    operation,
    tensor,
    upcast,
)


def search() -> Term:
    """Return an ungated norm of `skip + x`, or of `skip + x * scale`."""
    x, skip = tensor("x", "* H"), tensor("skip", "* H")
    xf = maybe(upcast, x)
    h = named("sum", skip + either(xf * number("scale"), xf))
    return operation(
        fused_rms_norm,
        export("h", h),
        attribute("w"),
        None,
        eps=attribute("eps"),
        offset=attribute("offset"),
        cast_first=attribute("cast_first"),
        centre=attribute("centre"),
        gate_act=...,
        gate_before=...,
        groups=1,
        out_dtype=attribute("out_dtype"),
    )


def check(m: Match) -> Mismatch | None:
    """Refuse sums that broadcast, and those of whole numbers."""
    x, skip = m.example("x"), m.example("skip")
    if not same_shape(x, skip):
        return m.fail(f"a sum of shapes {list(x.shape)} and {list(skip.shape)}, expected equal ones", "skip")
    if not (x.is_floating_point() and skip.is_floating_point()):
        return m.fail(f"a sum of {x.dtype} and {skip.dtype}, expected floating-point numbers", "skip")
    if m.example("sum").dtype != torch.promote_types(x.dtype, skip.dtype):
        return m.fail(f"the sum of {x.dtype} and {skip.dtype} is {m.example('sum').dtype}", "sum")
    return None


def replace(m: Match) -> tuple[Call, ...]:
    """Return the norm, and the sum where something else reads it."""
    both = call(
        fused_add_rms_norm,
        m["x"],
        m["skip"],
        m["w"],
        eps=m["eps"],
        scale=1.0 if m["scale"] is None else float(m["scale"]),
        offset=m["offset"],
        cast_first=m["cast_first"],
        centre=m["centre"],
        out_dtype=m["out_dtype"],
    )
    y, h = call(operator.getitem, both, 1), call(operator.getitem, both, 0)
    return (y, h) if m.exports else (y,)


def _norm(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    hf = h.to(torch.float32)
    return w * (hf * torch.rsqrt(hf.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


def _gemma_norm(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    hf = h.float()
    return ((hf * torch.rsqrt(hf.pow(2).mean(-1, keepdim=True) + 1e-6)) * (1.0 + w.float())).type_as(h)


def _llama(x: torch.Tensor, skip: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = skip + x
    return h + torch.tanh(_norm(h, w))


def _granite(x: torch.Tensor, skip: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = skip + x * 0.22
    return h + torch.tanh(_norm(h, w))


def _gemma(x: torch.Tensor, skip: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x + skip
    return h + torch.tanh(_gemma_norm(h, w))


def _gemma2(x: torch.Tensor, skip: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = skip + _gemma_norm(x, w)
    return h + torch.tanh(_gemma_norm(h, w))


def _unread(x: torch.Tensor, skip: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _norm(skip + x, w)


def _summed_in_place(x: torch.Tensor, skip: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = torch.sin(x)
    h += skip
    return h * 2 + _norm(h, w)


def _weightless(x: torch.Tensor, skip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = skip + x
    return F.rms_norm(h, (h.shape[-1],), eps=1e-6), h


def _scaled_and_read(
    x: torch.Tensor, skip: torch.Tensor, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x * 0.5
    return _norm(skip + x, w), x


def _inputs(device: torch.device, *dtypes: torch.dtype) -> tuple[torch.Tensor, ...]:
    x, skip = (torch.randn(2, 5, 63, device=device).to(dtype).requires_grad_() for dtype in dtypes[:2])
    w = (1 + torch.randn(63, device=device) / 4).to(dtypes[-1]).requires_grad_()
    return x, skip, w


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield the blocks above in bf16 and fp32, with the sum read or not, and with inputs of two dtypes."""
    bf16, fp32 = torch.bfloat16, torch.float32
    functions = (_llama, _granite, _gemma, _gemma2, _unread, _summed_in_place, _scaled_and_read)
    for dtype in (bf16, fp32):
        for function in functions:
            name = f"{function.__name__.strip('_')} {str(dtype).removeprefix('torch.')}"
            yield name, (function, _inputs(device, dtype, dtype, dtype))
    yield "weightless", (_weightless, _inputs(device, bf16, bf16, bf16)[:2])
    for function in (_llama, _granite):
        yield f"{function.__name__.strip('_')} on a wide skip", (function, _inputs(device, bf16, fp32, fp32))
    yield (
        "cast to a wide skip",
        (lambda x, skip, w: _llama(x.float(), skip, w), _inputs(device, bf16, fp32, fp32)),
    )
    x, skip, w = _inputs(device, fp32, fp32, fp32)
    yield "a frozen skip", (_llama, (x, skip.detach(), w))
    yield "a frozen weight", (_granite, (x, skip, w.detach()))


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield norms of what is no residual add."""
    x, skip, w = _inputs(device, torch.float32, torch.float32, torch.float32)
    yield "a difference", (lambda x, skip, w: _norm(skip - x, w), (x, skip, w)), "expected add, got sub"
    yield "a bias", (lambda x, skip, w: _norm(x + skip[0, 0], w), (x, skip, w)), "expected equal ones"
    yield (
        "a number",
        (lambda x, skip, w: _norm(x + 1.0, w) + skip, (x, skip, w)),
        "expected a tensor, got 1.0",
    )

    def gated(x: torch.Tensor, skip: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return _norm(skip + x, w) * F.silu(skip)

    yield "a gated norm", (gated, (x, skip, w)), "expected None"


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield sums that a careless match would compute wrongly."""
    inputs = _inputs(device, torch.float32, torch.float32, torch.float32)
    yield "alpha", (lambda x, s, w: _norm(torch.add(s, x, alpha=3), w) + s, inputs)
    yield "scaled outside", (lambda x, s, w: _norm((s + x) * 3, w) + x, inputs)
    yield "both scaled", (lambda x, s, w: _norm(s * 2 + x * 3, w) + x, inputs)
    yield "scaled per column", (lambda x, s, w: _norm(s + x * w, w) + x, inputs)
    yield "the norm of another sum", (lambda x, s, w: (s + x) * _norm(s + 2 * x, w), inputs)
    yield "twice the same", (lambda x, s, w: _norm(x + x, w) + s, inputs)


ADD_RMS_NORM = Pattern(
    name="add_rms_norm",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    source="transformers LlamaDecoderLayer, GraniteDecoderLayer, Gemma2DecoderLayer",
    part_of=("layer_norm", "lora_linear"),
)
