"""Sizes and contestants of `norm_rope`."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases.case import ROWS, Case, Function, tensor
from fxopt.kernels import norm_rope

BATCH = 2
SIZES = ((32, 8, 128, True), (8, 4, 256, True), (32, 32, 128, False))
"""Heads of q, heads of k, their size, and whether each is normed: of Qwen3-8B, Gemma3-4B and OLMo2-7B."""
Pair = tuple[torch.Tensor, torch.Tensor]


def make_case(q_heads: int, k_heads: int, size: int, per_head: bool) -> Case:
    """Return one size; the inputs are projections cut into heads, as models have them."""

    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        rows = (x if per_head else x.flatten(-2)).float()
        n = w * (rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return n.view(x.shape).transpose(1, 2)

    def embed(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    def eager(*tensors: torch.Tensor) -> Pair:
        q, k, q_w, k_w, cos, sin = tensors
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return embed(norm(q, q_w), cos, sin), embed(norm(k, k_w), cos, sin)

    def ours(*tensors: torch.Tensor) -> Any:
        q, k, q_w, k_w, cos, sin = tensors
        heads = q.transpose(1, 2), k.transpose(1, 2)
        tables = cos.unsqueeze(1), sin.unsqueeze(1)
        return norm_rope.norm_rope(*heads, q_w, k_w, *tables, eps=1e-6, per_head=per_head)

    def make(rows: int) -> list[torch.Tensor]:
        tokens = rows // BATCH
        angles = torch.outer(torch.arange(tokens), 10000.0 ** -(torch.arange(size // 2) / (size // 2)))
        angles = torch.cat((angles, angles), dim=-1)[None].cuda()
        heads = (q_heads, k_heads)
        weights = [tensor(size if per_head else each * size) for each in heads]
        tables = [angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)]
        return [*(tensor(BATCH, tokens, each, size) for each in heads), *weights, *tables]

    contestants: dict[str, Function] = {
        "fxopt": ours,
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    num_bytes = ROWS * (q_heads + k_heads) * size * 2
    name = f"{ROWS} x ({q_heads} + {k_heads}) x {size}, normed by {'head' if per_head else 'token'}"
    return Case("norm_rope", name, make, contestants, 2 * num_bytes, 3 * num_bytes)


def make_cases() -> list[Case]:
    """Return the sizes timed of `norm_rope`."""
    return [make_case(*sizes) for sizes in SIZES]
