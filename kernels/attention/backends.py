"""Which implementation computes an attention on a GPU: measured once per kind of call, then remembered.

Candidates are torch's cuDNN and flash attention where they compute this call (no mask tensor, softcap, sinks), and
elsewhere the Triton kernels with each of their plans: to compile these beside for a call that torch serves took 20 s
of a first step on an H100, for nothing. All are timed, forward and backward, on random inputs of the shapes,
strides and mask of the call; one whose results differ from the first one's is left out. A call in a CUDA graph
capture cannot be timed: there the first candidate that serves runs, until a call outside has measured.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.attention.launches import (
    MOST_WIDTH,
    Plan,
    launch_backward,
    launch_forward,
    plans_of,
    with_dense_rows,
)
from fxopt.kernels.attention.reference import as_heads_last, plain_backward, plain_forward
from fxopt.kernels.launch import can_launch, next_power_of_two, warn_once

ROUNDS = 5
AGREEMENT = 0.03  # relative; rounding in 16-bit dtypes stays below 0.01, a wrong mask is above 0.1
OLDEST_CAPABILITY = (8, 0)
HALVES = (torch.float16, torch.bfloat16)
Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """The inputs of one attention, gradients left out."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    intervals: Tensor | None
    reads: Tensor | None
    sinks: Tensor | None
    causal: bool
    scale: float
    softcap: float
    safe: bool


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation: its name, and its two passes."""

    name: str
    forward: Callable[[Call], tuple[Tensor, Tensor]]
    backward: Callable[[Call, Tensor, Tensor, Tensor, list[bool]], tuple[Tensor | None, ...]]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for one kind of call: ms of forward and backward per candidate, or why it was left out."""

    backend: Backend
    ms: dict[str, float]
    left_out: dict[str, str]


_choices: dict[Key, Choice] = {}


def chosen_backends() -> dict[str, dict[str, Any]]:
    """Return per kind of call met in this process the backend chosen, and the ms of each candidate.

    >>> chosen_backends()  # no call on a GPU yet
    {}
    """
    return {
        _describe(key): {"chosen": choice.backend.name, "ms": choice.ms, "left_out": choice.left_out}
        for key, choice in _choices.items()
    }


def key_of(call: Call) -> Key:
    """Return what a choice depends on; lengths and batch by their power of two."""
    batch, heads, num_queries, width = call.q.shape
    mask = None if call.mask is None else (str(call.mask.dtype), call.mask.shape[1] > 1)
    return (
        next_power_of_two(batch),
        heads,
        call.k.shape[1],
        next_power_of_two(num_queries),
        next_power_of_two(call.k.shape[2]),
        num_queries == call.k.shape[2],
        width,
        call.v.shape[3],
        call.q.dtype,
        "causal" if call.causal else mask,
        call.softcap != 0,
        call.sinks is not None,
        call.q.device.index,
        torch.are_deterministic_algorithms_enabled(),
    )


def _describe(key: Key) -> str:
    (
        batch,
        heads,
        key_heads,
        queries,
        keys,
        _,
        width,
        _,
        dtype,
        mask,
        softcap,
        sinks,
        device,
        deterministic,
    ) = key
    kind = mask if mask == "causal" else "no mask" if mask is None else f"mask of {mask[0]}"
    named = {"softcap": softcap, "sinks": sinks, "deterministic": deterministic}
    extras = "".join(f", {name}" for name, is_so in named.items() if is_so)
    shape = f"{batch} x {queries} x {keys}, {heads}/{key_heads} heads of {width}"
    return f"{shape}, {str(dtype).removeprefix('torch.')}, {kind}{extras}, cuda:{device}"


def _triton_backend(place: int, plan: Plan) -> Backend:
    def forward(call: Call) -> tuple[Tensor, Tensor]:
        return launch_forward(
            call.q,
            call.k,
            call.v,
            call.mask,
            call.intervals,
            call.reads,
            call.sinks,
            call.causal,
            call.scale,
            call.softcap,
            plan,
        )

    def backward(
        call: Call, out: Tensor, lse: Tensor, dout: Tensor, needs: list[bool]
    ) -> tuple[Tensor | None, ...]:
        return launch_backward(
            dout,
            call.q,
            call.k,
            call.v,
            out,
            lse,
            call.mask,
            call.intervals,
            call.reads,
            call.sinks,
            call.causal,
            call.scale,
            call.softcap,
            needs,
            plan,
        )

    return Backend(f"triton {place}", forward, backward)


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


def _plain_forward(call: Call) -> tuple[Tensor, Tensor]:
    inputs = call.q, call.k, call.v, call.mask, call.intervals, call.reads, call.sinks
    return plain_forward(*inputs, call.causal, call.scale, call.softcap, call.safe)


