"""The blocks that `norm_rope` is proven on, what resembles them, and broken ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fxopt.rewriting.pattern import Example

Function = Callable[..., torch.Tensor]
Block = Callable[..., tuple[torch.Tensor, ...]]
EPS = 1e-6


def _llama_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    xf = x.to(torch.float32)
    return w * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _gemma_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    xf = x.float()
    return ((xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + EPS)) * (1.0 + w.float())).type_as(x)


def _plain_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), eps=EPS)


def _embed(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return (x * cos) + (torch.cat((-x2, x1), dim=-1) * sin)


def _embed_first(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.cat((_embed(x[..., :4], cos, sin), x[..., 4:]), dim=-1)


def _cut(x: torch.Tensor) -> torch.Tensor:
    return x.view(*x.shape[:-1], -1, 16)


def _qwen3(norm: Function = _llama_norm, embed: Function = _embed) -> Block:
    """Return heads normed, then moved, then turned."""

    def apply(
        q: torch.Tensor,
        k: torch.Tensor,
        q_w: torch.Tensor,
        k_w: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        pair = (norm(_cut(x), w).transpose(1, 2) for x, w in ((q, q_w), (k, k_w)))
        return tuple(embed(x, cos.unsqueeze(1), sin.unsqueeze(1)) for x in pair)

    return apply


def _normed_first(norm: Function, heads: int = 1) -> Block:
    """Return q and k normed, by a function that cuts them into heads as well, and then both turned."""

    def apply(
        q: torch.Tensor,
        k: torch.Tensor,
        q_w: torch.Tensor,
        k_w: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        pair = [norm(x, w) for x, w in ((q, q_w), (k, k_w))]
        return tuple(_embed(x, cos.unsqueeze(heads), sin.unsqueeze(heads)) for x in pair)

    return apply


_gemma3 = _normed_first(lambda x, w: _gemma_norm(_cut(x).transpose(1, 2), w))
_olmo2 = _normed_first(lambda x, w: _cut(_llama_norm(x, w)).transpose(1, 2))
_tokens_first = _normed_first(lambda x, w: _llama_norm(_cut(x), w), heads=2)


def _alone(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return _embed(_llama_norm(_cut(x), w).transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1))


def _inputs(
    device: torch.device,
    dtype: torch.dtype,
    *,
    flat: bool = False,
    items: int = 16,
    weights: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return q, k, their weights, cos, sin: 4 and 2 heads of 16 items, 5 tokens."""
    widths = (64, 32)
    q, k = (torch.randn(2, 5, width, device=device).to(dtype).requires_grad_() for width in widths)
    sizes = widths if flat else (16, 16)
    q_w, k_w = (
        (1 + torch.randn(size, device=device) / 4).to(weights or dtype).requires_grad_() for size in sizes
    )
    cos, sin = (torch.randn(1, 5, items, device=device).to(dtype) for _ in range(2))
    return q, k, q_w, k_w, cos, sin


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield the blocks above in bf16 and fp32, with frozen and absent weights, and partly turned."""
    bf16, fp32 = torch.bfloat16, torch.float32
    q, _, w, _, cos, sin = _inputs(device, bf16)
    yield "one bf16", (_alone, (q, w, cos, sin))
    for dtype in (bf16, fp32):
        name = str(dtype).removeprefix("torch.")
        yield f"qwen3 {name}", (_qwen3(), _inputs(device, dtype))
        yield f"gemma3 {name}", (_gemma3, _inputs(device, dtype))
        yield f"olmo2 {name}", (_olmo2, _inputs(device, dtype, flat=True))
    yield "tokens first", (_tokens_first, _inputs(device, bf16))
    yield "weights in fp32", (_qwen3(), _inputs(device, bf16, weights=fp32))
    yield "without weights", (_qwen3(_plain_norm), _inputs(device, bf16))
    yield "partly turned", (_qwen3(embed=_embed_first), _inputs(device, bf16, items=4))
    q, k, q_w, k_w, cos, sin = _inputs(device, fp32)
    yield "frozen weights", (_qwen3(), (q, k, q_w.detach(), k_w.detach(), cos, sin))
    yield "q frozen", (_qwen3(), (q.detach(), k, q_w.detach(), k_w, cos, sin))


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield norms and rotations that stay two ops."""
    inputs = _inputs(device, torch.float32)

    def read_elsewhere(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, w, cos, sin = tensors
        n = _llama_norm(_cut(q), w)
        return _embed(n, cos.unsqueeze(2), sin.unsqueeze(2)), n.exp()

    def q_alone(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, w, _, cos, sin = tensors
        pair = (_llama_norm(_cut(q), w), _cut(k))
        return tuple(_embed(x, cos.unsqueeze(2), sin.unsqueeze(2)) for x in pair)

    def centred(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = _cut(x)
        mean = x.mean(-1, keepdim=True)
        n = w * ((x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + EPS))
        return _embed(n, cos.unsqueeze(2), sin.unsqueeze(2))

    def by_pairs(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        n = _llama_norm(x.view(2, 5, 2, 32), torch.cat((w, w)))
        return _embed(n.view(2, 5, 4, 16), cos.unsqueeze(2), sin.unsqueeze(2))

    one = (inputs[0], inputs[2], *inputs[4:])
    yield "the normed heads are read elsewhere", (read_elsewhere, one), "is also read by"
    yield "only q is normed", (q_alone, inputs), "expected both or neither normed"
    yield "a centred norm", (centred, one), "expected False, got True"
    yield "a norm of two heads", (by_pairs, one), "neither over one head nor over all heads"


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield blocks that a careless match would compute wrongly."""
    inputs = _inputs(device, torch.float32)

    def other_eps(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, q_w, k_w, cos, sin = tensors
        k = torch.nn.functional.rms_norm(_cut(k), (16,), k_w, 0.1)
        pair = (_llama_norm(_cut(q), q_w), k)
        return tuple(_embed(x, cos.unsqueeze(2), sin.unsqueeze(2)) for x in pair)

    def swapped_dims(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, q_w, k_w, cos, sin = tensors
        pair = (_llama_norm(x.view(2, 5, -1, 16).permute(0, 2, 3, 1), w[:5]) for x, w in ((q, q_w), (k, k_w)))
        return tuple(_embed(x.transpose(2, 3), cos.unsqueeze(1), sin.unsqueeze(1)) for x in pair)

    yield "another eps for k", (other_eps, inputs)
    yield "normed over tokens", (swapped_dims, inputs)
    yield "scaled between", (_qwen3(lambda x, w: _llama_norm(x, w) * 2), inputs)
    yield "normed after", (_qwen3(lambda x, w: x, lambda x, c, s: _plain_norm(_embed(x, c, s), c)), inputs)
    yield "weights swapped", (lambda q, k, v, w, c, s: _qwen3()(q, k, w, v, c, s), inputs)
