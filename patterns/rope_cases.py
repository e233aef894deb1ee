"""The spellings that `rope` is proven on, what resembles them, and broken ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fxopt.rewriting.pattern import Example

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


def _stacked(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).flatten(-2)


def _llama4(q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q_pairs = torch.view_as_complex(q.float().reshape(*q.shape[:-1], -1, 2))
    k_pairs = torch.view_as_complex(k.float().reshape(*k.shape[:-1], -1, 2))
    q_out = torch.view_as_real(q_pairs * angles[:, :, None, :]).flatten(3)
    k_out = torch.view_as_real(k_pairs * angles[:, :, None, :]).flatten(3)
    return q_out.type_as(q), k_out.type_as(k)


def _cut_at_once(q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return heads cut from what holds all of a token, which in one dtype is one view with that of their pairs."""
    return _llama4(q.flatten(2).view(2, 5, -1, 16), k.flatten(2).view(2, 5, -1, 16), angles)


def _deepseek_v2(q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return heads turned after the tokens were moved behind them, by angles made of each item's own."""
    angles = torch.polar(torch.ones_like(angles.real), angles.angle()).unsqueeze(1)

    def embed(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.transpose(1, 2).float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(angles * pairs).flatten(-2).to(x.dtype)

    return embed(q), embed(k)


def _turned_back(q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _llama4(q, k, angles.conj())


def _by_sections(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return heads turned by positions in time, height and width, each in its section, as Qwen2-VL does."""

    def of_sections(table: torch.Tensor) -> torch.Tensor:
        parts = table.split([2, 3, 3, 2, 3, 3], dim=-1)
        return torch.cat([part[place % 3] for place, part in enumerate(parts)], dim=-1)

    return _both(_llama)(q, k, of_sections(cos), of_sections(sin))


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


def _complex_inputs(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return q, k and angles, complex numbers of one size."""
    q, k, angles, _ = _inputs(device, dtype, 8, tables=torch.float32)
    return q, k, torch.polar(torch.ones_like(angles), angles)


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
    yield "stacked bf16", (_both(_stacked), _inputs(device, bf16, 8))
    for dtype in (bf16, fp32):
        q, k, angles = _complex_inputs(device, dtype)
        for block in (_llama4, _cut_at_once, _deepseek_v2, _turned_back):
            yield f"{block.__name__.strip('_')} {str(dtype).removeprefix('torch.')}", (block, (q, k, angles))
    q, k, *_ = _inputs(device, bf16)
    sections = [torch.randn(3, 2, 5, 16, device=device).to(bf16) for _ in range(2)]
    yield "qwen2_vl bf16", (_by_sections, (q, k, *sections))
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

    def by_head(q: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(q.reshape(2, 5, 4, 8, 2)) * angles).flatten(3)

    def read_as_complex(q: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        turned = torch.view_as_complex(q.reshape(2, 5, 4, 8, 2)) * angles
        return torch.view_as_real(turned).flatten(3), turned.abs()

    angles = _complex_inputs(device, torch.float32)[2]
    yield (
        "angles by head",
        (by_head, (q, angles.unsqueeze(2).expand(1, 5, 4, 8))),
        "expected to broadcast over the heads",
    )
    yield (
        "the complex product is read elsewhere",
        (read_as_complex, (q, angles.unsqueeze(2))),
        "is also read by",
    )
    trained = angles.unsqueeze(2).clone().requires_grad_()
    yield "the angles are learned", (by_head, (q, trained)), "angles needs a gradient"
    learned = (q, k, cos.clone().requires_grad_(), sin)
    yield "the tables are learned", (_both(_llama), learned), "cos needs a gradient"
    yield (
        "the turned halves are read elsewhere",
        (
            lambda q, k, c, s: escaping(q, k, c[:, :, None], s[:, :, None]),
            (q, k, cos, sin),
        ),
        "is also returned",
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

    def of_complex(turn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        def embed(q: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_complex(q.reshape(2, 5, 4, 8, 2))
            return torch.view_as_real(turn(pairs, angles.unsqueeze(2))).flatten(3)

        return embed

    numbers = _complex_inputs(device, torch.float32)[::2]
    yield "turned back", (of_complex(lambda z, a: z * a.conj()), numbers)
    yield "a pair turned back", (of_complex(lambda z, a: (z.conj() * a).resolve_conj()), numbers)
    yield "divided", (of_complex(lambda z, a: z / a), numbers)
    yield "the imaginary part first", (of_complex(lambda z, a: z * a * 1j), numbers)
    yield "a real table", (of_complex(lambda z, a: z * a.abs()), numbers)
    yield "turned by its own", (of_complex(lambda z, a: z * z), numbers)
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
