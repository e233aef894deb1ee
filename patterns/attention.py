"""Attention, by torch's own call or spelled out with softcap, mask or sinks -> one op.

Source: transformers `sdpa_attention_forward`; `eager_attention_forward` of llama, gemma2 (softcap), gpt_oss (sinks),
with `repeat_kv`; `torch.nn.functional.scaled_dot_product_attention`.
Saved for backward: q, k, v, out and one fp32 number per query and head. Stock repeats k and v to all heads, and
spelled out saves two to five [Sq, Sk] per head.
Numerics: logits and softmax in fp32; the spelled-out form rounds the logits to its dtype.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.graph.arguments import same_size
from fxopt.graph.vocabulary import cast as cast_tensor
from fxopt.kernels.attention import attention as fused_attention
from fxopt.kernels.attention import find_server
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    attention,
    attribute,
    cat,
    choice,
    downcast,
    dropout,
    either,
    expand,
    largest,
    matmul,
    maybe,
    named,
    number,
    operation,
    reshape,
    softmax,
    tanh,
    tensor,
    transpose,
    unsqueeze,
    upcast,
)

BUT_THE_LAST = (..., slice(None, -1, None))


def search() -> Term:
    """Return torch's attention, or its parts: scores, softcap, mask, softmax with or without sinks, values."""
    q, k, v, mask = (
        tensor("q", "B HQ SQ D"),
        tensor("k", "B HK SK D"),
        tensor("v", "B HK SK DV"),
        tensor("mask"),
    )
    keys, values = maybe_repeated("all_k", k), maybe_repeated("all_v", v)
    asked = dict(dropout_p=attribute("dropout_p"), is_causal=attribute("causal"), scale=attribute("scale"))
    ready = either(attention(q, keys, values, mask, **asked), attention(q, keys, values, **asked))

    product = matmul(q, transpose(keys))
    scores = choice("scaling", times=product * number("scale"), over=product / number("scale"), none=product)
    capped = tanh(either(scores / number("softcap"), scores)) * number("softcap")
    scores = either(capped, scores)
    logits = maybe(upcast, either(scores + mask, scores))
    column = expand(reshape(tensor("sinks", "HQ")))
    joined = cat(logits, maybe(upcast, column))
    joined = maybe(lambda x: x - largest(x), joined)
    without = operation(operator.getitem, softmax(maybe(upcast, joined)), index=BUT_THE_LAST)
    weights = choice("softmax", sinks=without, plain=softmax(logits))
    weights = maybe(downcast, maybe(lambda x: dropout(x, attribute("dropout_p")), maybe(downcast, weights)))
    return choice("form", ready=ready, spelled=matmul(weights, values))


def maybe_repeated(name: str, x: Term) -> Term:
    """Return `x`, or `x` with each head repeated for the query heads that read it, whose node binds `name`."""
    return either(named(name, reshape(expand(unsqueeze(x, -3)))), x)


def check(m: Match) -> Mismatch | None:
    """Refuse dropout, masks with a gradient or of other shapes, heads that do not divide, other repeats."""
    q, k = m.example("q"), m.example("k")
    if m["dropout_p"]:
        return m.fail(f"attention weights are dropped with p = {m['dropout_p']}, expected no dropout")
    heads, key_heads = q.shape[1], k.shape[1]
    if not (isinstance(heads, int) and isinstance(key_heads, int) and isinstance(q.shape[3], int)):
        return m.fail("the number of heads or their width is symbolic, expected numbers", "q", "k")
    if heads % key_heads:
        return m.fail(f"{key_heads} key heads do not divide {heads} query heads", "k", "q")
    for name, source in (("all_k", "k"), ("all_v", "v")):
        if m[name] is not None and not _repeats_heads(m.example(name), m.example(source), heads):
            shape = list(m.example(name).shape)
            return m.fail(
                f"{source} is repeated to {shape}, expected {heads} heads, each beside itself", name
            )
    if m["form"] == "ready" and not (m["causal"] is True or m["causal"] is False):
        return m.fail("is_causal is no constant", "q")
    if not q.is_floating_point():
        return m.fail(f"expected floats, got {q.dtype}", "q")
    return _check_softcap(m) or _check_mask(m)


def _repeats_heads(repeated: torch.Tensor, x: torch.Tensor, heads: int) -> bool:
    expected = (x.shape[0], heads, *x.shape[2:])
    return repeated.dim() == 4 and all(map(same_size, repeated.shape, expected))


