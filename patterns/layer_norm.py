"""Layer norms of the last dimension, torch's own or written out -> one op.

Source: `torch.nn.LayerNorm` and `torch.nn.functional.layer_norm`, as transformers `GPTNeoXLayer`,
`StableLmDecoderLayer` and `Starcoder2DecoderLayer` use them. Written out without a bias it is the centred form
of `patterns/rms_norm.py`.
Saved for backward: x, weight (live anyway), two fp32 numbers per row. Under autocast stock saves x in fp32.
Numerics: all in fp32, rounded once to the dtype that the model's result has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.graph.arguments import same_shape
from fxopt.kernels.layer_norm import layer_norm as fused_layer_norm
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    attribute,
    cast,
    downcast,
    either,
    layer_norm,
    maybe,
    mean,
    number,
    reciprocal,
    rsqrt,
    sqrt,
    tensor,
    upcast,
    variance,
)


def search() -> Term:
    """Return torch's layer norm, or `(x - mean(x)) / sqrt(variance + eps) * weight + bias`."""
    x, w, b = tensor("x", "* H"), tensor("w", "H"), tensor("b", "H")
    by_name = layer_norm(x, attribute("w"), attribute("b"), eps=attribute("eps"))

    xf = maybe(upcast, x)
    d = xf - mean(xf)
    s = either(mean(either(d**2, d * d)), variance(xf)) + number("eps")
    root = maybe(downcast, sqrt(s))
    inverse = maybe(downcast, either(rsqrt(s), s**-0.5, reciprocal(root)))
    n = maybe(cast, either(d * inverse, d / root))
    scaled = maybe(downcast, either(n * maybe(cast, w), n))
    return maybe(cast, either(by_name, scaled + maybe(cast, b)))


def check(m: Match) -> Mismatch | None:
    """Refuse norms over several dims, and what the op could not return."""
    x = m.example("x")
    if not isinstance(x.shape[-1], int):
        return m.fail("the normalized size is symbolic, expected a number", "x")
    for node in m.nodes:
        shape: Any = node.args[1] if node.target is F.layer_norm else ()
        if len(shape) > 1:
            return m.fail("normalized over several dims, expected the last one", "x")
    if not same_shape(m.output, x):
        return m.fail(f"the result has shape {list(m.output.shape)}, expected that of x {list(x.shape)}", "x")
    if not m.output.is_floating_point():
        return m.fail(f"the result is {m.output.dtype}, expected floating-point numbers", "x")
    return None


def replace(m: Match) -> Call:
    """Return one call of the fused op, in the dtype that the model's result has."""
    return call(fused_layer_norm, m["x"], m["w"], m["b"], eps=float(m["eps"]), out_dtype=m.output.dtype)


def _by_name(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],), w, b, 1e-5)


def _in_float32(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.float(), (x.shape[-1],), w.float(), b.float(), 1e-5).type_as(x)


def _written_out(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    xf = x.float()
    d = xf - xf.mean(-1, keepdim=True)
    return w * (d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) + b


def _over_root(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    xf = x.float()
    centred = xf - xf.mean(-1, keepdim=True)
    spread = (centred * centred).mean(-1, keepdim=True)
    return (centred / torch.sqrt(spread + 1e-12) * w.float() + b.float()).to(x.dtype)


def _by_variance(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    xf = x.float()
    root = torch.sqrt(xf.var(-1, unbiased=False, keepdim=True) + 1e-5)
    return (b + w * ((xf - xf.mean(-1, keepdim=True)) * (1 / root))).to(x.dtype)


def _plain(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],))


def _inputs(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x = torch.randn(2, 5, 63, device=device).to(dtype)
    w = (1 + torch.randn(63, device=device) / 4).to(dtype)
    return tuple(tensor.requires_grad_() for tensor in (x, w, torch.randn(63, device=device).to(dtype)))


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield the spellings above in bf16 and fp32, with and without weight and bias, and under autocast."""
    for dtype in (torch.bfloat16, torch.float32):
        for function in (_by_name, _in_float32, _written_out, _over_root, _by_variance):
            name = f"{function.__name__.strip('_')} {str(dtype).removeprefix('torch.')}"
            yield name, (function, _inputs(device, dtype))
    x, w, b = _inputs(device, torch.bfloat16)
    yield "plain", (_plain, (x,))
    yield "without bias", (lambda x, w: F.layer_norm(x, (63,), w), (x, w))
    yield "without weight", (lambda x, b: F.layer_norm(x, (63,), None, b), (x, b))
    yield "a module", (lambda x, w, b: F.layer_norm(x, [63], weight=w, bias=b, eps=1e-6), (x, w, b))
    yield "a frozen weight", (_by_name, (x, w.detach(), b))
    yield "transposed", (lambda x, w, b: _by_name(x.transpose(0, 1), w, b), (x, w, b))

    def under_autocast(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return F.layer_norm(x, (63,), w, b, 1e-5)

    yield "under autocast", (under_autocast, (x, *_inputs(device, torch.float32)[1:]))


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield code that must be left alone, and a part of the reason."""
    x, w, b = _inputs(device, torch.float32)

    def uncentred(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)) + b

    def unbiased(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        spread = x.var(-1, unbiased=True, keepdim=True)
        return w * ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(spread + 1e-5)) + b

    def outside(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        d = x - x.mean(-1, keepdim=True)
        return w * (d / (torch.sqrt(d.pow(2).mean(-1, keepdim=True)) + 1e-5)) + b

    def read_elsewhere(
        x: torch.Tensor, w: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        d = x - x.mean(-1, keepdim=True)
        return w * (d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5)) + b, d

    yield "not centred", (uncentred, (x, w, b)), "expected sub"
    yield "an unbiased variance", (unbiased, (x, w, b)), "expected 0, got 1"
    yield "eps outside the root", (outside, (x, w, b)), "under sqrt: expected add, got mean"
    yield "the centred value is read elsewhere", (read_elsewhere, (x, w, b)), "is also returned"
    yield "two dims", (lambda x: F.layer_norm(x, (5, 63)), (x,)), "several dims"


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield broken norms: they must be left alone, or be computed as they stand."""
    inputs = _inputs(device, torch.float32)
    yield "bias before weight", (lambda x, w, b: w * (_plain(x) + b), inputs)
    yield "another mean", (lambda x, w, b: _written_out(x, w, b) - x.mean(-2, keepdim=True), inputs)
    yield "twice", (lambda x, w, b: _by_name(_by_name(x, w, b), b, w), inputs)
    yield "eps of one", (lambda x, w, b: F.layer_norm(x, (63,), w, b, 1.0), inputs)

    def mixed(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        d = x - x.tanh().mean(-1, keepdim=True)
        return w * (d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5)) + b

    yield "less the mean of another value", (mixed, inputs)


LAYER_NORM = Pattern(
    name="layer_norm",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    source="torch.nn.functional.layer_norm; transformers GPTNeoXLayer, StableLmDecoderLayer, Starcoder2DecoderLayer",
)
