"""Rotary embeddings of queries and keys, in every spelling that Hugging Face models use -> one op for both.

Source: `apply_rotary_pos_emb` of transformers' Llama, Cohere, Glm4, GPT-NeoX, Phi3, GPT-J, OLMo2, NanoChat,
GptOss, DeepSeek-V3, Llama4 (products of complex numbers).
Saved for backward: cos and sin. Stock saves them too, but writes six more tensors of the size of q and of k.
Numerics: all in fp32, rounded once; a stock model in bf16 rounds three times.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from fxopt.graph import vocabulary
from fxopt.graph.arguments import same_shape
from fxopt.kernels.rope import rope
from fxopt.patterns.rope_cases import examples, mutations, near_misses
from fxopt.patterns.rotations import Rotation, heads_of, read_rotation
from fxopt.rewriting.pattern import Call, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    also,
    attribute,
    cat,
    choice,
    chunk,
    contiguous,
    downcast,
    either,
    maybe,
    named,
    operation,
    reshape,
    split,
    stack,
    tensor,
    upcast,
)


def search() -> tuple[Term, Term]:
    """Return a turned tensor, and another that is turned alike by the same tables where there is one.

    There may be none: where a model turns one alone, or reads it before the other is there.
    """
    return embedded("q"), also(embedded("k"))


def embedded(name: str) -> Term:
    """Return `name` with all, the first or the last items of its heads turned."""
    x = tensor(name)
    inside, outside = attribute("inside"), attribute("outside")
    sizes = attribute("sizes")
    pieces = split(x, sizes)
    first = cat(maybe(downcast, turned(either(x[inside], pieces[0], x), name)), either(x[outside], pieces[1]))
    last = cat(either(x[outside], pieces[0]), maybe(downcast, turned(either(x[inside], pieces[1], x), name)))
    return maybe(downcast, choice("part", first=first, last=last, whole=turned(x, name)))


def turned(v: Term, name: str) -> Term:
    """Return `v` with its pairs turned: by products of all of it, or of the items of pairs apart."""
    v = maybe(upcast, v)
    cos, sin = tensor("cos"), tensor("sin")
    halves, parts, lanes = chunk(v, 2), split(v, attribute("half")), named(f"{name}_lanes", reshape(v))
    a = choice("pieces", sliced=v[attribute("a")], chunked=halves[0], split=parts[0], lanes=lanes[..., 0])
    b = choice("pieces", sliced=v[attribute("b")], chunked=halves[1], split=parts[1], lanes=lanes[..., 1])
    quarter = choice("turn", plus=joined(-b, a), minus=joined(b, -a))
    whole = choice("sum", plus=v * cos + quarter * sin, minus=v * cos - quarter * sin)
    apart = choice(
        "turn",
        plus=joined(a * cos - b * sin, b * cos + a * sin),
        minus=joined(a * cos + b * sin, b * cos - a * sin),
    )
    return choice("form", whole=whole, apart=apart, complex=turned_as_complex(lanes))


def turned_as_complex(lanes: Term) -> Term:
    """Return pairs turned by a product of complex numbers: of a pair, and of a cosine and a sine."""
    numbers = operation(torch.view_as_complex, choice("pieces", lanes=maybe(contiguous, lanes))) * tensor(
        "angles"
    )
    return choice("out", interleaved=reshape(operation(torch.view_as_real, numbers)))


def joined(a: Term, b: Term) -> Term:
    """Return the items of pairs in one tensor: as two halves, or every `a` before its `b`."""
    return choice("out", half=cat(a, b), interleaved=reshape(stack(a, b)))


def check(m: Match) -> Mismatch | None:
    """Refuse slices that are not pairs, tables by head or with a gradient, and what q and k do not share."""
    names = ("q", "k") if len(m.outputs) == 2 else ("q",)
    q = m.example("q")
    tables = ("angles",) if m["form"] == "complex" else ("cos", "sin")
    for name in tables:
        if m.example(name).requires_grad:
            return m.fail(f"{name} needs a gradient, which the op does not compute", name)
    cos, sin = m.example(tables[0]), m.example(tables[-1])
    if m["form"] == "complex" and not cos.is_complex():
        return m.fail(f"the angles are {cos.dtype}, expected complex numbers", "angles")
    if not same_shape(cos, sin) or cos.dtype != sin.dtype:
        return m.fail(f"sin is {_form(sin)}, expected that of cos {_form(cos)}", "sin")
    for name, node in zip(names, m.outputs, strict=True):
        x, y = m.example(name), node.meta["example_value"]
        heads = heads_of(m, name)
        if not same_shape(y, heads):
            return m.fail(
                f"the result has shape {list(y.shape)}, expected that of {name} {list(heads.shape)}", name
            )
        if x.dtype != q.dtype or y.dtype != m.output.dtype or not x.is_floating_point():
            return m.fail(f"{name} is {x.dtype} and becomes {y.dtype}, expected as of q", name)
        rotation = read_rotation(m, name)
        if isinstance(rotation, str):
            return m.fail(rotation, name)
        if rotation != read_rotation(m, "q"):
            return m.fail("q and k are not turned alike", "k")
    if len(names) == 2 and m.outputs[0] is m.outputs[1]:
        return m.fail("q and k are one tensor, expected two", "q")
    return None


def _form(x: torch.Tensor) -> str:
    return f"{list(x.shape)} in {x.dtype}"


def replace(m: Match) -> Call | tuple[Call, Call]:
    """Return one call of the fused op, and what it returns for q and k."""
    rotation = read_rotation(m, "q")
    assert isinstance(rotation, Rotation)
    cos, sin = m["cos"], m["sin"]
    if m["form"] == "complex":
        cos, sin = call(torch.real, m["angles"]), call(torch.imag, m["angles"])
    both = call(
        rope, _argument(m, "q"), _argument(m, "k"), cos, sin, **rotation._asdict(), out_dtype=m.output.dtype
    )
    q = call(operator.getitem, both, 0)
    return q if m["k"] is None else (q, call(operator.getitem, both, 1))


def _argument(m: Match, name: str) -> Any:
    """Return `name` as the heads that are turned."""
    if m[name] is None or same_shape(m.example(name), heads_of(m, name)):
        return m[name]
    *leading, _, _ = m[f"{name}_lanes"].kwargs["shape"]
    return call(vocabulary.reshape, m[name], shape=(*leading, heads_of(m, name).shape[-1]))


ROPE = Pattern(
    name="rope",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    source="transformers apply_rotary_pos_emb of Llama, Cohere, Glm4, GPT-NeoX, Phi3, GPT-J, GptOss, DeepSeek-V3",
)
