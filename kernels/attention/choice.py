"""Which backend computes an attention on a GPU: measured once per kind of call, then remembered.

Candidates are torch's cuDNN and flash attention, in float32 its memory-efficient one, where they compute this call (no
mask tensor, softcap, sinks), and elsewhere the Triton kernels with each of their plans: to compile these beside for a
call that torch serves took 20 s of a first step on an H100, for nothing. All are timed, forward and backward, on random
inputs of the shapes, strides and mask of the call; one whose results differ from the first one's is left out. A call
in a CUDA graph capture cannot be timed: there the first candidate that serves runs, until a call outside has measured.
Small calls are not timed: there is nothing to win, and cuDNN builds a plan of each shape in 0.8 s a pass. It keeps
plans by thread, so the backward passes are timed in the thread that will run them. Where torch's switch turns its
attention off, as proofs do for the same reason, it is no candidate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.attention.backends import (
    CUDNN,
    EFFICIENT,
    FLASH,
    PLAIN,
    Backend,
    find_candidates,
    still_serves,
)
from fxopt.kernels.attention.call import Call
from fxopt.kernels.attention.launches import with_dense_inputs, with_dense_rows
from fxopt.kernels.attention.reference import as_heads_last, is_for_torch_on_cpu, pick_gradients
from fxopt.kernels.launch import next_power_of_two, warn_once
from fxopt.kernels.launcher import is_rehearsal, run_as_backward

ROUNDS = 5
LONG_MS = 200.0
"""Of calls this long one round says enough: five take minutes at 262144 tokens."""
AGREEMENT = 0.03  # relative; rounding in 16-bit dtypes stays below 0.01, a wrong mask is above 0.1
SMALL = 2**24  # products of a query with a key, times the width: a few microseconds on any GPU
NOT_YET = "chosen at the first call"


class Kind(NamedTuple):
    """What a choice depends on: lengths and batch by their power of two, None where they are symbolic."""

    batch: int | None
    heads: int
    key_heads: int
    queries: int | None
    keys: int | None
    is_square: bool | None
    width: int
    value_width: int
    dtype: torch.dtype
    mask: str
    softcap: bool
    sinks: bool
    device: int | None
    cudnn: bool
    deterministic: bool

    @property
    def is_small(self) -> bool:
        """Whether backends cannot differ by much."""
        batch, queries, keys = self.batch or 1, self.queries or 1, self.keys or 1
        return batch * self.heads * queries * keys * max(self.width, self.value_width) <= SMALL

    @property
    def length_text(self) -> str:
        """The batch and the lengths."""
        return f"{self.batch} x {self.queries} x {self.keys}"

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.key_heads} heads of {self.width}"
        named = {name: getattr(self, name) for name in ("softcap", "sinks", "deterministic")}
        extras = "".join(f", {name}" for name, is_so in named.items() if is_so)
        extras += "" if self.cudnn else ", cuDNN switched off"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.length_text}, {heads}, {dtype}, {self.mask}{extras}, cuda:{self.device}"

    def covers(self, other: Kind) -> bool:
        """Return whether `other` is this kind with its symbolic sizes filled in, in any mode of determinism."""
        pairs = zip(self[:-1], other[:-1], strict=True)
        return all(mine is None or mine == theirs for mine, theirs in pairs)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for one kind of call: ms of forward and backward per candidate, or why it was left out."""

    backend: Backend
    ms: dict[str, float]
    left_out: dict[str, str]


_choices: dict[Kind, Choice] = {}


def chosen_backends() -> dict[str, dict[str, Any]]:
    """Return per kind of call met in this process the backend chosen, and the ms of each candidate.

    >>> chosen_backends()  # no call on a GPU yet
    {}
    """
    return {
        str(kind): {"chosen": choice.backend.name, "ms": choice.ms, "left_out": choice.left_out}
        for kind, choice in _choices.items()
    }


def kind_of(call: Call) -> Kind:
    """Return the kind of a call; its tensors may be fake."""
    batch, heads, num_queries, width = call.q.shape
    num_keys = call.k.shape[2]
    is_fixed = isinstance(num_queries, int) and isinstance(num_keys, int)
    return Kind(
        _rounded_up(batch),
        heads,
        call.k.shape[1],
        _rounded_up(num_queries),
        _rounded_up(num_keys),
        num_queries == num_keys if is_fixed else None,
        width,
        call.v.shape[3],
        call.q.dtype,
        _mask_kind(call),
        call.softcap != 0,
        call.sinks is not None,
        call.q.device.index,
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _rounded_up(size: Any) -> int | None:
    return next_power_of_two(size) if isinstance(size, int) else None


def _mask_kind(call: Call) -> str:
    mask = call.mask
    if mask is None:
        return "causal" if call.causal else "no mask"
    per_head = " per head" if mask.dim() >= 3 and mask.shape[-3] > 1 else ""
    return f"mask of {mask.dtype}{per_head}"


@dataclasses.dataclass(frozen=True)
class Server:
    """Says which backend serves calls of one kind, as far as this process has met any; holds no tensor."""

    kind: Kind
    fixed: str

    def __call__(self) -> str:
        """Return its name and what each candidate took; of several kinds, where sizes are symbolic, each."""
        if self.fixed:
            return self.fixed
        met = {kind: choice for kind, choice in _choices.items() if self.kind.covers(kind)}
        several = len({choice.backend.name for choice in met.values()}) > 1
        texts = [_text_of(kind, choice) for kind, choice in met.items()]
        return "; ".join(texts if several else texts[-1:]) or NOT_YET


def _text_of(kind: Kind, choice: Choice) -> str:
    times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in choice.ms.items())
    return f"{choice.backend.name} ({kind.length_text}{times and f': {times}'})"


