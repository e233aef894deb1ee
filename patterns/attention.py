"""Attention, by torch's own call or spelled out with softcap, mask or sinks -> one op.

Source: transformers `sdpa_attention_forward`; `eager_attention_forward` of llama, gemma2 (softcap), gpt_oss (sinks),
granite_swa (sinks as a share of the result: what softmax sums to over that and the sink), with `repeat_kv`;
`torch.nn.functional.scaled_dot_product_attention`.
Saved for backward: q, k, v, out and one fp32 number per query and head. Stock repeats k and v to all heads, and
spelled out saves two to five [Sq, Sk] per head.
Masks are added to the scores, or what they hide is filled with a number that leaves no weight. In a row filled
throughout stock is even over all keys and has no gradient by the scores, and so has the op: its queries are cleared.
Numerics: logits and softmax in fp32; the spelled-out form rounds the logits to its dtype.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from fxopt.graph.arguments import same_size
from fxopt.graph.vocabulary import cast as cast_tensor
from fxopt.kernels.attention import additive_mask, clear_empty_rows, find_server
from fxopt.kernels.attention import attention as fused_attention
from fxopt.patterns.attention_cases import examples, mutations, near_misses
from fxopt.rewriting.pattern import Call, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    attention,
    attribute,
    cast,
    cat,
    choice,
    downcast,
    dropout,
    either,
    expand,
    fixed,
    largest,
    logsumexp,
    masked_fill,
    matmul,
    maybe,
    named,
    number,
    operation,
    reshape,
    sigmoid,
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
    rounded = either(filled + mask, filled, added, early)
    logits = maybe(upcast, rounded)
    column = expand(reshape(tensor("sinks", "HQ")))
    joined = cat(logits, maybe(upcast, column))
    joined = maybe(lambda x: x - largest(x), joined)
    without = operation(operator.getitem, softmax(maybe(upcast, joined)), index=BUT_THE_LAST)
    weights = choice("softmax", sinks=without, plain=softmax(logits))
    weights = maybe(downcast, maybe(lambda x: dropout(x, attribute("dropout_p")), maybe(downcast, weights)))
    attended = matmul(weights, values)
    rows = named("sink_rows", reshape(tensor("sinks", "HQ")))
    share = unsqueeze(maybe(cast, sigmoid(maybe(cast, logsumexp(rounded) - rows))), -1)
    spelled = choice("sinks_as", share=attended * maybe(cast, share), logits=attended)
    return choice("form", ready=ready, spelled=spelled)


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
    if m["sinks_as"] == "share" and (
        m["softmax"] == "sinks" or [*m.example("sink_rows").shape][-2:] != [heads, 1]
    ):
        return m.fail("the result is scaled beside other sinks, or not by one number per head", "sinks")
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


ATTENTION = Pattern(
    name="attention",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    backend=backend,
    source="transformers sdpa_attention_forward, eager_attention_forward of llama, gemma2, gpt_oss and granite_swa",
)