def _plain_backward(
    call: Call, out: Tensor, lse: Tensor, dout: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    rest = call.mask, call.intervals, call.reads, call.sinks, call.causal, call.scale, call.softcap, call.safe
    return plain_backward(dout, call.q, call.k, call.v, out, lse, *rest, needs)


PLAIN = Backend("plain torch", _plain_forward, _plain_backward)


def find_candidates(call: Call) -> list[Backend]:
    """Return the backends that compute `call`, the likeliest first; plain torch only where there is no other."""
    if is_served_by_torch(call):
        return [FLASH] if torch.are_deterministic_algorithms_enabled() else [CUDNN, FLASH]
    if is_served_by_triton(call):
        plans = plans_of(call.q, call.v)
        # In fp32 there is little to win, and each plan takes seconds to compile.
        plans = plans[:1] if call.q.dtype == torch.float32 else plans
        return [_triton_backend(place, plan) for place, plan in enumerate(plans)]
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
    if call.mask is not None or call.sinks is not None or call.softcap or call.q.dtype not in HALVES:
        return False
    (batch, heads, num_queries, width), num_keys = call.q.shape, call.k.shape[2]
    if call.causal and num_queries != num_keys:
        return False
    is_regular = width == call.v.shape[-1] and width % 8 == 0 and width <= MOST_WIDTH
    is_dense = all(x.stride(-1) == 1 for x in (call.q, call.k, call.v))
    is_new = _is_new(call.q.device)
    return is_regular and is_dense and is_new and 0 not in (batch, heads, num_queries, num_keys)


def choose(call: Call) -> Backend:
    """Return the backend for `call`, measured at the first call of its kind."""
    key = key_of(call)
    known = _choices.get(key)
    if known is not None and _still_serves(known.backend, call):
        return known.backend
    candidates = find_candidates(call)
    if torch.cuda.is_current_stream_capturing():
        return candidates[0]
    _choices[key] = Choice(PLAIN, {}, {}) if candidates == [PLAIN] else measure(call, candidates)
    return _choices[key].backend


def _still_serves(backend: Backend, call: Call) -> bool:
    if backend in (FLASH, CUDNN):
        return is_served_by_torch(call)
    return backend is PLAIN or is_served_by_triton(call)


def measure(call: Call, candidates: list[Backend]) -> Choice:
    """Return the fastest of `candidates` on random inputs like those of `call`, all timed in turn."""
    call = dataclasses.replace(
        call,
        q=_random_like(call.q),
        k=_random_like(call.k),
        v=_random_like(call.v),
        sinks=None if call.sinks is None else _random_like(call.sinks),
    )
    left_out: dict[str, str] = {}
    first: tuple[str, list[Tensor]] | None = None
    served: list[Backend] = []
    for backend in candidates:
        try:
            _, results = _run(backend, call)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            left_out[backend.name] = text.splitlines()[0]
            continue
        first = first or (backend.name, results)
        worst = max(map(_difference, results, first[1]))
        if worst <= AGREEMENT:
            served.append(backend)
        else:
            left_out[backend.name] = f"differs from {first[0]} by {worst:.1e}"
    first = None
    times: dict[str, list[float]] = {backend.name: [] for backend in served}
    for _ in range(ROUNDS):
        for backend in served:
            times[backend.name].append(_run(backend, call)[0])
    ms = {name: statistics.median(values) for name, values in times.items()}
    if not served:
        warn_once(f"fxopt::attention: plain torch runs instead, every backend failed: {left_out}")
        return Choice(PLAIN, {}, left_out)
    return Choice(min(served, key=lambda backend: ms[backend.name]), ms, left_out)


def _random_like(x: Tensor) -> Tensor:
    """Return normal numbers in the form of `x`, drawn without touching the user's random state."""
    generator = torch.Generator(x.device).manual_seed(x.dim())
    dense = torch.empty_like(x)
    return dense.normal_(generator=generator)


def _run(backend: Backend, call: Call) -> tuple[float, list[Tensor]]:
    """Return the ms of one forward and backward pass, and all results."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    out, lse = backend.forward(call)
    needs = [True, True, True, call.sinks is not None]
    gradients = backend.backward(call, out, lse, _gradient_like(out), needs)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), [out, *(value for value in gradients if value is not None)]


def _gradient_like(out: Tensor) -> Tensor:
    # Any fixed numbers do: what they are changes neither the time nor whether candidates agree.
    return out.detach().flip(-1)


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.float().nan_to_num(), b.float().nan_to_num()  # a row without a key may be NaN by right
    return float((a - b).norm() / b.norm().clamp_min(1e-20))


def fused_forward(
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
    """Return the attention and its lse, by the backend chosen for calls like this."""
    q, k, v = map(with_dense_rows, (q, k, v))
    call = Call(q, k, v, mask, intervals, reads, sinks, causal, scale, softcap, safe)
    out, lse = choose(call).forward(call)
    return as_heads_last(out), lse.contiguous()


def fused_backward(
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
    """Return the gradients that are needed, by the backend that ran forward."""
    q, k, v = map(with_dense_rows, (q, k, v))
    call = Call(q, k, v, mask, intervals, reads, sinks, causal, scale, softcap, safe)
    found = choose(call).backward(call, out, lse, with_dense_rows(dout), needs)
    dq, dk, dv, dsinks = (*found, *[None] * (4 - len(found)))
    need_q, need_k, need_v, _ = needs
    return (
        as_heads_last(dq) if need_q and dq is not None else None,
        as_heads_last(dk) if need_k and dk is not None else None,
        as_heads_last(dv) if need_v and dv is not None else None,
        dsinks,
    )
