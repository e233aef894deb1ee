"""Attention, by torch's own call or spelled out with softcap, mask or sinks -> one op.

Source: transformers `sdpa_attention_forward`; `eager_attention_forward` of llama, gemma2 (softcap), gpt_oss (sinks),
with `repeat_kv`; `torch.nn.functional.scaled_dot_product_attention`.
Saved for backward: q, k, v, out and one fp32 number per query and head. Stock repeats k and v to all heads, and
spelled out saves two to five [Sq, Sk] per head.
Masks are added to the scores, or what they hide is filled with a number that leaves no weight. In a row filled
throughout stock is even over all keys and has no gradient by the scores, and so has the op: its queries are cleared.
Numerics: logits and softmax in fp32; the spelled-out form rounds the logits to its dtype.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.graph.arguments import same_size
from fxopt.graph.vocabulary import cast as cast_tensor
from fxopt.kernels.attention import additive_mask, clear_empty_rows, find_server
from fxopt.kernels.attention import attention as fused_attention
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
    fixed,
    largest,
    masked_fill,
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
    where,
)

MOST_FILLER = {torch.float16: -6e4}
MOST_FILLER_OTHERWISE = -1e8
"""What hides a score must be so low that no score comes near it."""
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

    product, scale = matmul(q, transpose(keys)), fixed("scale")
    scores = choice("scaling", times=product * scale, over=product / scale, none=product)
    capped = tanh(either(scores / number("softcap"), scores)) * number("softcap")
    scores = either(capped, scores)
    added = either(scores + mask, scores)
    filler, hidden = fixed("filler"), tensor("hidden")
    filled = either(
        masked_fill(added, hidden, filler),
        where(hidden, filler, added),
        where(tensor("seen"), added, filler),
    )
    early = product + mask
    early = choice("early", times=early * scale, over=early / scale)
    logits = maybe(upcast, either(filled + mask, filled, added, early))
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
    # A mismatch is falsy: `or` would lose it.
    refusals = (judge(m) for judge in (_check_scalars, _check_mask, _check_fill))
    return next((refusal for refusal in refusals if refusal is not None), None)


def _repeats_heads(repeated: torch.Tensor, x: torch.Tensor, heads: int) -> bool:
    expected = (x.shape[0], heads, *x.shape[2:])
    return repeated.dim() == 4 and all(map(same_size, repeated.shape, expected))


def _check_scalars(m: Match) -> Mismatch | None:
    softcap = m["softcap"]
    if softcap is not None and not softcap > 0:
        return m.fail(f"the softcap is {softcap}, expected a positive number")
    if m["scale"] == 0 and "over" in (m["scaling"], m["early"]):
        return m.fail("the scores are divided by 0")
    if m["early"] is not None and not (m["scale"] > 0 and m.example("mask").dtype != torch.float16):
        reason = f"the mask is scaled with the scores by {m['scale']} in {m.example('mask').dtype}"
        return m.fail(
            f"{reason}, expected a positive number and a dtype whose lowest number still hides", "mask"
        )
    return None


def _check_mask(m: Match) -> Mismatch | None:
    if m["mask"] is None:
        return None
    mask = m.example("mask")
    if m["causal"]:
        return m.fail("a mask and is_causal, expected one of the two", "mask")
    if mask.requires_grad:
        return m.fail("the mask requires a gradient (a trained bias), expected a constant one", "mask")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return m.fail(f"the mask is of {mask.dtype}, expected bool or floats", "mask")
    if mask.dtype == torch.bool and m["form"] == "spelled":
        return m.fail("a bool mask is added to the scores, expected floats", "mask")
    return _check_shape(m, "mask")


def _check_shape(m: Match, name: str) -> Mismatch | None:
    mask, q, k = m.example(name), m.example("q"), m.example("k")
    scores = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    fits = mask.dim() <= 4 and all(
        same_size(size, 1) or same_size(size, full)
        for size, full in zip(reversed(mask.shape), reversed(scores), strict=False)
    )
    if not fits:
        shape = list(mask.shape)
        return m.fail(f"the mask has shape {shape}, expected one for scores {list(scores)}", name)
    return None


def _check_fill(m: Match) -> Mismatch | None:
    name = "hidden" if m["hidden"] is not None else "seen"
    if m[name] is None:
        return None
    if m["mask"] is not None:
        reason = "scores are filled where hidden, and a mask or bias (ALiBi) is added to them"
        return m.fail(f"{reason}, expected one of the two", "mask")
    if m.example(name).dtype != torch.bool:
        return m.fail(f"the mask is of {m.example(name).dtype}, expected bool", name)
    most = MOST_FILLER.get(m.output.dtype, MOST_FILLER_OTHERWISE)
    if not m["filler"] <= most:
        reason = f"hidden scores are filled with {m['filler']}, which leaves them a weight"
        return m.fail(f"{reason}, expected at most {most:.0e}", name)
    return _check_shape(m, name)


def replace(m: Match) -> Call:
    """Return one call of the fused op on the heads as they are, in the dtype of the model's products."""
    dtype = m.output.dtype
    q, k, v = (_in_dtype(m, name, dtype) for name in ("q", "k", "v"))
    spelled = m["form"] == "spelled"
    mask, seen = _mask_of(m), _seen_of(m)
    if seen is not None and m["filler"] > -math.inf:
        q = call(clear_empty_rows, q, seen)
    return call(
        fused_attention,
        q,
        k,
        v,
        mask,
        m["sinks"],
        causal=bool(m["causal"]),
        scale=_scale_of(m),
        softcap=float(m["softcap"] or 0.0),
        safe=not spelled,
    )


