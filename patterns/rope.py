"""Rotary embeddings of queries and keys, in every spelling that Hugging Face models use -> one op for both.

Source: `apply_rotary_pos_emb` of transformers' Llama, Cohere, Glm4, GPT-NeoX, Phi3, GPT-J, OLMo2, NanoChat,
GptOss, DeepSeek-V3.
Saved for backward: cos and sin. Stock saves them too, but writes six more tensors of the size of q and of k.
Numerics: all in fp32, rounded once; a stock model in bf16 rounds three times.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fxopt.graph.arguments import same_shape, same_size
from fxopt.kernels.rope import rope
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    also,
    attribute,
    cat,
    choice,
    chunk,
    downcast,
    either,
    maybe,
    named,
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
    return choice("form", whole=whole, apart=apart)


def joined(a: Term, b: Term) -> Term:
    """Return the items of pairs in one tensor: as two halves, or every `a` before its `b`."""
    return choice("out", half=cat(a, b), interleaved=reshape(stack(a, b)))


class Rotation(NamedTuple):
    """What is turned in each head, and how its pairs lie."""

    pairing: str
    out_pairing: str
    start: int
    length: int
    sign: int
    heads: int


def check(m: Match) -> Mismatch | None:
    """Refuse slices that are not pairs, tables by head or with a gradient, and what q and k do not share."""
    names = ("q", "k") if len(m.outputs) == 2 else ("q",)
    q = m.example("q")
    for name in ("cos", "sin"):
        if m.example(name).requires_grad:
            return m.fail(f"{name} needs a gradient, which the op does not compute", name)
    cos, sin = m.example("cos"), m.example("sin")
    if not same_shape(cos, sin) or cos.dtype != sin.dtype:
        return m.fail(f"sin is {_form(sin)}, expected that of cos {_form(cos)}", "sin")
    for name, node in zip(names, m.outputs, strict=True):
        x, y = m.example(name), node.meta["example_value"]
        if not same_shape(y, x):
            return m.fail(
                f"the result has shape {list(y.shape)}, expected that of {name} {list(x.shape)}", name
            )
        if x.dtype != q.dtype or y.dtype != m.output.dtype or not x.is_floating_point():
            return m.fail(f"{name} is {x.dtype} and becomes {y.dtype}, expected as of q", name)
        rotation = _read(m, name)
        if isinstance(rotation, str):
            return m.fail(rotation, name)
        if rotation != _read(m, "q"):
            return m.fail("q and k are not turned alike", "k")
    if len(names) == 2 and m.outputs[0] is m.outputs[1]:
        return m.fail("q and k are one tensor, expected two", "q")
    return None


def _form(x: torch.Tensor) -> str:
    return f"{list(x.shape)} in {x.dtype}"


def _read(m: Match, name: str) -> Rotation | str:
    """Return how `name` is turned, or why the op does not do that."""
    x = m.example(name)
    size = x.shape[-1]
    if not isinstance(size, int) or x.dim() not in (3, 4):
        return (
            f"{name} has shape {list(x.shape)}, expected [..., heads, tokens, D] in 3 or 4 dims, D a number"
        )
    part = _read_part(m, size)
    if isinstance(part, str):
        return part
    start, length = part
    pairing = _read_pairing(m, name, length)
    if pairing not in ("half", "interleaved"):
        return pairing
    if m["form"] == "whole" and pairing != m["out"]:
        return f"pairs are {pairing} before and {m['out']} after, expected the same"
    items = m.example("cos").shape[-1]
    if items != (length if m["form"] == "whole" else length // 2):
        return f"cos has {items} items for {length} items that are turned"
    heads = _find_heads(m.example("cos"), x)
    if heads is None:
        return f"cos has shape {list(m.example('cos').shape)}, expected to broadcast over the heads of {list(x.shape)}"
    sign = (-1 if m["turn"] == "minus" else 1) * (-1 if m["sum"] == "minus" else 1)
    return Rotation(pairing, m["out"], start, length, sign, heads)


def _read_part(m: Match, size: int) -> tuple[int, int] | str:
    """Return where the turned items begin and how many they are."""
    if m["part"] == "whole":
        return 0, size
    is_first = m["part"] == "first"
    if m["sizes"] is not None:
        sizes: Any = m["sizes"]
        if not isinstance(sizes, tuple) or len(sizes) != 2:
            sizes = (sizes, size - sizes) if isinstance(sizes, int) and sizes < size <= 2 * sizes else ()
        first, last = range(size)[: sum(sizes[:1])], range(size)[sum(sizes[:1]) :]
        inside, outside = (first, last) if is_first else (last, first)
    else:
        inside = range(size) if m["inside"] is None else _taken(m["inside"], size)
        outside = _taken(m["outside"], size)
    if inside is None or outside is None or not inside:
        return "the items of a head are not sliced, expected x[..., :R] and x[..., R:]"
    both = [*inside, *outside] if is_first else [*outside, *inside]
    if both != list(range(size)):
        return f"the slices hold {len(inside)} and {len(outside)} of {size} items, expected each item once and in place"
    return inside[0], len(inside)


def _read_pairing(m: Match, name: str, length: int) -> str:
    """Return how the items of pairs lie, or what is wrong with them."""
    half = length // 2
    if length % 2:
        return f"{length} items are turned, expected an even number"
    match m["pieces"]:
        case "lanes":
            shape = m.example(f"{name}_lanes").shape
            is_paired = tuple(shape[-2:]) == (half, 2)
            return "interleaved" if is_paired else f"x is viewed as {list(shape)}, expected [..., {half}, 2]"
        case "split":
            is_half = m["half"] in (half, (half, half))
            return "half" if is_half else f"split into {m['half']}, expected {half}"
        case "chunked":
            return "half"
        case _:
            a, b = _taken(m["a"], length), _taken(m["b"], length)
    whole = range(length)
    if (a, b) == (whole[:half], whole[half:]):
        return "half"
    if (a, b) == (whole[::2], whole[1::2]):
        return "interleaved"
    return f"the items of pairs are {m['a']} and {m['b']}, expected halves, or every second item"


def _taken(index: Any, size: int) -> range | None:
    """Return which items of the last dim an index takes; None if it is about other dims."""
    match index:
        case (built, slice() as taken) if built is ...:
            return (
                range(size)[taken]
                if all(_is_number(v) for v in (taken.start, taken.stop, taken.step))
                else None
            )
        case (built,) if built is ...:
            return range(size)
        case _:
            return None


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int)


def _find_heads(table: torch.Tensor, x: torch.Tensor) -> int | None:
    """Return which dim of `x` counts heads: that over which the tables are the same, beside the tokens."""
    shape = (1,) * (x.dim() - table.dim()) + tuple(table.shape)
    for heads, tokens in ((-3, -2), (-2, -3)):
        is_one = isinstance(shape[heads], int) and shape[heads] == 1
        if len(shape) == x.dim() and is_one and same_size(shape[tokens], x.shape[tokens]):
            has_batch = len(shape) == 3 or same_size(shape[0], 1) or same_size(shape[0], x.shape[0])
            return heads if has_batch else None
    return None


def replace(m: Match) -> Call | tuple[Call, Call]:
    """Return one call of the fused op, and what it returns for q and k."""
    rotation = _read(m, "q")
    assert isinstance(rotation, Rotation)
    both = call(rope, m["q"], m["k"], m["cos"], m["sin"], **rotation._asdict(), out_dtype=m.output.dtype)
    q = call(operator.getitem, both, 0)
    return q if m["k"] is None else (q, call(operator.getitem, both, 1))


Embed = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _halves_turned(x: torch.Tensor) -> torch.Tensor:
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def _neighbours_turned(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _llama(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return (x * cos) + (_halves_turned(x) * sin)


def _chunked(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat((-x2, x1), dim=-1) * sin)


def _split(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x1, x2 = torch.split(x, x.shape[-1] // 2, dim=-1)
    return torch.cat((-x2, x1), dim=-1) * sin + cos * x


def _cohere(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    xf = x.float()
    return ((xf * cos) + (_neighbours_turned(xf) * sin)).to(x.dtype)


def _olmo2(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return _llama(x, cos, sin).to(x.dtype)


def _nanochat(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return (x * cos) + (torch.cat((x2, -x1), dim=-1) * sin)


def _subtracted(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return (x * cos) - (_halves_turned(x) * sin)


def _first_items(turn: Embed) -> Embed:
    def embed(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        length = cos.shape[-1]
        return torch.cat([turn(x[..., :length], cos, sin), x[..., length:]], dim=-1)

    return embed


def _last_items(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    length = cos.shape[-1]
    passed, inside = torch.split(x, [x.shape[-1] - length, length], dim=-1)
    return torch.cat((passed, _llama(inside, cos, sin)), dim=-1)


def _neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + _neighbours_turned(x) * sin


def _gpt_oss(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _apart_backwards(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def _deepseek(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x1, x2 = x[..., 0::2], x[..., 1::2]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def _lanes(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    x1, x2 = pairs[..., 0], pairs[..., 1]
    return torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).flatten(3).type_as(x)


def _both(embed: Embed) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return a function that makes heads of two projections, and embeds both, as Llama does."""

    def apply(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return embed(q, cos, sin), embed(k, cos, sin)

    return apply


def _tokens_first(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos[:, :, None, :].repeat_interleave(2, 3), sin[:, :, None, :].repeat_interleave(2, 3)
    return _neighbours(q, cos, sin), _neighbours(k, cos, sin)


def _alone(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return _llama(x, cos.unsqueeze(-2), sin.unsqueeze(-2))


def _inputs(
    device: torch.device,
    dtype: torch.dtype,
    items: int = 16,
    tables: torch.dtype | None = None,
    batch: int = 1,
) -> tuple[torch.Tensor, ...]:
    """Return q, k, cos, sin: 4 and 2 heads of 16 items, 5 tokens, `items` in the tables."""
    q, k = (torch.randn(2, 5, heads, 16, device=device, dtype=dtype, requires_grad=True) for heads in (4, 2))
    cos, sin = (torch.randn(batch, 5, items, device=device).to(tables or dtype) for _ in range(2))
    return q, k, cos, sin


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield the spellings above, with tables of one batch item and of all, in bf16 and fp32."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for embed in (_llama, _chunked, _split, _nanochat, _subtracted):
        yield f"{embed.__name__.strip('_')} bf16", (_both(embed), _inputs(device, bf16))
    yield "llama fp32", (_both(_llama), _inputs(device, fp32, batch=2))
    yield "llama bf16 with fp32 tables", (_both(_llama), _inputs(device, bf16, tables=fp32))
    yield "olmo2 bf16", (_both(_olmo2), _inputs(device, bf16, tables=fp32))
    yield "cohere bf16", (_both(_cohere), _inputs(device, bf16))
    yield "cohere fp32", (_both(_cohere), _inputs(device, fp32))
    yield "gpt_neox bf16", (_both(_first_items(_llama)), _inputs(device, bf16, 4))
    yield "phi3 bf16", (_both(_first_items(_llama)), _inputs(device, bf16, 16))
    yield "glm4 bf16", (_both(_first_items(_neighbours)), _inputs(device, bf16, 8))
    yield "last items bf16", (_both(_last_items), _inputs(device, bf16, 12))
    for embed in (_gpt_oss, _apart_backwards, _deepseek, _lanes):
        yield f"{embed.__name__.strip('_')} bf16", (_both(embed), _inputs(device, bf16, 8))
    yield "gpt_oss fp32", (_both(_gpt_oss), _inputs(device, fp32, 8))
    yield "gptj bf16", (_tokens_first, _inputs(device, bf16, 8))
    q, k, cos, sin = _inputs(device, bf16)
    yield "q frozen", (_both(_llama), (q.detach(), k, cos, sin))
    yield "one bf16", (_alone, (q, cos, sin))
    yield "one of 3 dims", (_alone, (q[0].detach().requires_grad_(), cos[0], sin[0]))


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield code that must be left alone, and a part of the reason."""
    q, k, cos, sin = _inputs(device, torch.float32)

    def escaping(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        quarters = [_halves_turned(x) for x in (q, k)]
        return *(x * cos + quarter * sin for x, quarter in zip((q, k), quarters, strict=True)), *quarters

    def per_head(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return _llama(x, cos.expand(x.shape), sin)

    def thirds(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat((-x[..., 6:], x[..., :6]), dim=-1) * sin

    learned = (q, k, cos.clone().requires_grad_(), sin)
    yield "the tables are learned", (_both(_llama), learned), "cos needs a gradient"
    yield (
        "the turned halves are read elsewhere",
        (
            lambda q, k, c, s: escaping(q, k, c[:, :, None], s[:, :, None]),
            (q, k, cos, sin),
        ),
        "is also read by the graph's output",
    )
    yield "tables by head", (_both(per_head), (q, k, cos, sin)), "expected that of cos"
    yield "unequal parts", (_both(thirds), (q, k, cos, sin)), "expected halves"


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield broken embeddings: they must be left alone, or be computed as they stand."""
    pair = _inputs(device, torch.float32)
    halved = _inputs(device, torch.float32, 8)

    def with_quarter(quarter: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Embed:
        def embed(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return x * cos + quarter(x[..., :8], x[..., 8:]) * sin

        return embed

    def apart(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos - a * sin), dim=-1)

    def swapped(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((b * cos + a * sin, a * cos - b * sin), dim=-1)

    def crossed(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat((-x[..., 1::2], x[..., ::2]), dim=-1) * sin

    def moved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[..., 8:], _llama(x[..., :8], cos, sin)], dim=-1)

    def late(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q = _llama(q, cos[:, :, None], sin[:, :, None])
        return q, _llama(k * q.mean(), cos[:, :, None], sin[:, :, None])

    yield "k is made of the turned q", (late, pair)
    yield "no sign", (_both(with_quarter(lambda a, b: torch.cat((b, a), -1))), pair)
    yield "both signs", (_both(with_quarter(lambda a, b: torch.cat((-b, -a), -1))), pair)
    yield "not swapped", (_both(with_quarter(lambda a, b: torch.cat((-a, b), -1))), pair)
    yield "sine for cosine", (_both(lambda x, c, s: _llama(x, s, c)), pair)
    yield "another k", (lambda q, k, c, s: _both(_llama)(q, q.mul(2), c, s), pair)
    yield "one twice", (lambda q, k, c, s: _both(_llama)(q, q, c, s), pair)
    yield "turned twice", (_both(lambda x, c, s: _llama(_llama(x, c, s), c, s)), pair)
    yield "two minus", (_both(apart), halved)
    yield "halves swapped", (_both(swapped), halved)
    yield "neighbours to halves", (_both(crossed), pair)
    yield "the rest in front", (_both(moved), halved)
    yield (
        "other tables for k",
        (lambda q, k, c, s: (_both(_llama)(q, k, c, s)[0], _both(_llama)(q, k, s, c)[1]), pair),
    )


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