def find_server(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    causal: bool = False,
    softcap: float = 0.0,
) -> Server:
    """Return what tells, when called, the backend of attention on tensors like these, real or fake.

    >>> x = torch.empty(1, 2, 4, 8)
    >>> find_server(x, x, x, causal=True)()
    "torch's flash attention for CPUs"
    """
    call = Call(q, k, v, mask, None, None, sinks, causal, 1.0, softcap, True)
    on_cpu = "torch's flash attention for CPUs" if is_for_torch_on_cpu(call) else PLAIN.name
    return Server(kind_of(call), on_cpu if q.device.type == "cpu" else "")


def choose(call: Call) -> Backend:
    """Return the backend for `call`, measured at the first call of its kind."""
    kind = kind_of(call)
    known = _choices.get(kind)
    if known is not None and still_serves(known.backend, call):
        return known.backend
    candidates = find_candidates(call)
    if torch.cuda.is_current_stream_capturing():
        return candidates[0]
    if is_rehearsal() and candidates[0] not in (CUDNN, FLASH, EFFICIENT, PLAIN):
        for backend in candidates:
            _run(backend, call)  # compiles its kernels; there are no results to compare
        return candidates[0]
    if kind.is_small or candidates == [PLAIN]:
        _choices[kind] = Choice(FLASH if FLASH in candidates else candidates[0], {}, {})
    else:
        _choices[kind] = measure(call, candidates)
    return _choices[kind].backend


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
    # Within a backward pass this is the thread itself that would build the plan of backward, and wait for itself.
    if CUDNN in candidates and threading.current_thread() is threading.main_thread():
        _build_plans(call)
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
        if served and min(values[0] for values in times.values()) > LONG_MS:
            break
    ms = {name: statistics.median(values) for name, values in times.items()}
    if not served:
        warn_once(f"fxopt::attention: plain torch runs instead, every backend failed: {left_out}")
        return Choice(PLAIN, {}, left_out)
    return Choice(min(served, key=lambda backend: ms[backend.name]), ms, left_out)


def _build_plans(call: Call) -> None:
    """Have cuDNN build its plans of both passes side by side, each in the thread that will run it.

    What comes out is of no use. An error is left to the run that meets it.
    """
    out, device = torch.zeros_like(call.q), call.q.device
    lse = out.new_zeros(call.q.shape[:-1], dtype=torch.float32)

    def build_backward() -> None:
        CUDNN.backward(call, out, lse, _gradient_like(out), [True, True, True, False])

    def start() -> None:
        with torch.cuda.device(device):
            run_as_backward(build_backward, device)
            torch.cuda.current_stream().synchronize()

    torch.cuda.current_stream(device).synchronize()  # the other thread may be on another stream
    with ThreadPoolExecutor(1, "fxopt-cudnn") as aside:
        backward = aside.submit(start)
        with contextlib.suppress(Exception):
            CUDNN.forward(call)
        backward.exception()


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
    results = [out]

    def run_backward() -> None:
        gradients = backend.backward(call, out, lse, _gradient_like(out), needs)
        results.extend(value for value in gradients if value is not None)
        end.record()

    run_as_backward(run_backward, out.device)
    end.synchronize()
    return begin.elapsed_time(end), results


def _gradient_like(out: Tensor) -> Tensor:
    # Any fixed numbers do: what they are changes neither the time nor whether candidates agree.
    return out.detach().flip(-1)


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.float().nan_to_num(), b.float().nan_to_num()  # a row without a key may be NaN by right
    return float((a - b).norm() / b.norm().clamp_min(1e-20))


def fused_forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return the attention and its lse, by the backend chosen for calls like this."""
    call = with_dense_inputs(call)
    out, lse = choose(call).forward(call)
    return as_heads_last(out), lse.contiguous()


def fused_backward(
    call: Call, out: Tensor, lse: Tensor, dout: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients that are needed, by the backend that ran forward."""
    call = with_dense_inputs(call)
    found = _find_chosen(call).backward(call, out, lse, with_dense_rows(dout), needs)
    return pick_gradients(found, needs)


def _find_chosen(call: Call) -> Backend:
    """Return the backend that was chosen for the forward pass of `call`, whatever torch's switch of cuDNN says now."""
    kind = kind_of(call)
    for each in (kind, kind._replace(cudnn=not kind.cudnn)):
        known = _choices.get(each)
        if known is not None and still_serves(known.backend, call):
            return known.backend
    return choose(call)