def _check_softcap(m: Match) -> Mismatch | None:
    softcap = m["softcap"]
    if softcap is not None and not softcap > 0:
        return m.fail(f"the softcap is {softcap}, expected a positive number")
    if m["scale"] == 0 and m["scaling"] == "over":
        return m.fail("the scores are divided by 0")
    return None


def _check_mask(m: Match) -> Mismatch | None:
    if m["mask"] is None:
        return None
    mask, q, k = m.example("mask"), m.example("q"), m.example("k")
    if m["causal"]:
        return m.fail("a mask and is_causal, expected one of the two", "mask")
    if mask.requires_grad:
        return m.fail("the mask requires a gradient (a trained bias), expected a constant one", "mask")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return m.fail(f"the mask is of {mask.dtype}, expected bool or floats", "mask")
    if mask.dtype == torch.bool and m["form"] == "spelled":
        return m.fail("a bool mask is added to the scores, expected floats", "mask")
    scores = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    fits = mask.dim() <= 4 and all(
        same_size(size, 1) or same_size(size, full)
        for size, full in zip(reversed(mask.shape), reversed(scores), strict=False)
    )
    if not fits:
        return m.fail(
            f"the mask has shape {list(mask.shape)}, expected one for scores {list(scores)}", "mask"
        )
    return None


def replace(m: Match) -> Call:
    """Return one call of the fused op on the heads as they are, in the dtype of the model's products."""
    dtype = m.output.dtype
    q, k, v = (_in_dtype(m, name, dtype) for name in ("q", "k", "v"))
    spelled = m["form"] == "spelled"
    return call(
        fused_attention,
        q,
        k,
        v,
        m["mask"],
        m["sinks"],
        causal=bool(m["causal"]),
        scale=_scale_of(m),
        softcap=float(m["softcap"] or 0.0),
        safe=not spelled,
    )


def backend(m: Match) -> Callable[[], str]:
    """Return what tells which backend serves the op: it measures at its first call."""
    heads = (m.example(name).to(m.output.dtype) for name in ("q", "k", "v"))
    others = (m[name] and m.example(name) for name in ("mask", "sinks"))
    return find_server(*heads, *others, causal=bool(m["causal"]), softcap=float(m["softcap"] or 0.0))


def _in_dtype(m: Match, name: str, dtype: torch.dtype) -> Any:
    return m[name] if m.example(name).dtype == dtype else call(cast_tensor, m[name], dtype=dtype)


def _scale_of(m: Match) -> float:
    if m["form"] == "ready":
        return 1.0 / math.sqrt(m.example("q").shape[3]) if m["scale"] is None else float(m["scale"])
    return {"times": m["scale"], "over": m["scale"] and 1.0 / m["scale"], "none": 1.0}[m["scaling"]]


def _repeat(x: torch.Tensor, times: int) -> torch.Tensor:
    batch, heads, length, width = x.shape
    repeated = x[:, :, None, :, :].expand(batch, heads, times, length, width)
    return repeated.reshape(batch, heads * times, length, width)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=0.3, enable_gqa=True)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    k, v = _repeat(k, 2), _repeat(v, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)


def _llama(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    k, v = _repeat(k, 2), _repeat(v, 2)
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25 + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.0, training=True)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def _unmasked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = ((q @ k.transpose(-1, -2)) / math.sqrt(16)).softmax(-1)
    return weights @ v


