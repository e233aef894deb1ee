"""RMS norms of queries and keys and the rotary embedding that reads them -> one op for both tensors.

The norms and the rotation are the ops that `patterns/rms_norm.py` and `patterns/rope.py` made of their spellings: this
pattern works on what those leave.
Source: transformers `Qwen3Attention` (heads normed, then moved), `Gemma3Attention` (moved, then normed),
`Olmo2Attention` (all heads normed as one row).
Saved for backward: q and k before their norms, the weights, cos and sin; one fp32 number per norm less than apart.
Numerics: rounded in forward where the two ops round; their gradients are not rounded between them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from fxopt.graph import vocabulary
from fxopt.graph.arguments import same_shape
from fxopt.kernels.launch import wide_dtype
from fxopt.kernels.norm_rope import fits
from fxopt.kernels.norm_rope import norm_rope as fused_norm_rope
from fxopt.kernels.rms_norm import rms_norm as fused_rms_norm
from fxopt.kernels.rope import rope as fused_rope
from fxopt.patterns.norm_rope_cases import examples, mutations, near_misses
from fxopt.rewriting.pattern import Call, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    also,
    attribute,
    choice,
    either,
    named,
    operation,
    reshape,
    tensor,
    transpose,
)

ROTATION = ("pairing", "out_pairing", "start", "length", "sign", "heads", "out_dtype")


def search() -> tuple[Term, Term]:
    """Return q and k as a rotation returns them, both normed alike before it; k where the rotation has one."""
    both = operation(
        fused_rope,
        normed("q"),
        either(normed("k"), attribute("other")),
        tensor("cos"),
        tensor("sin"),
        **{name: attribute(name) for name in ROTATION},
    )
    return both[0], also(both[1])


def normed(name: str) -> Term:
    """Return `name` after an ungated norm, cut into heads and moved to where the rotation reads them."""
    norm = operation(
        fused_rms_norm,
        tensor(name),
        attribute(f"{name}_weight"),
        None,
        eps=attribute("eps"),
        offset=attribute("offset"),
        cast_first=attribute("cast_first"),
        centre=False,
        gate_act=...,
        gate_before=...,
        groups=1,
        out_dtype=attribute("norm_dtype"),
    )
    rows = choice(f"{name}_rows", cut=reshape(norm, shape=attribute(f"{name}_shape")), whole=norm)
    heads = named(f"{name}_heads", rows)
    return choice(f"{name}_order", moved=transpose(heads, -3, -2), kept=heads)


def check(m: Match) -> Mismatch | None:
    """Refuse a k without a norm, norms of other rows than heads or all heads, and dtypes that the op has not."""
    if m["k"] is None and m["other"] is not None:
        return m.fail("k is turned without a norm before it, expected both or neither normed", "other")
    names = ("q",) if m["k"] is None else ("q", "k")
    q, norm_dtype = m.example("q"), m["norm_dtype"]
    if norm_dtype not in (q.dtype, wide_dtype(q.dtype)):
        return m.fail(f"the norm of {q.dtype} is rounded to {norm_dtype}, expected that or float32", "q")
    forms = {_is_per_head(m, name) for name in names}
    if None in forms:
        return m.fail("the norm is neither over one head nor over all heads of a token", *names)
    if len(forms) > 1:
        return m.fail("q is normed over other rows than k, expected alike", "q", "k")
    for name in names:
        if m.example(name).dtype != q.dtype:
            return m.fail(f"{name} is {m.example(name).dtype}, expected that of q {q.dtype}", name)
        heads = m.example(f"{name}_heads")
        if False in forms and not fits(heads.shape[-2], heads.shape[-1]):
            return m.fail(
                f"a norm over {heads.shape[-2]} heads of {heads.shape[-1]} is more than a program holds", name
            )
    if m["k"] is not None and not _is_like(m["q_weight"], m["k_weight"]):
        return m.fail(
            "the weights of q and k differ in dtype, expected one, or no weight at all",
            "q_weight",
            "k_weight",
        )
    return None


def _is_per_head(m: Match, name: str) -> bool | None:
    """Return whether a norm is over one head, False for all heads of a token, None for neither."""
    x, heads = m.example(name), m.example(f"{name}_heads")
    if not isinstance(heads.shape[-1], int) or heads.dim() < 3 or not isinstance(x.shape[-1], int):
        return None
    if x.shape[-1] == heads.shape[-1]:
        return True
    is_token_first = (m[f"{name}_order"] == "moved") != (m["heads"] == -2)
    is_cut = m[f"{name}_rows"] == "cut" and x.dim() == heads.dim() - 1
    if is_token_first and is_cut and same_shape(x[..., 0], heads[..., 0, 0]):
        return False if x.shape[-1] == heads.shape[-2] * heads.shape[-1] else None
    return None


def _is_like(first: Any, second: Any) -> bool:
    if first is None or second is None:
        return first is second
    return first.meta["example_value"].dtype == second.meta["example_value"].dtype


def replace(m: Match) -> Call | tuple[Call, ...]:
    """Return one call of the joined op, and what it returns for q and k."""
    tensors = [None if m[name] is None else _heads_of(m, name) for name in ("q", "k")]
    both = call(
        fused_norm_rope,
        *tensors,
        m["q_weight"],
        m["k_weight"],
        m["cos"],
        m["sin"],
        eps=m["eps"],
        offset=m["offset"],
        cast_first=m["cast_first"],
        per_head=_is_per_head(m, "q"),
        norm_dtype=m["norm_dtype"],
        **{name: m[name] for name in ROTATION},
    )
    return tuple(call(operator.getitem, both, index) for index in range(len(m.outputs)))


def _heads_of(m: Match, name: str) -> Any:
    """Return what `name` is before its norm, cut and moved as its norm was."""
    x: Any = m[name]
    if m[f"{name}_rows"] == "cut":
        x = call(vocabulary.reshape, x, shape=m[f"{name}_shape"])
    return call(torch.transpose, x, dim0=-3, dim1=-2) if m[f"{name}_order"] == "moved" else x


NORM_ROPE = Pattern(
    name="norm_rope",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    source="transformers Qwen3Attention, Gemma3Attention, Olmo2Attention",
)
