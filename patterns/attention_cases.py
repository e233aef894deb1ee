"""The spellings that `attention` is proven on, what resembles them, and broken ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from fxopt.rewriting.pattern import Example


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


def _scaled_by_sinks(sign: int = 1) -> Callable[..., torch.Tensor]:
    """Return attention with sinks as granite_swa has them; with the other `sign` it is none."""

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor
    ) -> torch.Tensor:
        k, v = _repeat(k, 2), _repeat(v, 2)
        scores = torch.matmul(q, k.transpose(2, 3)) * 0.25 + mask
        total, rows = torch.logsumexp(scores, dim=-1), sinks.view(1, -1, 1)
        share = (total - rows if sign == 1 else total + rows).to(torch.float32).sigmoid()
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        out = torch.matmul(weights, v) * share.unsqueeze(-1).to(v.dtype)
        return out.transpose(1, 2).contiguous()

    return run


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
        scaled = _inputs(device, dtype, mask="added", sinks=True)
        yield f"granite_swa {name}", (_scaled_by_sinks(), scaled)


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
    yield "the weights are returned", (escaping, (q, k, v)), "is also returned"
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
    yield "sinks the other way", (_scaled_by_sinks(-1), (q, k, v, mask, sinks))

    def queries_scaled(*inputs: torch.Tensor) -> torch.Tensor:
        q, k, v, mask, sinks = inputs
        q, k, v, mask = (each[:, :, :4] for each in (q, k, v, mask))
        scores = q @ _repeat(k, 2).transpose(2, 3) * 0.25 + mask[..., :4]
        share = (torch.logsumexp(scores, dim=-1) - sinks.view(1, 1, 4)).sigmoid()
        return scores.softmax(-1) @ _repeat(v, 2) * share.unsqueeze(-1)

    yield "sinks of queries", (queries_scaled, (q, k, v, mask, sinks))
    yield (
        "masked after the softmax",
        (lambda q, k, v: ((q @ k.transpose(2, 3)).softmax(-1)).tril() @ v, triple),
    )