def _gemma2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    k, v = _repeat(k, 2), _repeat(v, 2)
    scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * 0.25 / 5.0) * 5.0 + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def _gpt_oss(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor
) -> torch.Tensor:
    k, v = _repeat(k, 2), _repeat(v, 2)
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25 + mask
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    logits = torch.cat([scores, column], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    weights = F.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1]
    weights = F.dropout(weights, p=0.0, training=True).to(v.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def _inputs(
    device: torch.device, dtype: torch.dtype, *, key_heads: int = 2, mask: str = "", sinks: bool = False
) -> tuple[torch.Tensor, ...]:
    """Return q, k and v as models have them, views of [B, S, H, D]; the mask is padded on the left."""
    batch, length, width = 2, 7, 16
    tensors = [
        torch.randn(batch, length, heads, width, dtype=dtype, device=device).requires_grad_().transpose(1, 2)
        for heads in (4, key_heads, key_heads)
    ]
    if mask:
        seen = (
            torch.ones(length, length, dtype=torch.bool, device=device)
            .tril()
            .expand(batch, 1, -1, -1)
            .clone()
        )
        seen[0, :, :, :3] = False
        lowest = -torch.inf if mask == "infinite" else torch.finfo(dtype).min
        added = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, lowest)
        tensors.append(seen if mask == "bool" else added)
    if sinks:
        tensors.append(torch.randn(4, dtype=dtype, device=device).requires_grad_())
    return tuple(tensors)


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield torch's call and the spelled-out forms above, with grouped heads and masks."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        yield f"sdpa causal {name}", (_causal, _inputs(device, dtype, key_heads=4))
        yield f"sdpa grouped {name}", (_grouped, _inputs(device, dtype))
        yield f"sdpa bool mask {name}", (_masked, _inputs(device, dtype, mask="bool"))
        yield f"sdpa added mask {name}", (_masked, _inputs(device, dtype, mask="infinite"))
        yield f"llama {name}", (_llama, _inputs(device, dtype, mask="added"))
        yield f"unmasked {name}", (_unmasked, _inputs(device, dtype, key_heads=4))
        yield f"gemma2 {name}", (_gemma2, _inputs(device, dtype, mask="added"))
        yield f"gpt_oss {name}", (_gpt_oss, _inputs(device, dtype, mask="added", sinks=True))


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield code that must be left alone, and a part of the reason."""
    q, k, v = _inputs(device, torch.float32, key_heads=4)
    bias = torch.randn(1, 4, 7, 7, device=device, requires_grad=True)

    def dropped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)

    def dropped_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = F.dropout((q @ k.transpose(2, 3) * 0.25).softmax(-1), p=0.1, training=True)
        return weights @ v

    def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def escaping(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (q @ k.transpose(2, 3) * 0.25).softmax(-1)
        return weights @ v, weights

    def over_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(2, 3) * 0.25).softmax(-2) @ v

    yield "dropout", (dropped, (q, k, v)), "dropped with p = 0.1"
    yield "dropout of the weights", (dropped_weights, (q, k, v)), "dropped with p = 0.1"
    yield "a trained bias", (biased, (q, k, v, bias)), "requires a gradient"
    yield "the weights are returned", (escaping, (q, k, v)), "is also read by the graph's output"
    yield "softmax over queries", (over_queries, (q, k, v)), "expected -1, got -2"


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield broken attention: it must be left alone, or be computed as it stands."""
    triple = _inputs(device, torch.float32, key_heads=4)
    pair = _inputs(device, torch.float32)
    q, k, v, mask, sinks = _inputs(device, torch.float32, mask="added", sinks=True)

    def tiled(x: torch.Tensor) -> torch.Tensor:
        return x[:, None].expand(2, 2, 2, 7, 16).reshape(2, 4, 7, 16)

    def longer(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, None].expand(2, 4, 2, 7, 16).reshape(2, 4, 14, 16)

    def sink_first(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor
    ) -> torch.Tensor:
        column = sinks.reshape(1, -1, 1, 1).expand(2, -1, 7, -1)
        weights = torch.cat([column, q @ _repeat(k, 2).transpose(2, 3) + mask], dim=-1).softmax(-1)
        return weights[..., :-1] @ _repeat(v, 2)

    yield "heads tiled", (lambda q, k, v: _causal(q, tiled(k), tiled(v)), pair)
    yield "keys repeated along the length", (lambda q, k, v: _causal(q, longer(k), longer(v)), triple)
    yield (
        "another softcap",
        (lambda q, k, v: (torch.tanh(q @ k.transpose(2, 3) / 5.0) * 4.0).softmax(-1) @ v, triple),
    )
    yield "keys not transposed", (lambda q, k, v: (q @ k.transpose(2, 3)).softmax(-1) @ k, triple)
    yield "no softmax", (lambda q, k, v: (q @ k.transpose(2, 3)).sigmoid() @ v, triple)
    yield "the sink comes first", (sink_first, (q, k, v, mask, sinks))
    yield (
        "masked after the softmax",
        (lambda q, k, v: ((q @ k.transpose(2, 3)).softmax(-1)).tril() @ v, triple),
    )


ATTENTION = Pattern(
    name="attention",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    backend=backend,
    source="transformers sdpa_attention_forward, eager_attention_forward of llama, gemma2 and gpt_oss",
)
