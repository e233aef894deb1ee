"""The spellings of routers that `patterns/route.py` must find, and those that it must leave alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.rewriting.pattern import Example

NUM_EXPERTS, NUM_CHOICES, NUM_GROUPS = 12, 3, 4
Router = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _mixtral(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = F.softmax(logits, dim=-1)
    weights, ids = torch.topk(scores, NUM_CHOICES, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), ids


def _qwen2(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = F.softmax(logits, dtype=torch.float, dim=-1)
    weights, ids = torch.topk(scores, NUM_CHOICES, dim=-1)
    return weights.to(logits.dtype), ids


def _hunyuan(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = logits.float().softmax(1).topk(NUM_CHOICES, sorted=False)
    weights /= weights.sum(-1, True)
    return weights.type_as(logits), ids


def _granite(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, ids = logits.topk(NUM_CHOICES, dim=1)
    return torch.softmax(chosen.float(), dim=1).type_as(logits), ids


def _sigmoid_after(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.topk(logits, NUM_CHOICES)
    return found.values.sigmoid(), found.indices


def _ernie(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = F.softmax(logits, dim=-1, dtype=torch.float)
    ids = torch.topk(scores + bias.unsqueeze(0), NUM_CHOICES, dim=-1)[1]
    weights = torch.gather(scores, dim=-1, index=ids)
    return (weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=1e-2)).to(logits.dtype), ids


def _kolibri(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.topk(logits + bias, NUM_CHOICES, dim=-1)[1]
    weights = logits.gather(1, ids).sigmoid()
    return weights / weights.sum(dim=-1, keepdim=True), ids


def _deepseek_v4(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = F.softplus(logits).sqrt()
    ids = torch.topk(scores + bias, NUM_CHOICES, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 1.5, ids


def _by_logits(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = F.softmax(logits, dim=-1)
    ids = torch.topk(logits, NUM_CHOICES, dim=-1)[1]
    return F.normalize(scores.gather(-1, ids), p=1, dim=-1), ids


def _zaya(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.softmax(logits, dim=-1)
    ids = torch.topk(scores.detach().to(torch.float32) + bias, NUM_CHOICES, dim=-1)[1]
    return torch.gather(scores, dim=-1, index=ids), ids


def _without_grad(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.float().sigmoid()
    with torch.no_grad():
        ids = torch.topk(scores + bias, NUM_CHOICES, dim=-1)[1]
    return scores.gather(-1, ids), ids


GROUP_SIZE = NUM_EXPERTS // NUM_GROUPS


def _left_out_by_true(groups: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    left_out = groups.new_ones(len(groups), NUM_GROUPS, dtype=torch.bool).scatter_(1, best, False)
    return groups.masked_fill(left_out.unsqueeze(-1), -torch.inf).flatten(1)


def _multiplied(groups: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros(len(groups), NUM_GROUPS, device=groups.device).scatter_(1, best, 1.0)
    return (groups * kept[..., None]).flatten(-2)


def _repeated(groups: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
    return torch.where(kept.repeat_interleave(GROUP_SIZE, dim=-1), groups.flatten(-2), -torch.inf)


def _hidden(groups: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    marks = torch.zeros(len(groups), NUM_GROUPS, device=groups.device).scatter_(1, best, 1.0)
    return groups.masked_fill((marks == 0).unsqueeze(-1), 0.0).reshape(-1, NUM_EXPERTS)


def _grouped(leave_out: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Router:
    """Return a router of the best groups, all others left out by `leave_out`."""

    def run(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits.float().sigmoid()
        groups = scores.unflatten(-1, (NUM_GROUPS, GROUP_SIZE))
        best = groups.amax(dim=-1).topk(2, dim=-1)[1]
        ids = leave_out(groups, best).topk(NUM_CHOICES, dim=-1)[1]
        weights = scores.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True), ids

    return run


def _deepseek_v3(
    logits: torch.Tensor,
    bias: torch.Tensor,
    *,
    fill: float = -torch.inf,
    num_kept: int = 2,
    group_choices: int = 2,
    mark: float = 1,
    weighs_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.float().sigmoid()
    values = scores + bias
    size = NUM_EXPERTS // NUM_GROUPS
    groups = values.view(-1, NUM_GROUPS, size).topk(group_choices, dim=-1)[0].sum(dim=-1)
    best = torch.topk(groups, k=num_kept, dim=-1, sorted=False)[1]
    marks = torch.zeros_like(groups)
    marks.scatter_(1, best, mark)
    mask = marks.unsqueeze(-1).expand(-1, NUM_GROUPS, size).reshape(-1, NUM_EXPERTS)
    values = values.masked_fill(~mask.bool(), fill)
    ids = torch.topk(values, k=NUM_CHOICES, dim=-1, sorted=False)[1]
    weights = (values if weighs_bias else scores).gather(1, ids)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * 2.5, ids


def _deepseek_v2(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    size = NUM_EXPERTS // NUM_GROUPS
    groups = scores.view(-1, NUM_GROUPS, size).max(dim=-1).values
    best = torch.topk(groups, k=2, dim=-1, sorted=False)[1]
    marks = torch.zeros_like(groups)
    marks.scatter_(1, best, 1)
    mask = marks.unsqueeze(-1).expand(-1, NUM_GROUPS, size).reshape(-1, NUM_EXPERTS)
    weights, ids = torch.topk(scores.masked_fill(~mask.bool(), 0.0), k=NUM_CHOICES, dim=-1, sorted=False)
    return weights * 16.0, ids


def _collected(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return all scores as well, as what balances loads reads them."""
    scores = F.softmax(logits, dim=-1)
    weights, ids = torch.topk(scores, NUM_CHOICES, dim=-1)
    return weights, ids, scores


