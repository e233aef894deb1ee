"""Sizes and contestants of `attention`."""

from __future__ import annotations

import functools
import math

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases.case import Case, Function, tensor
from fxopt.kernels.attention import attention

BATCH, LENGTH, WINDOW = 2, 4096, 1024
EVERY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@functools.cache
def make_mask(length: int, kind: str) -> torch.Tensor:
    """Return a causal bool mask [2, 1, length, length], the first sequence padded by a third, or sliding.

    Padded queries see themselves, so that no row is empty: contestants differ in what they make of these.
    """
    at = torch.arange(length, device="cuda")
    seen = at[:, None] >= at
    if kind == "sliding":
        seen = seen & (at[:, None] - at < WINDOW)
    mask = seen.expand(BATCH, 1, -1, -1).clone()
    if kind == "padded":
        mask[0, :, :, : length // 3] = False
    return mask | torch.eye(length, dtype=torch.bool, device="cuda")


@functools.cache
def make_added(length: int, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the same mask as what is added to scores."""
    mask = make_mask(length, kind)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def spell(kind: str, softcap: float) -> Function:
    """Return attention as transformers spells it."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + make_added(q.shape[2], kind, q.dtype)
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    return run


def call_torch(backend: SDPBackend | None, kind: str) -> Function:
    """Return torch's attention, by one backend or by its own choice; as transformers, heads repeated with a mask."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = None if kind == "causal" else make_mask(q.shape[2], kind)
        if mask is not None:
            times = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        with sdpa_kernel(EVERY if backend is None else backend):
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, enable_gqa=mask is None
            )

    return run


def make_cases() -> list[Case]:
    """Return the sizes timed of `attention`: two of models, one padded, and a sliding one with a softcap."""
    return [
        _make_case(28, 4, 128, "causal", 0.0),
        _make_case(32, 8, 64, "causal", 0.0),
        _make_case(28, 4, 128, "padded", 0.0),
        _make_case(8, 4, 256, "sliding", 50.0),
    ]


def _make_case(heads: int, key_heads: int, width: int, kind: str, softcap: float) -> Case:
    scale = 1 / math.sqrt(width)

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if kind == "causal":
            return attention(q, k, v, causal=True, scale=scale)
        length = q.shape[2]
        mask = make_added(length, kind, q.dtype) if softcap else make_mask(length, kind)
        return attention(q, k, v, mask, scale=scale, softcap=softcap)

    spelled = spell(kind, softcap)
    contestants: dict[str, Function] = {"fxopt": fused, "eager": spelled}
    if softcap:
        contestants["compile"] = torch.compile(spelled, dynamic=False)
    else:
        contestants["sdpa"] = call_torch(None, kind)
        contestants["cudnn"] = call_torch(SDPBackend.CUDNN_ATTENTION, kind)
        contestants["flash"] = call_torch(SDPBackend.FLASH_ATTENTION, kind)

    def make(length: int) -> list[torch.Tensor]:
        sizes = (heads, key_heads, key_heads)
        return [
            tensor(BATCH, length, count, width).transpose(1, 2).detach().requires_grad_() for count in sizes
        ]

    size = f"{BATCH} x {LENGTH}, {heads}/{key_heads} of {width}, {kind}"
    return Case("attention", size, make, contestants, rows=LENGTH)
