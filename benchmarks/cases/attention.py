"""Sizes and contestants of `attention`: masks as models hand them over, against torch's own attention and flex."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from benchmarks.cases.case import DEVICE, Case, Function, tensor
from fxopt.kernels.attention import attention

BATCH, LENGTH, WINDOW = 2, 4096, 1024
CHECKED_LENGTH = 2048  # where a matrix of scores in float64 takes 17 GB
MOST_CHECKED_HEADS = 32
EVERY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Form:
    """One attention: heads of queries and of keys, their width, the mask's kind, softcap (0: none), sinks."""

    heads: int
    key_heads: int
    width: int
    kind: str
    softcap: float = 0.0
    sinks: bool = False

    @property
    def scale(self) -> float:
        """What the products are multiplied by."""
        return 1 / math.sqrt(self.width)

    @property
    def is_plain(self) -> bool:
        """Whether torch's own attention can compute it."""
        return not self.softcap and not self.sinks

    def __str__(self) -> str:
        extras = f"{', softcap' if self.softcap else ''}{', sinks' if self.sinks else ''}"
        return f"{BATCH} x {LENGTH}, {self.heads}/{self.key_heads} of {self.width}, {self.kind}{extras}"


FORMS = (
    Form(28, 4, 128, "causal"),
    Form(32, 8, 64, "causal"),
    Form(28, 4, 128, "padded"),
    Form(28, 4, 128, "sliding"),
    Form(8, 4, 256, "causal", softcap=50.0),
    Form(8, 4, 256, "sliding", softcap=50.0),
    Form(64, 8, 64, "causal", sinks=True),
    Form(64, 8, 64, "sliding", sinks=True),
)
"""Two of models without a mask, one padded and one sliding; as gemma2 (softcap) and as gpt-oss (sinks)."""


@functools.cache
def make_mask(length: int, kind: str) -> torch.Tensor:
    """Return a causal bool mask [2, 1, length, length], the first sequence padded by a third, or sliding.

    Padded queries see themselves, so that no row is empty: contestants differ in what they make of these.
    """
    at = torch.arange(length, device=DEVICE)
    seen = at[:, None] >= at
    if kind == "sliding":
        seen = seen & (at[:, None] - at < WINDOW)
    mask = seen.expand(BATCH, 1, -1, -1).clone()
    if kind == "padded":
        mask[0, :, :, : length // 3] = False
    return mask | torch.eye(length, dtype=torch.bool, device=DEVICE)


@functools.cache
def make_added(length: int, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the same mask as what is added to scores."""
    mask = make_mask(length, kind)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


@functools.cache
def make_blocks(length: int, kind: str) -> BlockMask:
    """Return the same mask as flex_attention takes it."""
    starts = torch.tensor([length // 3 if kind == "padded" else 0, 0], device=DEVICE)

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        seen = (query >= key) & (key >= starts[batch])
        if kind == "sliding":
            seen = seen & (query - key < WINDOW)
        return seen | (query == key)

    return create_block_mask(sees, BATCH, None, length, length, device=DEVICE)


def spell(form: Form) -> Function:
    """Return attention as transformers spells it."""

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        scores = q @ k.transpose(2, 3) * form.scale
        if form.softcap:
            scores = torch.tanh(scores / form.softcap) * form.softcap
        scores = scores + make_added(q.shape[2], form.kind, q.dtype)
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return weights[..., : k.shape[2]] @ v

    return run


def fuse(form: Form) -> Function:
    """Return the op, given its mask as models give it: none, bool, or added where the model spells attention out."""

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        if form.is_plain and form.kind == "causal":
            return attention(q, k, v, causal=True, scale=form.scale)
        length = q.shape[2]
        mask = make_mask(length, form.kind) if form.is_plain else make_added(length, form.kind, q.dtype)
        return attention(q, k, v, mask, sinks, scale=form.scale, softcap=form.softcap)

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


def call_flex(form: Form) -> Function:
    """Return torch's flex_attention with a block mask, the softcap as a change of scores, sinks after it."""
    flex: Any = torch.compile(flex_attention, dynamic=False)

    def cap(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return torch.tanh(score / form.softcap) * form.softcap

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        options: dict[str, Any] = {"enable_gqa": True, "scale": form.scale}
        options["score_mod"] = cap if form.softcap else None
        options["block_mask"] = make_blocks(q.shape[2], form.kind)
        if sinks is None:
            return flex(q, k, v, **options)
        out, aux = flex(q, k, v, return_aux=AuxRequest(lse=True), **options)
        # A key without a value takes its share of the weights.
        rest = torch.sigmoid(aux.lse - sinks.float().view(1, -1, 1)).unsqueeze(-1)
        return out * rest.to(out.dtype)

    return run


def make_cases() -> list[Case]:
    """Return the sizes timed of `attention`."""
    return [_make_case(form) for form in FORMS]


def _make_case(form: Form) -> Case:
    spelled = spell(form)
    contestants: dict[str, Function] = {"fxopt": fuse(form), "eager": spelled}
    if form.is_plain:
        contestants["sdpa"] = call_torch(None, form.kind)
        contestants["cudnn"] = call_torch(SDPBackend.CUDNN_ATTENTION, form.kind)
        last = SDPBackend.FLASH_ATTENTION if form.kind == "causal" else SDPBackend.EFFICIENT_ATTENTION
        contestants["flash" if form.kind == "causal" else "efficient"] = call_torch(last, form.kind)
    else:
        contestants["compile"] = torch.compile(spelled, dynamic=False)
    contestants["flex"] = call_flex(form)

    def make(length: int) -> list[torch.Tensor]:
        sizes = (form.heads, form.key_heads, form.key_heads)
        heads = [
            tensor(BATCH, length, count, form.width).transpose(1, 2).detach().requires_grad_()
            for count in sizes
        ]
        return [*heads, tensor(form.heads)] if form.sinks else heads

    checked = CHECKED_LENGTH if form.heads > MOST_CHECKED_HEADS else 0
    return Case("attention", str(form), make, contestants, rows=LENGTH, checked_rows=checked)
