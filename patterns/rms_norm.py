"""RMS norms of the last dimension, in every spelling that Hugging Face models use -> one op.

Source: transformers `LlamaRMSNorm`, `GemmaRMSNorm`, `T5LayerNorm`, `Olmo2RMSNorm`, `CohereLayerNorm`,
`Gemma3nRMSNorm`, `MambaRMSNormGated`, `Qwen3NextRMSNormGated`, `torch.nn.functional.rms_norm`.
Saved for backward: x, weight, gate (live anyway), one or two fp32 numbers per row. Stock saves three [*, H].
Numerics: statistics in fp32; rounded where the model rounds, or less often.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.graph.arguments import same_shape
from fxopt.kernels.rms_norm import rms_norm as fused_rms_norm
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    attribute,
    cast,
    choice,
    downcast,
    either,
    maybe,
    mean,
    named,
    number,
    operation,
    reciprocal,
    reshape,
    rms_norm,
    rsqrt,
    sigmoid,
    silu,
    sqrt,
    tensor,
    total,
    upcast,
    variance,
)


def search() -> Term:
    """Return x / sqrt(mean(x^2) + eps) * weight, with all that models put around it."""
    x, w, gate = tensor("x", "* H"), tensor("w", "H"), tensor("gate", "* H")

    xf = maybe(upcast, x)
    xf = maybe(lambda v: v * activation(gate), xf, "gate_before")

    weight = maybe(cast, w)
    scale = choice("offset", one=weight + 1, none=weight)
    in_groups = normalized(named("group", reshape(xf)))
    in_groups = either(in_groups * reshape(weight), in_groups)
    n = choice("layout", grouped=reshape(in_groups), plain=normalized(xf))
    n = named("n", maybe(downcast, n, "rounded"))

    y = either(n * scale, n, rms_norm(xf, w, eps=attribute("eps")))
    y = maybe(lambda v: maybe(upcast, v) * activation(gate), y, "gate_after")
    return maybe(downcast, y)


def normalized(v: Term) -> Term:
    """Return `v` over the root of the mean of its squares; `v` less its mean where that is subtracted."""
    eps = number("eps")
    d = v - mean(v)
    return choice(
        "centre",
        yes=over_root(d, either(mean(square(d)), variance(v)) + eps),
        no=over_root(v, mean_square(v) + eps),
        # torch's own norm without a weight
        fused=rms_norm(v, None, eps=attribute("eps")),
    )


def over_root(v: Term, s: Term) -> Term:
    """Return `v / sqrt(s)`; the root may be rounded first."""
    root = maybe(downcast, sqrt(s))
    inverse = maybe(downcast, either(rsqrt(s), s**-0.5, reciprocal(root)))
    return either(v * inverse, v / root)


def mean_square(v: Term) -> Term:
    """Return the mean of the squares of `v`: a sum of them, or their root squared again, over their number."""
    root = operation(torch.linalg.vector_norm, v, dim=(-1,), keepdim=True)
    sums = either(total(square(v)), square(root))
    return either(mean(square(v)), sums / number("size"), sums * number("share"))


def square(v: Term) -> Term:
    """Return the square of `v`."""
    return either(v**2, v * v)


def activation(gate: Term) -> Term:
    """Return what a gate is passed through."""
    g = maybe(upcast, gate)
    return choice("gate_act", silu=either(silu(g), g * sigmoid(g)), sigmoid=sigmoid(g))


def check(m: Match) -> Mismatch | None:
    """Refuse what the op does not compute: other shapes, two gates, groups that do not split a row."""
    x = m.example("x")
    if not isinstance(x.shape[-1], int):
        return m.fail("the normalized size is symbolic, expected a number", "x")
    if m["gate_before"] and m["gate_after"]:
        return m.fail("gated before and after, expected one gate", "gate")
    if m["gate"] is not None and not same_shape(m.example("gate"), x):
        return m.fail(
            f"gate has shape {list(m.example('gate').shape)}, expected that of x {list(x.shape)}", "gate"
        )
    if m["group"] is not None:
        group = m.example("group")
        if group.dim() != x.dim() + 1 or group.shape[-2] * group.shape[-1] != x.shape[-1]:
            return m.fail(f"x is viewed as {list(group.shape)}, expected [..., groups, size]", "group")
    size = x.shape[-1] if m["group"] is None else m.example("group").shape[-1]
    if m["share"] == 0:
        return m.fail("the sum of squares is multiplied by 0, expected one over their number", "x")
    divisor = m["size"] if m["share"] is None else 1 / m["share"]
    if divisor is not None and not math.isclose(divisor, size, rel_tol=1e-6):
        return m.fail(f"the sum of {size} squares is divided by {divisor:g}, expected their number", "x")
    if not same_shape(m.output, x):
        return m.fail(f"the result has shape {list(m.output.shape)}, expected that of x {list(x.shape)}", "x")
    for node in m.nodes:
        shape: Any = node.args[1] if node.target is F.rms_norm else ()
        if len(shape) > 1:
            return m.fail("normalized over several dims, expected the last one", "x")
    return None


def replace(m: Match) -> Call:
    """Return one call of the fused op, its attributes as the model's arithmetic has them."""
    return call(
        fused_rms_norm,
        m["x"],
        m["w"],
        m["gate"],
        eps=float(_default_eps(m) if m["eps"] is None else m["eps"]),
        offset=1.0 if m["offset"] == "one" else 0.0,
        # A rounding to any other dtype than that of x is left out.
        cast_first=bool(m["rounded"]) and m.example("n").dtype == m.example("x").dtype,
        centre=m["centre"] == "yes",
        gate_act=m["gate_act"] or "silu",
        gate_before=bool(m["gate_before"]),
        groups=1 if m["group"] is None else int(m.example("group").shape[-2]),
        out_dtype=m.output.dtype,
    )


