"""Sizes and contestants of `experts`: layers in the shapes of Mixtral 8x7B and DeepSeek-V3, and transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.cases.case import DEVICE, ROWS, Case, Function, tensor
from fxopt.kernels.experts import experts

SHAPES = {"Mixtral 8x7B": (8, 2, 4096, 14336), "DeepSeek-V3": (256, 8, 7168, 2048)}
"""Experts, choices of a token, width, width of an expert."""
CHECKED_ROWS, MOST_CHECKED_EXPERTS = 512, 8
"""The matrices of all experts would not fit in float64: the op is checked with few."""


def make_cases() -> list[Case]:
    """Return both layers, trained in full, and with frozen experts as under an adapter elsewhere."""
    return [make_case(name, trained) for trained in (True, False) for name in SHAPES]


def make_case(name: str, trained: bool) -> Case:
    """Return the case of one layer at 8192 tokens; ids and weights come from a router's logits."""
    all_experts, num_choices, width, inner = SHAPES[name]

    def make(rows: int) -> list[torch.Tensor]:
        num_experts = all_experts if rows == ROWS else min(all_experts, MOST_CHECKED_EXPERTS)
        x = tensor(rows, width)
        probabilities = torch.randn(rows, num_experts, device=DEVICE).softmax(-1)
        weights, ids = probabilities.topk(min(num_choices, num_experts), dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).bfloat16().requires_grad_()
        w_up = tensor(num_experts, 2 * inner, width, scale=width**-0.5, grad=trained)
        w_down = tensor(num_experts, width, inner, scale=inner**-0.5, grad=trained)
        return [x, ids, weights, w_up, w_down]

    def fxopt(
        x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *matrices: torch.Tensor
    ) -> torch.Tensor:
        w_up, w_down = matrices
        return experts(x, ids, weights, w_up.mT, w_down.mT, act="silu")

    stock = find_stock()
    contestants: dict[str, Function] = {
        "fxopt": fxopt,
        "eager": stock,
        "compile": torch.compile(stock, dynamic=False),
    }
    state = "" if trained else " frozen"
    return Case("experts", f"{ROWS} x {name}{state}", make, contestants, checked_rows=CHECKED_ROWS)


def find_stock() -> Function:
    """Return transformers' experts as grouped products, as a function of the same tensors."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    forward: Callable[..., torch.Tensor] = grouped_mm_experts_forward

    def run(
        x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *matrices: torch.Tensor
    ) -> torch.Tensor:
        w_up, w_down = matrices
        return forward(_Layer(w_up, w_down), x, ids, weights)

    return run


class _Layer(SimpleNamespace):
    """What that function reads of a module."""

    def __init__(self, w_up: torch.Tensor, w_down: torch.Tensor) -> None:
        flags: dict[str, Any] = dict.fromkeys(("has_bias", "is_transposed", "has_post_expert_norm"), False)
        flags["_is_expert_parallel"] = False
        super().__init__(
            **flags, has_gate=True, gate_up_proj=w_up, down_proj=w_down, num_experts=w_up.shape[0]
        )

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up