def _seen_of(m: Match) -> Any:
    """Return which scores are not filled, None where none are."""
    return m["seen"] if m["hidden"] is None else call(torch.logical_not, m["hidden"])


def _mask_of(m: Match) -> Any:
    """Return the mask as the op takes it."""
    seen = _seen_of(m)
    if seen is not None:
        return seen if m["filler"] == -math.inf else call(additive_mask, seen, dtype=m.output.dtype)
    if m["early"] is None:
        return m["mask"]
    return call(torch.mul if m["early"] == "times" else torch.div, m["mask"], m["scale"])


def backend(m: Match) -> Callable[[], str]:
    """Return what tells which backend serves the op: it measures at its first call."""
    q, k, v = (m.example(name).to(m.output.dtype) for name in ("q", "k", "v"))
    mask = next((m.example(name) for name in ("mask", "hidden", "seen") if m[name] is not None), None)
    if mask is not None and m["filler"] is not None and m["filler"] > -math.inf:
        mask = mask.to(m.output.dtype)
    sinks = None if m["sinks"] is None else m.example("sinks")
    return find_server(q, k, v, mask, sinks, causal=bool(m["causal"]), softcap=float(m["softcap"] or 0.0))


def _in_dtype(m: Match, name: str, dtype: torch.dtype) -> Any:
    return m[name] if m.example(name).dtype == dtype else call(cast_tensor, m[name], dtype=dtype)


def _scale_of(m: Match) -> float:
    if m["form"] == "ready":
        return 1.0 / math.sqrt(m.example("q").shape[3]) if m["scale"] is None else float(m["scale"])
    how = m["early"] or m["scaling"]
    return {"times": m["scale"], "over": m["scale"] and 1.0 / m["scale"], "none": 1.0}[how]


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


def _gpt2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores = scores / torch.full([], 16**0.5, dtype=scores.dtype, device=scores.device)
    lowest = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
    scores = torch.where(seen, scores.to(scores.dtype), lowest)
    return torch.matmul(F.dropout(F.softmax(scores, dim=-1).type(v.dtype), p=0.0), v)