def _inputs(
    device: torch.device, dtype: torch.dtype = torch.float32, *, has_bias: bool = False
) -> tuple[torch.Tensor, ...]:
    logits = torch.randn(9, NUM_EXPERTS, device=device).to(dtype).requires_grad_()
    return (logits, torch.randn(NUM_EXPERTS, device=device) * 0.1) if has_bias else (logits,)


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield the forms that models capture."""
    plain: dict[str, Router] = {
        "scores, then the choice": _mixtral,
        "scores in fp32": _qwen2,
        "scores in fp32, in place": _hunyuan,
        "the choice, then scores": _granite,
        "the choice, then sigmoid": _sigmoid_after,
        "groups by their largest": _deepseek_v2,
        "the choice by logits, scores of all": _by_logits,
    }
    ways = (_left_out_by_true, _multiplied, _repeated, _hidden)
    for way in ways:
        yield f"groups{way.__name__.replace('_', ' ')}", (_grouped(way), _inputs(device))
    with_bias = {
        "logits and a bias": _kolibri,
        "roots": _deepseek_v4,
        "detached scores": _zaya,
        "chosen without grad": _without_grad,
        "a bias": _ernie,
        "a bias and groups": _deepseek_v3,
    }
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for form, router in plain.items():
            yield f"{form}, {name}", (router, _inputs(device, dtype))
        for form, router in with_bias.items():
            yield f"{form}, {name}", (router, _inputs(device, dtype, has_bias=True))
    yield "scores are read elsewhere", (_collected, _inputs(device))


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield code that must be left alone, and a part of the reason."""

    def of_others(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.topk(F.softmax(logits, dim=-1) + bias, NUM_CHOICES, dim=-1)[1]
        return F.softmax(logits.gather(-1, ids), dim=-1), ids

    def narrow(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = F.softplus(logits.float()).sqrt().to(logits.dtype)
        ids = torch.topk(scores, NUM_CHOICES, dim=-1)[1]
        return scores.gather(-1, ids), ids

    def wide_sums(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = F.softmax(logits, dim=-1)
        ids = torch.topk(scores.float() + bias.to(logits.dtype), NUM_CHOICES, dim=-1)[1]
        return scores.gather(-1, ids), ids

    def all_kept(groups: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros(len(groups), NUM_GROUPS, device=groups.device).scatter_(1, best, 1.0)
        return groups.masked_fill(kept.bool()[..., None], 0.0).flatten(-2)

    def with_bias(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.topk(F.softmax(logits, dim=-1) + bias, NUM_CHOICES, dim=-1)
        return weights, ids

    def filled(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _deepseek_v3(logits, bias, fill=-1.0)

    def by_three(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _deepseek_v3(logits, bias, group_choices=3)

    both = _inputs(device, has_bias=True)
    trained = (both[0], both[1].clone().requires_grad_())
    half = _inputs(device, torch.bfloat16, has_bias=True)
    yield "chosen by others", (of_others, both), "as elsewhere"
    yield "roots rounded after", (narrow, half[:1]), "roots in torch.float32 are rounded"
    yield "wider sums", (wide_sums, half), "experts are compared in torch.float32, expected torch.bfloat16"
    yield "the best left out", (_grouped(all_kept), _inputs(device)), "other groups are kept"
    yield "weighed with the bias", (with_bias, both), "the bias is in the weights"
    yield "a bias that is trained", (_ernie, trained), "without gradient"
    yield "filled with a number", (filled, both), "filled with -1.0, expected 0 or -inf"
    yield "groups by three", (by_three, both), "kept by their 3 largest"


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield broken routers: they must be left alone, or be computed as they stand."""

    def smallest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.topk(F.softmax(logits, dim=-1), NUM_CHOICES, dim=-1, largest=False)
        return weights / weights.sum(dim=-1, keepdim=True), ids

    def over_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.topk(F.softmax(logits, dim=0), NUM_CHOICES, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True), ids

    def of_all(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.sigmoid(logits)
        weights, ids = torch.topk(scores, NUM_CHOICES, dim=-1)
        return weights / scores.sum(dim=-1, keepdim=True), ids

    def of_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.topk(torch.sigmoid(logits), NUM_CHOICES, dim=0)
        return weights / weights.sum(dim=-1, keepdim=True), ids

    def unmarked(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _deepseek_v3(logits, bias, mark=0, fill=0.0)

    def weighed(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _deepseek_v3(logits, bias, weighs_bias=True)

    def of_places(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits.sigmoid()
        groups = scores.unflatten(-1, (4, 4))
        marks = torch.zeros(len(logits), 4, device=logits.device)
        marks.scatter_(1, groups.amax(dim=-2).topk(2, dim=-1)[1], 1.0)
        ids = groups.masked_fill((marks == 0).unsqueeze(-1), 0.0).flatten(-2).topk(NUM_CHOICES, dim=-1)[1]
        return scores.gather(1, ids), ids

    forms: dict[str, Any] = {
        "the smallest": smallest,
        "softmax over tokens": over_tokens,
        "shares of all": of_all,
        "tokens of experts": of_tokens,
    }
    for name, router in forms.items():
        yield name, (router, _inputs(device))
    yield "groups by places in them", (of_places, (torch.randn(9, 16, device=device, requires_grad=True),))
    yield "no group is marked", (unmarked, _inputs(device, has_bias=True))
    yield "the bias weighs", (weighed, _inputs(device, has_bias=True))
