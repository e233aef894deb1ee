"""What can compute an attention on a GPU: three of torch's, the Triton kernels, plain torch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxopt.kernels.attention.call import Call
from fxopt.kernels.attention.launches import MOST_WIDTH, launch_backward, launch_forward
from fxopt.kernels.attention.plans import Plan, plans_of
from fxopt.kernels.attention.reference import plain_backward, plain_forward
from fxopt.kernels.launch import can_launch

OLDEST_CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EFFICIENT_ROWS = 32  # the lse of torch's memory-efficient attention is padded to a multiple of it


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation: its name, and its two passes."""

    name: str
    forward: Callable[[Call], tuple[Tensor, Tensor]]
    backward: Callable[[Call, Tensor, Tensor, Tensor, list[bool]], tuple[Tensor | None, ...]]


def triton_backend(place: int, plan: Plan) -> Backend:
    """Return the Triton kernels with one of their plans."""
    return Backend(
        f"triton {place}",
        functools.partial(launch_forward, plan=plan),
        functools.partial(launch_backward, plan=plan),
    )


def _flash_forward(call: Call) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        call.q, call.k, call.v, 0.0, call.causal, scale=call.scale
    )
    return out, lse


def _flash_backward(
    call: Call, out: Tensor, lse: Tensor, dout: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    seed, offset = _no_dropout(call.q.device)
    lengths = call.q.shape[2], call.k.shape[2]
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        dout,
        call.q,
        call.k,
        call.v,
        out,
        lse,
        None,
        None,
        *lengths,
        0.0,
        call.causal,
        seed,
        offset,
        scale=call.scale,
    )


def _cudnn_forward(call: Call) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        call.q, call.k, call.v, None, True, 0.0, call.causal, scale=call.scale
    )
    return out, lse.reshape(call.q.shape[:-1])


def _cudnn_backward(
    call: Call, out: Tensor, lse: Tensor, dout: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    seed, offset = _no_dropout(call.q.device)
    lengths = call.q.shape[2], call.k.shape[2]
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout,
        call.q,
        call.k,
        call.v,
        out,
        lse.unsqueeze(-1),
        seed,
        offset,
        None,
        None,
        None,
        *lengths,
        0.0,
        call.causal,
        scale=call.scale,
    )


def _efficient_forward(call: Call) -> tuple[Tensor, Tensor]:
    k, v = (_for_each_head(x, call.q) for x in (call.k, call.v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        call.q, k, v, None, True, 0.0, call.causal, scale=call.scale
    )
    return out, lse[..., : call.q.shape[2]]


def _efficient_backward(
    call: Call, out: Tensor, lse: Tensor, dout: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    k, v = (_for_each_head(x, call.q) for x in (call.k, call.v))
    seed, offset = _no_dropout(call.q.device)
    missing = -lse.shape[-1] % EFFICIENT_ROWS
    lse = torch.nn.functional.pad(lse, (0, missing), value=math.inf)
    mask = [*needs[:3], False]
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        dout, call.q, k, v, None, out, lse, seed, offset, 0.0, mask, call.causal, scale=call.scale
    )
    return dq, *(
        _summed_heads(x, call.k) if needed else None for x, needed in zip((dk, dv), mask[1:3], strict=True)
    )


def _for_each_head(x: Tensor, q: Tensor) -> Tensor:
    """Return keys or values repeated for each head of q that reads them."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _summed_heads(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient if gradient.shape[1] == x.shape[1] else gradient.unflatten(1, (x.shape[1], -1)).sum(2)


@functools.cache
def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the state of the random numbers that no dropout draws; nobody writes to it."""
    return torch.zeros((), dtype=torch.int64, device=device), torch.zeros(
        (), dtype=torch.int64, device=device
    )


@functools.cache
def _is_new(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


FLASH = Backend("flash", _flash_forward, _flash_backward)
CUDNN = Backend("cudnn", _cudnn_forward, _cudnn_backward)
EFFICIENT = Backend("efficient", _efficient_forward, _efficient_backward)
PLAIN = Backend("plain torch", plain_forward, plain_backward)


def find_candidates(call: Call) -> list[Backend]:
    """Return the backends that compute `call`, the likeliest first; plain torch only where there is no other."""
    if is_served_by_torch(call):
        if call.q.dtype == torch.float32:
            return [EFFICIENT]
        is_cudnn_off = (
            torch.are_deterministic_algorithms_enabled() or not torch.backends.cuda.cudnn_sdp_enabled()
        )
        return [FLASH] if is_cudnn_off else [CUDNN, FLASH]
    if is_served_by_triton(call):
        plans = plans_of(call)
        # In fp32 there is little to win, and each plan takes seconds to compile.
        plans = plans[:1] if call.q.dtype == torch.float32 else plans
        return [triton_backend(place, plan) for place, plan in enumerate(plans)]
    return [PLAIN]


def is_served_by_triton(call: Call) -> bool:
    """Return whether the kernels compute `call`; compiled for devices before 8.0 they take all memory for stack."""
    is_narrow = max(call.q.shape[-1], call.v.shape[-1]) <= MOST_WIDTH
    float_mask = None if call.mask is None or call.mask.dtype == torch.bool else call.mask
    has_intervals = call.mask is None or call.intervals is not None
    is_new = _is_new(call.q.device)
    return (
        is_new and is_narrow and has_intervals and can_launch(call.q, call.k, call.v, call.sinks, float_mask)
    )


def is_served_by_torch(call: Call) -> bool:
    """Return whether torch's flash and cuDNN attention compute `call`, for the causal masks that all agree on."""
    if call.mask is not None or call.sinks is not None or call.softcap or call.q.dtype not in DTYPES:
        return False
    (batch, heads, num_queries, width), num_keys = call.q.shape, call.k.shape[2]
    if call.causal and num_queries != num_keys:
        return False
    is_regular = width == call.v.shape[-1] and width % 8 == 0 and width <= MOST_WIDTH
    is_dense = all(x.stride(-1) == 1 for x in (call.q, call.k, call.v))
    is_new = _is_new(call.q.device)
    return is_regular and is_dense and is_new and 0 not in (batch, heads, num_queries, num_keys)


def still_serves(backend: Backend, call: Call) -> bool:
    """Return whether a backend that was chosen for one call computes another of its kind."""
    if backend in (FLASH, CUDNN, EFFICIENT):
        return is_served_by_torch(call)
    return backend is PLAIN or is_served_by_triton(call)
