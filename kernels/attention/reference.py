"""Attention in plain torch: the specification, and what runs on a CPU and where no kernel can."""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = {torch.float16: -65504.0}
LOWEST_OTHERWISE = -1e30  # such a value added to any score leaves nothing of the score

Scalars = tuple[bool, float, float, bool]
"""causal, scale, softcap, safe: the attributes that every function here takes last."""


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float,
    softcap: float = 0.0,
    safe: bool = True,
) -> Tensor:
    """Return the attention of `q` to `k` and `v`, differentiable, in plain torch: the specification."""
    wide = wide_dtype(q)
    logits, _ = compute_logits(q, k, mask, sinks is not None, causal, scale, softcap)
    if sinks is not None:
        column = sinks.to(wide).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = torch.softmax(logits, dim=-1)
    if safe:
        weights = weights.masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0)
    return times_values(weights[..., : k.shape[-2]], v.to(wide)).to(q.dtype)


def wide_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic: float32, or float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def compute_logits(
    q: Tensor, k: Tensor, mask: Tensor | None, has_sinks: bool, causal: bool, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Return what the softmax is taken of, [B, Hq, Sq, Sk], -inf where masked, and the scores behind it.

    In a row that an additive mask shuts throughout by the lowest finite number, all keys have the same logit.
    """
    wide = wide_dtype(q)
    q_groups, k_groups = in_groups(q.to(wide), k.shape[1]), k.to(wide).unsqueeze(2)
    scores = torch.matmul(q_groups, k_groups.transpose(-1, -2)).flatten(1, 2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        return scores.masked_fill(~seen, -torch.inf), scores
    if mask is None:
        return scores, scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf), scores
    shut = is_shut(mask)
    logits = torch.where(shut, -torch.inf, scores + mask.to(wide))
    if not has_sinks:
        is_level = find_level_rows(mask, shut).unsqueeze(-1)
        level = (scores - scores.detach()).masked_fill(mask == -torch.inf, -torch.inf)
        logits = torch.where(is_level, level, logits)
    return logits, scores


def is_shut(mask: Tensor) -> Tensor:
    """Return where an additive mask leaves no weight: -inf, or too low for the score to count."""
    return mask <= LOWEST.get(mask.dtype, LOWEST_OTHERWISE)


def find_level_rows(mask: Tensor, shut: Tensor) -> Tensor:
    """Return the rows in which every key is shut, and one of them by a finite number: their softmax is even."""
    return shut.all(-1) & (mask > -torch.inf).any(-1)


def in_groups(x: Tensor, num_key_heads: int) -> Tensor:
    """Return [B, Hq, S, D] as [B, Hk, Hq / Hk, S, D]."""
    return x.unflatten(1, (num_key_heads, -1))


def times_values(weights: Tensor, v: Tensor) -> Tensor:
    """Return the sums of values by weight, [B, Hq, Sq, Dv]."""
    return torch.matmul(in_groups(weights, v.shape[1]), v.unsqueeze(2)).flatten(1, 2)


def as_heads_last(x: Tensor) -> Tensor:
    """Return [B, H, S, D] in the memory layout [B, S, H, D], in which models read it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def reference_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, scalars: Scalars
) -> tuple[Tensor, Tensor]:
    """Return the attention and the log of the sum of exponentials of each row, 0 where it is empty."""
    causal, scale, softcap, safe = scalars
    logits, _ = compute_logits(q, k, mask, sinks is not None, causal, scale, softcap)
    lse = torch.logsumexp(logits, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1).expand_as(lse))
    if safe:
        lse = torch.where(lse == -torch.inf, 0.0, lse)
    weights = torch.exp(logits - lse.unsqueeze(-1))
    return as_heads_last(times_values(weights, v.to(weights.dtype)).to(q.dtype)), lse


def reference_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scalars: Scalars,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v and sinks; the weights are computed again."""
    causal, scale, softcap, _ = scalars
    num_key_heads = k.shape[1]
    logits, scores = compute_logits(q, k, mask, sinks is not None, causal, scale, softcap)
    weights = torch.exp(logits - lse.unsqueeze(-1))
    dout_groups = in_groups(dout.to(weights.dtype), num_key_heads)
    weights_groups = in_groups(weights, num_key_heads)
    dv = torch.matmul(weights_groups.transpose(-1, -2), dout_groups).sum(2)
    dweights = torch.matmul(dout_groups, v.to(weights.dtype).unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
    delta = (dweights * weights).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta)
    if softcap:
        dscores = dscores * (1 - (scores / softcap).square())
    dscores = in_groups(dscores * scale, num_key_heads)
    dq = torch.matmul(dscores, k.to(weights.dtype).unsqueeze(2)).flatten(1, 2)
    dk = torch.matmul(dscores.transpose(-1, -2), in_groups(q.to(weights.dtype), num_key_heads)).sum(2)
    dsinks = None
    if sinks is not None:
        sink_weights = torch.exp(sinks.to(lse.dtype).view(1, -1, 1) - lse)
        dsinks = -(sink_weights * delta.squeeze(-1)).sum((0, 2)).to(sinks.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks


def is_served_by_torch_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, softcap: float
) -> bool:
    """Return whether torch's flash attention for CPUs computes this: no softcap, no sinks, no additive mask.

    With an additive mask its backward takes an even row of n keys for a sum of n ones.
    """
    if softcap or sinks is not None or (mask is not None and mask.dtype != torch.bool):
        return False
    return q.dtype == k.dtype == v.dtype and q.shape[-1] == v.shape[-1] and 0 not in (*q.shape, *k.shape)


def additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return a bool mask as one of 0 and -inf."""
    return None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)


def plain_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    intervals: Tensor | None,
    reads: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    safe: bool,
) -> tuple[Tensor, Tensor]:
    """Return the attention and its lse in plain torch; by torch's flash attention where that serves."""
    if q.device.type == "cpu" and is_served_by_torch_on_cpu(q, k, v, mask, sinks, softcap):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=causal, attn_mask=additive(mask, q), scale=scale
        )
        return as_heads_last(out), lse.contiguous()
    return reference_forward(q, k, v, mask, sinks, (causal, scale, softcap, safe))


def plain_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    intervals: Tensor | None,
    reads: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    safe: bool,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v and sinks that are needed, in plain torch; no scores were saved."""
    found: tuple[Tensor | None, ...]
    if q.device.type == "cpu" and is_served_by_torch_on_cpu(q, k, v, mask, sinks, softcap):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, attn_mask=additive(mask, q), scale=scale
        )
        found = (*found, None)
    else:
        found = reference_backward(dout, q, k, v, lse, mask, sinks, (causal, scale, softcap, safe))
    dq, dk, dv, dsinks = found
    need_q, need_k, need_v, need_sinks = needs
    return (
        as_heads_last(dq) if need_q and dq is not None else None,
        as_heads_last(dk) if need_k and dk is not None else None,
        as_heads_last(dv) if need_v and dv is not None else None,
        dsinks if need_sinks else None,
    )
