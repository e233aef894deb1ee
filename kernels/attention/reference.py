"""Attention in plain torch: the specification, and what runs on a CPU and where no kernel can."""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.kernels.attention.call import Call
from fxopt.kernels.launch import wide_dtype

LOWEST = {torch.float16: -65504.0}
LOWEST_OTHERWISE = -1e30  # such a value added to any score leaves nothing of the score


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
    wide = wide_dtype(q.dtype)
    logits, _ = compute_logits(Call(q, k, v, mask, None, None, sinks, causal, scale, softcap, safe))
    if sinks is not None:
        column = sinks.to(wide).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = torch.softmax(logits, dim=-1)
    if safe:
        weights = weights.masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0)
    return times_values(weights[..., : k.shape[-2]], v.to(wide)).to(q.dtype)


def compute_logits(call: Call) -> tuple[Tensor, Tensor]:
    """Return what the softmax is taken of, [B, Hq, Sq, Sk], -inf where masked, and the scores behind it.

    In a row that an additive mask shuts throughout by the lowest finite number, all keys have the same logit.
    """
    mask, wide = call.mask, wide_dtype(call.q.dtype)
    q_groups, k_groups = in_groups(call.q.to(wide), call.k.shape[1]), call.k.to(wide).unsqueeze(2)
    scores = torch.matmul(q_groups, k_groups.transpose(-1, -2)).flatten(1, 2) * call.scale
    if call.softcap:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if call.causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        return scores.masked_fill(~seen, -torch.inf), scores
    if mask is None:
        return scores, scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf), scores
    shut = is_shut(mask)
    logits = torch.where(shut, -torch.inf, scores + mask.to(wide))
    if call.sinks is None:
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


def reference_forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return the attention and the log of the sum of exponentials of each row, 0 where it is empty."""
    logits, _ = compute_logits(call)
    lse = torch.logsumexp(logits, dim=-1)
    if call.sinks is not None:
        lse = torch.logaddexp(lse, call.sinks.to(lse.dtype).view(1, -1, 1).expand_as(lse))
    if call.safe:
        lse = torch.where(lse == -torch.inf, 0.0, lse)
    weights = torch.exp(logits - lse.unsqueeze(-1))
    return as_heads_last(times_values(weights, call.v.to(weights.dtype)).to(call.q.dtype)), lse


def reference_backward(call: Call, lse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v and sinks; the weights are computed again."""
    q, k, v, sinks = call.q, call.k, call.v, call.sinks
    num_key_heads = k.shape[1]
    logits, scores = compute_logits(call)
    weights = torch.exp(logits - lse.unsqueeze(-1))
    dout_groups = in_groups(dout.to(weights.dtype), num_key_heads)
    weights_groups = in_groups(weights, num_key_heads)
    dv = torch.matmul(weights_groups.transpose(-1, -2), dout_groups).sum(2)
    dweights = torch.matmul(dout_groups, v.to(weights.dtype).unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
    delta = (dweights * weights).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta)
    if call.softcap:
        dscores = dscores * (1 - (scores / call.softcap).square())
    dscores = in_groups(dscores * call.scale, num_key_heads)
    dq = torch.matmul(dscores, k.to(weights.dtype).unsqueeze(2)).flatten(1, 2)
    dk = torch.matmul(dscores.transpose(-1, -2), in_groups(q.to(weights.dtype), num_key_heads)).sum(2)
    dsinks = None
    if sinks is not None:
        sink_weights = torch.exp(sinks.to(lse.dtype).view(1, -1, 1) - lse)
        dsinks = -(sink_weights * delta.squeeze(-1)).sum((0, 2)).to(sinks.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks


def is_for_torch_on_cpu(call: Call) -> bool:
    """Return whether torch's flash attention for CPUs knows this form: no softcap, no sinks, no additive mask.

    With an additive mask its backward takes an even row of n keys for a sum of n ones.
    """
    if call.softcap or call.sinks is not None or call.q.shape[-1] != call.v.shape[-1]:
        return False
    return call.mask is None or call.mask.dtype == torch.bool


def is_served_by_torch_on_cpu(call: Call) -> bool:
    """Return whether torch's flash attention for CPUs computes this call."""
    return (
        call.q.device.type == "cpu"
        and call.q.dtype == call.k.dtype == call.v.dtype
        and 0 not in (*call.q.shape, *call.k.shape)
        and is_for_torch_on_cpu(call)
    )


def additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return a bool mask as one of 0 and -inf."""
    return None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)


def plain_forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return the attention and its lse in plain torch; by torch's flash attention where that serves."""
    if not is_served_by_torch_on_cpu(call):
        return reference_forward(call)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        call.q,
        call.k,
        call.v,
        is_causal=call.causal,
        attn_mask=additive(call.mask, call.q),
        scale=call.scale,
    )
    return as_heads_last(out), lse.contiguous()


def plain_backward(
    call: Call, out: Tensor, lse: Tensor, dout: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v and sinks that are needed, in plain torch; no scores were saved."""
    found: tuple[Tensor | None, ...]
    if is_served_by_torch_on_cpu(call):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout,
            call.q,
            call.k,
            call.v,
            out,
            lse,
            0.0,
            call.causal,
            attn_mask=additive(call.mask, call.q),
            scale=call.scale,
        )
    else:
        found = reference_backward(call, lse, dout)
    return pick_gradients(found, needs)


def pick_gradients(found: tuple[Tensor | None, ...], needs: list[bool]) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v and sinks that are needed, the first three in the models' memory layout."""
    dq, dk, dv, dsinks = (*found, *[None] * (4 - len(found)))
    wide = (
        as_heads_last(value) if is_needed and value is not None else None
        for value, is_needed in zip((dq, dk, dv), needs, strict=False)
    )
    return (*wide, dsinks if needs[3] else None)