def _default_eps(m: Match) -> float:
    (norm,) = (node for node in m.nodes if node.target is F.rms_norm)
    x: Any = norm.args[0]
    return torch.finfo(x.meta["example_value"].dtype).eps


def _llama(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    xf = x.to(torch.float32)
    return w * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _gemma(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    xf = x.float()
    return ((xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6)) * (1.0 + w.float())).type_as(x)


def _olmo2(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    xf = x.to(torch.float32)
    return (w * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)


def _t5(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    n = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * n.to(w.dtype) if w.dtype in (torch.float16, torch.bfloat16) else w * n


def _gemma3n(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    xf = x.float()
    return (xf * torch.pow(xf.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5) * w.float()).type_as(x)


def _over_sqrt(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    xf = x.float()
    return (xf / torch.sqrt((xf * xf).mean(dim=-1, keepdim=True) + 1e-5) * w).to(x.dtype)


def _times_reciprocal(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    xf = x.float()
    return w * (xf * (1 / torch.sqrt(xf.square().mean((-1,), True) + 1e-5))).to(x.dtype)


def _by_its_root(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    squares = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).pow(2).div(x.shape[-1])
    return torch.mul(x.float(), (squares + 1e-6).pow(-0.5)).to(x).mul(w)


def _by_a_sum(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    squares = x.float().square().sum(-1, keepdim=True) * (1 / x.shape[-1])
    return (x / torch.sqrt(squares + 1e-6)).to(x) * w


def _weightless(x: torch.Tensor) -> torch.Tensor:
    xf = x.float()
    return (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _torch_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), w, 1e-6)


def _torch_norm_plain(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def _cohere(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    xf = x.to(torch.float32)
    mean = xf.mean(-1, keepdim=True)
    spread = (xf - mean).pow(2).mean(-1, keepdim=True)
    return (w.to(torch.float32) * ((xf - mean) * torch.rsqrt(spread + 1e-5))).to(x.dtype)


def _by_variance(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    xf = x.float()
    spread = xf.var(-1, unbiased=False, keepdim=True)
    return ((xf - xf.mean(-1, keepdim=True)) * torch.rsqrt(spread + 1e-5) * w).to(x.dtype)


def _gated_after(x: torch.Tensor, w: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    xf = x.to(torch.float32)
    n = w * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return (n * F.silu(gate.to(torch.float32))).to(x.dtype)


def _gated_by_sigmoid(x: torch.Tensor, w: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    xf = x.float()
    n = w.float() * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6))
    return (n * torch.sigmoid(gate.float())).to(x.dtype)


def _mamba2(x: torch.Tensor, w: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    xf = x.to(torch.float32) * F.silu(gate.to(torch.float32))
    *leading, last = xf.shape
    groups = xf.view(*leading, 3, last // 3)
    groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * groups.view(*leading, last).to(x.dtype)


def _falcon_h1(x: torch.Tensor, w: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    xf = (x * F.silu(gate.to(torch.float32))).to(torch.float32)
    groups = xf.view(*x.shape[:-1], 3, x.shape[-1] // 3)
    groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (w.view(3, x.shape[-1] // 3) * groups).view(x.shape).to(x.dtype)


def _inputs(device: torch.device, dtype: torch.dtype, *shape: int, gate: bool = False) -> tuple[Any, ...]:
    x = torch.randn(*shape, dtype=dtype, device=device)
    w = (1 + torch.randn(shape[-1], device=device) / 4).to(dtype)
    tensors = (x, w, torch.randn_like(x)) if gate else (x, w)
    return tuple(tensor.requires_grad_() for tensor in tensors)


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield the spellings above in bf16 and fp32, at odd sizes, and on a transposed input."""
    bf16, fp32 = torch.bfloat16, torch.float32
    plain = (_llama, _gemma, _olmo2, _t5, _gemma3n, _over_sqrt, _times_reciprocal, _torch_norm, _cohere)
    plain = (*plain, _by_its_root)
    for function in (*plain, _by_variance):
        yield f"{function.__name__.strip('_')} bf16", (function, _inputs(device, bf16, 2, 5, 63))
    for function in (_llama, _gemma, _cohere, _torch_norm, _by_a_sum):
        yield f"{function.__name__.strip('_')} fp32", (function, _inputs(device, fp32, 2, 5, 63))
    for function in (_gated_after, _gated_by_sigmoid, _mamba2, _falcon_h1):
        yield f"{function.__name__.strip('_')} bf16", (function, _inputs(device, bf16, 2, 5, 63, gate=True))
    yield "mamba2 fp32", (_mamba2, _inputs(device, fp32, 2, 5, 63, gate=True))
    for function in (_weightless, _torch_norm_plain):
        yield f"{function.__name__.strip('_')} bf16", (function, _inputs(device, bf16, 2, 5, 63)[:1])
    x, w = _inputs(device, bf16, 63, 6)
    yield "llama transposed", (lambda x, w: _llama(x.t(), w), (x, w.new_ones(63).requires_grad_()))
    x, w = _inputs(device, torch.float16, 2, 5, 63)
    yield "t5 fp16 with fp32 weight", (_t5, (x, w.detach().float().requires_grad_()))
    yield "llama per head", (_llama, _inputs(device, bf16, 2, 5, 4, 16))


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield code that must be left alone, and a part of the reason."""
    x, w = _inputs(device, torch.float32, 4, 6)

    def outside(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return w * (x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-6))

    def summed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6))

    def other_dim(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return w * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6))

    def escaping(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * (x * root), root

    def other_tensor(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return w * (x.tanh() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def in_place(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x * 2
        root = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        y[0] = 1.0
        return w * (y * root)

    yield "eps outside the root", (outside, (x, w)), "under rsqrt: expected add, got mean"
    yield "sum instead of mean", (summed, (x, w)), "expected div or mul above sum, got add"
    yield "mean over the wrong dim", (other_dim, (x, w)), "dim of mean: expected (-1,), got (-2,)"
    yield "the root is read elsewhere", (escaping, (x, w)), "rsqrt is also returned"
    yield (
        "another tensor is divided",
        (other_tensor, (x, w)),
        "x: expected tanh as elsewhere, got placeholder l_x_",
    )
    yield (
        "written to in between",
        (in_place, (x.detach(), w)),
        "y is written to in place between the nodes of the match",
    )


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield broken norms: they must be left alone, or be computed as they stand."""
    x, w = _inputs(device, torch.float32, 6, 6)
    yield "cube", (lambda x, w: w * x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 9.0), (x, w))
    yield "no root", (lambda x, w: w * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6), (x, w))
    yield "no keepdim", (lambda x, w: w * x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6), (x, w))
    yield "two minus", (lambda x, w: (2 - w) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))), (x, w))
    yield (
        "variance of a part",
        (lambda x, w: w * x * torch.rsqrt(x[:, :3].pow(2).mean(-1, keepdim=True)), (x, w)),
    )
    yield "not centred above", (lambda x, w: w * (x * torch.rsqrt(x.var(-1, False, True) + 1e-6)), (x, w))
    yield "weight per row", (lambda x, w: w[:, None] * _llama(x, torch.ones_like(w)), (x, w))


RMS_NORM = Pattern(
    name="rms_norm",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    source="transformers LlamaRMSNorm, GemmaRMSNorm, T5LayerNorm, CohereLayerNorm, MambaRMSNormGated",
    part_of=("layer_norm",),
)
