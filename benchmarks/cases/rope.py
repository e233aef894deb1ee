"""Sizes and contestants of `rope`."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases.case import ROWS, Case, Function, find_liger, tensor
from fxopt.kernels import rope

BATCH = 2
SIZES = ((28, 4, 128), (32, 8, 64), (16, 8, 256))
"""Heads of q, heads of k, and their size: of Qwen2.5-7B, Llama-3.2-1B and Gemma2-9B."""
Pair = tuple[torch.Tensor, torch.Tensor]


def make_cases() -> list[Case]:
    """Return the sizes timed of `rope`."""

    def embed(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    def eager(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return embed(q.transpose(1, 2), cos, sin), embed(k.transpose(1, 2), cos, sin)

    def ours(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return rope.rope(q.transpose(1, 2), k.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1))

    liger = find_liger()
    cases = []
    for q_heads, k_heads, size in SIZES:
        contestants: dict[str, Function] = {
            "fxopt": ours,
            "eager": eager,
            "compile": torch.compile(eager, dynamic=False),
        }
        if liger is not None:
            contestants["liger"] = lambda q, k, cos, sin: liger.liger_rope(
                q.transpose(1, 2), k.transpose(1, 2), cos, sin
            )

        def make(
            rows: int, heads: tuple[int, int] = (q_heads, k_heads), size: int = size
        ) -> list[torch.Tensor]:
            tokens = rows // BATCH
            angles = torch.outer(torch.arange(tokens), 10000.0 ** -(torch.arange(size // 2) / (size // 2)))
            angles = torch.cat((angles, angles), dim=-1)[None].cuda()
            tables = [angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)]
            return [*(tensor(BATCH, tokens, each, size) for each in heads), *tables]

        num_bytes = 2 * ROWS * (q_heads + k_heads) * size * 2
        name = f"{ROWS} x ({q_heads} + {k_heads}) x {size}"
        cases.append(Case("rope", name, make, contestants, num_bytes, num_bytes))
    return cases
