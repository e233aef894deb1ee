"""The ops `fxopt::attention` and `fxopt::attention_backward`, and the function that models' graphs call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxopt.kernels.attention.call import Call, with_call
from fxopt.kernels.attention.choice import fused_backward, fused_forward
from fxopt.kernels.attention.masks import find_intervals
from fxopt.kernels.attention.reference import plain_backward, plain_forward
from fxopt.kernels.launch import Declared, register_gradient, register_op, wide_dtype


def _new_heads_last(x: Tensor, width: Any = None) -> Tensor:
    batch, heads, length, own = x.shape
    return x.new_empty(batch, length, heads, own if width is None else width).transpose(1, 2)


def _fake_forward(call: Call) -> tuple[Tensor, Tensor]:
    q = call.q
    return _new_heads_last(q, call.v.shape[-1]), q.new_empty(q.shape[:-1], dtype=wide_dtype(q.dtype))


def _fake_backward(
    call: Call, out: Tensor, lse: Tensor, dout: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    wide = (
        _new_heads_last(x) if is_needed else None
        for x, is_needed in zip((call.q, call.k, call.v), needs, strict=False)
    )
    sinks = call.sinks
    return (*wide, sinks.new_empty(sinks.shape) if sinks is not None and needs[3] else None)


def _forward_flops(call: Call) -> int:
    """Count both products of attention, half of them where a query reads no key after it."""
    width = call.q.shape[-1]
    pairs = call.q.numel() // width * call.k.shape[-2]
    return 2 * pairs * (width + call.v.shape[-1]) // (2 if call.causal else 1)


def _backward_flops(call: Call, *_: Any) -> int:
    """Count the scores computed again and the products of all gradients: five where forward has two."""
    return _forward_flops(call) * 5 // 2


def _backward_workspace(call: Call, out: Tensor, lse: Tensor, *_: Any) -> int:
    """Return the bytes of dq, which is summed in fp32, and of one number per row of dout * out.

    Where heads share keys, torch's backends write dk and dv of each head before they add them.
    """
    of_keys = call.q.shape[1] * (call.k.numel() + call.v.numel()) // call.k.shape[1]
    is_shared = call.k.shape[1] != call.q.shape[1] and not call.softcap and call.sinks is None
    return 4 * (call.q.numel() + lse.numel()) + (call.k.element_size() * of_keys if is_shared else 0)


FORWARD_SHARE, BACKWARD_SHARE = 0.57, 0.45
"""Of an H100's 989 TFLOP/s: 2 x 4096 tokens, causal, with 28 heads of 128 take 0.422 and 1.334 ms."""
INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? intervals, Tensor? reads, Tensor? sinks,"
    " bool causal, float scale, float softcap, bool safe"
)
_forward_op = register_op(
    f"attention({INPUTS}) -> (Tensor, Tensor)",
    plain=with_call(plain_forward),
    fused=with_call(fused_forward),
    fake=with_call(_fake_forward),
    flops=with_call(_forward_flops),
    declared=Declared(share=FORWARD_SHARE),
)
_backward_op = register_op(
    f"attention_backward({INPUTS}, Tensor out, Tensor lse, Tensor dout, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    plain=with_call(plain_backward),
    fused=with_call(fused_backward),
    fake=with_call(_fake_backward),
    flops=with_call(_backward_flops),
    declared=Declared(workspace=with_call(_backward_workspace), share=BACKWARD_SHARE),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.softcap, ctx.safe = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    needs = [ctx.needs_input_grad[place] for place in (0, 1, 2, 6)]
    *tensors, out, lse = ctx.saved_tensors
    scalars = ctx.causal, ctx.scale, ctx.softcap, ctx.safe
    dq, dk, dv, dsinks = _backward_op(*tensors, *scalars, out, lse, dout, needs)
    return dq, dk, dv, None, None, None, dsinks, None, None, None, None


_apply = register_gradient("attention", _forward_op, _setup_context, _backward)


def attention(
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
    """Return softmax(logits) v, [B, Hq, Sq, Dv], in the memory layout [B, Sq, Hq, Dv].

    q: [B, Hq, Sq, D]; k: [B, Hk, Sk, D]; v: [B, Hk, Sk, Dv], any strides, one float dtype; query head h reads
    key head h // (Hq / Hk). mask: up to four dims that broadcast to [B, Hq, Sq, Sk]; bool (True: seen) or
    float (added to the logits). sinks: [Hq], one more logit per head, of a key without a value. causal:
    query i sees keys up to i. Logits are q k^T scale, then softcap tanh(logits / softcap) if softcap is not 0.

    A row without any key is 0 if safe, else NaN. One that a float mask shuts throughout by the lowest finite
    number is the mean of all values, as the sum of score and mask rounds to the mask; with sinks it is 0.

    >>> import torch
    >>> q = torch.zeros(1, 2, 1, 4)
    >>> attention(q, q, q + 3, scale=0.5)[0, 0]
    tensor([[3., 3., 3., 3.]])
    """
    _check(q, k, v, mask, sinks, causal)
    intervals = reads = None
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask.expand(*mask.shape[:-1], k.shape[-2])
        if q.device.type == "cuda":
            intervals, reads = find_intervals(mask, has_sinks=sinks is not None, safe=safe)
    return _apply(q, k, v, mask, intervals, reads, sinks, causal, scale, softcap, safe)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, causal: bool) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"attention: q, k, v, expected 4 dims each, got {q.dim()}, {k.dim()}, {v.dim()}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: k, v, expected the dtype of q {q.dtype}, got {k.dtype}, {v.dtype}")
    if q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1]:
        expected = f"a divisor of the {q.shape[1]} heads of q, the same in both"
        raise ValueError(f"attention: heads of k, v, expected {expected}, got {k.shape[1]}, {v.shape[1]}")
    if mask is not None and (causal or mask.dim() > 4 or mask.requires_grad):
        reason = (
            "a causal mask" if causal else f"{mask.dim()} dims" if mask.dim() > 4 else "one with a gradient"
        )
        raise ValueError(f"attention: mask, expected one of up to 4 dims and nothing beside, got {reason}")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"attention: sinks, expected shape ({q.shape[1]},), got {tuple(sinks.shape)}")