def _causally_filled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ones: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    scores = scores.masked_fill(ones[:, :, :7, :7] == 0, float("-inf"))
    return (F.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous()


def _filled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    k, v = _repeat(k, 2), _repeat(v, 2)
    scores = torch.matmul(q * 0.25, k.transpose(2, 3)).masked_fill(~seen, torch.finfo(q.dtype).min)
    return torch.matmul(F.softmax(scores.float(), dim=-1).to(q.dtype), v)


def _filled_by_a_billion(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    scores = torch.tanh(q @ k.transpose(2, 3) / 4 / 5.0) * 5.0
    return torch.where(~seen, -1e9, scores).softmax(-1) @ v


def _codegen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) + mask
    weights = F.softmax(scores / math.sqrt(16), dim=-1).to(v.dtype)
    return torch.matmul(weights, v)


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
        yield f"gpt2 {name}", (_gpt2, _inputs(device, dtype, key_heads=4, mask="bool"))
        yield f"filled by the lowest {name}", (_filled, _inputs(device, dtype, mask="bool"))
        filled = _inputs(device, dtype, key_heads=4, mask="bool")
        yield f"filled by -1e9 {name}", (_filled_by_a_billion, filled)
        ones = torch.ones(1, 1, 9, 9, dtype=dtype, device=device).tril()
        yield f"filled by -inf {name}", (_causally_filled, (*_inputs(device, dtype, key_heads=4), ones))
        yield f"codegen {name}", (_codegen, _inputs(device, dtype, key_heads=4, mask="added"))
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

    def filled(value: float) -> Callable[..., torch.Tensor]:
        def fill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
            return (q @ k.transpose(2, 3)).masked_fill(~seen, value).softmax(-1) @ v

        return fill

    def alibi(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        scores = (q @ k.transpose(2, 3) * 0.25 + bias).masked_fill(~seen, torch.finfo(q.dtype).min)
        return scores.softmax(-1) @ v

    def temperature(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(2, 3) * scale).softmax(-1) @ v

    _, _, _, seen = masked = _inputs(device, torch.float32, key_heads=4, mask="bool")
    learned = torch.full((), 0.25, device=device, requires_grad=True)

    def joined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.reshape(-1, 7, 16) for x in (q, k, v))
        return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)

    def two_masks(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return (torch.where(seen, q @ k.transpose(2, 3), -1e9) + mask).softmax(-1) @ v

    yield (
        "heads joined with the batch",
        (joined, (q, k, v)),
        "q: expected shape [B, HQ, SQ, D], got [8, 7, 16]",
    )
    yield "two masks", (two_masks, (q, k, v, seen, bias.detach())), "expected one of the two"
    yield "filled with a weight", (filled(-100.0), masked), "filled with -100.0, which leaves them a weight"
    yield (
        "a bias beside the filling",
        (alibi, (q, k, v, seen, bias.detach())),
        "and a mask or bias (ALiBi) is added",
    )
    yield "a learned scale", (temperature, (q, k, v, learned)), "scale: expected a number"

    def negative(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(q @ k.transpose(2, 3) / -5.0) * -5.0).softmax(-1) @ v

    yield "a negative softcap", (negative, (q, k, v)), "the softcap is -5.0"
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

    masked = _inputs(device, torch.float32, key_heads=4, mask="bool")

    def filled(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, *, value: float, swap: bool
    ) -> torch.Tensor:
        scores = q @ k.transpose(2, 3)
        scores = torch.where(seen, value, scores) if swap else scores.masked_fill(~seen, value)
        return scores.softmax(-1) @ v

    for value in (0.0, 1e9, -1e4, torch.finfo(torch.float32).min):
        for swap in (False, True):
            name = f"filled with {value:.0e}{', swapped' if swap else ''}"
            yield name, (functools.partial(filled, value=value, swap=swap), masked)
    yield (
        "filled after the softmax",
        (lambda q, k, v, seen: (q @ k.transpose(2, 3)).softmax(-1).masked_fill(~seen, 0.0) @ v, masked),
    )
    yield (
        "filled before the scale",
        (
            lambda q, k, v, seen: ((q @ k.transpose(2, 3)).masked_fill(~seen, -1e9) / 4).softmax(-1) @ v,
            masked,
        ),
    )
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
