"""Sizes and contestants of `route`: the routers of Mixtral 8x7B, Qwen3-MoE, GPT-OSS and DeepSeek-V3 at 8192 tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.cases.case import DEVICE, ROWS, Case, Function, tensor
from fxopt.kernels.route import route


def mixtral(logits: torch.Tensor) -> torch.Tensor:
    weights, _ = F.softmax(logits.float(), dim=-1).topk(2, dim=-1)
    return (weights / weights.sum(-1, keepdim=True)).to(logits.dtype)


def qwen3(logits: torch.Tensor) -> torch.Tensor:
    weights, _ = F.softmax(logits, dim=-1, dtype=torch.float32).topk(8, dim=-1)
    return (weights / weights.sum(-1, keepdim=True)).to(logits.dtype)


def gpt_oss(logits: torch.Tensor) -> torch.Tensor:
    return F.softmax(logits.topk(4, dim=-1)[0], dim=-1)


def deepseek_v3(logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    scores = logits.float().sigmoid()
    values = scores + bias
    groups = values.view(-1, 8, 32).topk(2, dim=-1)[0].sum(-1)
    best = groups.topk(4, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(groups).scatter(1, best, 1).unsqueeze(-1).expand(-1, 8, 32).reshape(-1, 256)
    ids = values.masked_fill(~mask.bool(), -torch.inf).topk(8, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5


CHECKED_ROWS = 512
NORMED: dict[str, Any] = dict(normalizes=True)
GROUPED: dict[str, Any] = dict(group_size=32, num_kept=4, group_choices=2, eps=1e-20, scale=2.5)
FORMS: dict[str, tuple[int, Function, dict[str, Any]]] = {
    "Mixtral": (8, mixtral, dict(score="softmax", num_choices=2, dtype=torch.bfloat16) | NORMED),
    "Qwen3-MoE": (128, qwen3, dict(score="softmax", num_choices=8, dtype=torch.bfloat16) | NORMED),
    "GPT-OSS": (
        128,
        gpt_oss,
        dict(
            score="softmax",
            num_choices=4,
            by_logits=True,
            scores_after=True,
            scores_dtype=torch.bfloat16,
            dtype=torch.bfloat16,
        ),
    ),
    "DeepSeek-V3": (256, deepseek_v3, dict(score="sigmoid", num_choices=8) | NORMED | GROUPED),
}
"""Experts, the router in plain torch, and the attributes of the op."""


def make_cases() -> list[Case]:
    """Return the routers; what an op reads and writes is small, and launches are what stock spends."""
    return [make_case(name) for name in FORMS]


def make_case(name: str) -> Case:
    """Return the case of one router: its weights are compared, in the order of the choices."""
    num_experts, eager, attributes = FORMS[name]

    def make(rows: int) -> list[torch.Tensor]:
        # No two of a token's logits are equal, so that float64 chooses alike.
        order = torch.rand(rows, num_experts, device=DEVICE).argsort(-1)
        logits = ((order - num_experts // 2) / 32).bfloat16().requires_grad_()
        return (
            [logits, tensor(num_experts, scale=0.1, grad=False)] if "group_size" in attributes else [logits]
        )

    contestants: dict[str, Function] = {
        "fxopt": lambda *inputs: route(*inputs, **attributes)[0],
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    return Case("route", f"{ROWS} x {num_experts} {name}", make, contestants, checked_rows=CHECKED_ROWS)
