"""Loops over the experts that were hit: recognised as experts where they are, and left as they run where not."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt

WIDTH, INNER, NUMBER, LAYERS = 32, 24, 5, 2
Body = Callable[["Crew", torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass
class Result:
    """What the model below returns."""

    loss: torch.Tensor


class Crew(nn.Module):
    """Experts of a model's own behind a router, `body` the loop over those that were hit."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.pick = nn.Linear(WIDTH, NUMBER, bias=False)
        self.wide = nn.Parameter(torch.randn(NUMBER, 2 * INNER, WIDTH) / WIDTH**0.5)
        self.back = nn.Parameter(torch.randn(NUMBER, WIDTH, INNER) / INNER**0.5)
        with torch.no_grad():
            self.pick.weight[NUMBER - 1] = 0  # of the softmax's logits one is small: it is seldom hit
            self.pick.weight[: NUMBER - 1] += 0.3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        shares, names = self.pick(flat).softmax(-1).topk(2, dim=-1)
        return x + self.body(self, flat, names, shares).view_as(x)

    def work(self, rows: torch.Tensor, name: Any) -> torch.Tensor:
        """Return what one expert makes of its rows."""
        gate, up = F.linear(rows, self.wide[name]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.back[name])


def hits_of(names: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mask = F.one_hot(names, num_classes=NUMBER).permute(2, 1, 0)
    return mask, torch.greater(mask.sum(dim=(-1, -2)), 0)


def plain(crew: Crew, x: torch.Tensor, names: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    mask, hits = hits_of(names)
    for number in hits.nonzero():
        place, token = torch.where(mask[number[0]])
        y.index_add_(0, token, crew.work(x[token], number[0]) * shares[token, place, None])
    return y


def skipping_none(crew: Crew, x: torch.Tensor, names: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(x.shape)
    mask, hits = hits_of(names)
    for number in hits.nonzero():
        number = number[0]
        if number == NUMBER:
            continue
        place, token = torch.where(mask[number])
        rows = F.linear(x[token], crew.wide[number])
        rows = F.gelu(rows[:, :INNER]) * rows[:, INNER:]
        out.index_add_(0, token, F.linear(rows, crew.back[number]) * shares[token, place].unsqueeze(-1))
    return out


def skipping_one(crew: Crew, x: torch.Tensor, names: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    mask, hits = hits_of(names)
    for number in hits.nonzero():
        if number[0] == 1:
            continue
        place, token = torch.where(mask[number[0]])
        y.index_add_(0, token, crew.work(x[token], number[0]) * shares[token, place, None])
    return y


def counting(crew: Crew, x: torch.Tensor, names: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    y, num_hits = torch.zeros_like(x), 0
    mask, hits = hits_of(names)
    for number in hits.nonzero():
        num_hits += 1
        place, token = torch.where(mask[number[0]])
        y.index_add_(0, token, crew.work(x[token], number[0]) * shares[token, place, None])
    return y / num_hits


def counting_on_the_device(
    crew: Crew, x: torch.Tensor, names: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    y, num_hits = torch.zeros_like(x), x.new_zeros(())
    mask, hits = hits_of(names)
    for number in hits.nonzero():
        num_hits = num_hits + 1
        place, token = torch.where(mask[number[0]])
        y.index_add_(0, token, crew.work(x[token], number[0]) * shares[token, place, None])
    return y / num_hits


def on_top(crew: Crew, x: torch.Tensor, names: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    y = 0.5 * x
    mask, hits = hits_of(names)
    for number in hits.nonzero():
        place, token = torch.where(mask[number[0]])
        y.index_add_(0, token, crew.work(x[token], number[0]) * shares[token, place, None])
    return y


def of_other_hits(crew: Crew, x: torch.Tensor, names: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    mask, hits = hits_of(names)
    for number in (hits & (torch.arange(NUMBER, device=names.device) < 3)).nonzero():
        place, token = torch.where(mask[number[0]])
        y.index_add_(0, token, crew.work(x[token], number[0]) * shares[token, place, None])
    return y


def centred(crew: Crew, x: torch.Tensor, names: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    mask, hits = hits_of(names)
    for number in hits.nonzero():
        place, token = torch.where(mask[number[0]])
        rows = crew.work(x[token] - x[token].mean(0), number[0])
        y.index_add_(0, token, rows * shares[token, place, None])
    return y


def ending_early(crew: Crew, x: torch.Tensor, names: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    mask, hits = hits_of(names)
    for number in hits.nonzero():
        place, token = torch.where(mask[number[0]])
        y.index_add_(0, token, crew.work(x[token], number[0]) * shares[token, place, None])
        break
    return y


class Train(nn.Module):
    """Blocks of such experts with a loss."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.table = nn.Embedding(256, WIDTH)
        self.crews = nn.ModuleList(Crew(body) for _ in range(LAYERS))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:
        x = self.table(input_ids)
        for crew in self.crews:
            x = crew(x)
        logits = F.linear(x, self.table.weight / WIDTH).flatten(0, 1)
        return Result(F.cross_entropy(logits, labels.clamp(min=0).flatten().roll(1)))


SHAPES = ((2, 24), (1, 3), (3, 17))


def run(body: Body, tools: Any, device: str, shapes: Any = SHAPES) -> fxopt.Report:
    torch.manual_seed(0)
    stock = Train(body).train().to(device)
    model = fxopt.optimize(copy.deepcopy(stock))
    for shape in shapes:
        batch = tools.make_batch(shape, padded="none", device=device)
        ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
        assert tools.relative(ours.loss, theirs.loss) < 1e-5
        assert ours.gradients.keys() == theirs.gradients.keys()
        for name, gradient in theirs.gradients.items():
            assert tools.relative(ours.gradients[name], gradient) < 1e-4, (name, shape)
    return fxopt.explain(model)


@pytest.mark.parametrize("body", [plain, pytest.param(skipping_none, marks=pytest.mark.slow)])
def test_a_loop_over_hits_is_experts(body: Body, device: str, tools: Any) -> None:
    report = run(body, tools, device)
    assert report.fallbacks == ()
    assert [region.breaks for region in report.regions if region.kind == "block"] == [()]
    sites = [site for site in report.sites if site.pattern == "experts"]
    assert [(site.status, site.op, site.count) for site in sites] == [("rewritten", "experts", LAYERS)]
    assert all(site.proof is not None and site.proof.passed for site in sites)


ALIKE = (of_other_hits,)
"""What is refused where another loop is."""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        *(
            pytest.param(body, reason, marks=pytest.mark.exhaustive if body in ALIKE else pytest.mark.slow)
            for body, reason in (
                (counting, "what it counts in Python would be counted once"),
                (skipping_one, "a loop over hits skips [1], expected none of its {5} experts"),
                (counting_on_the_device, "in a loop over hits does not hang on the hit of its turn"),
                (on_top, "expected its rows added to zeros of their tokens"),
                (of_other_hits, "hits of a loop, expected those of which a mask has a row"),
                (centred, "no pattern takes the loop over its experts"),
                (ending_early, "a loop over hits is left before its end"),
            )
        ),
    ],
)
def test_other_loops_run_as_they_stand(body: Body, reason: str, device: str, tools: Any) -> None:
    report = run(body, tools, device, SHAPES[:2])
    assert [site.status for site in report.sites if site.pattern == "experts"] == []
    assert any(reason in note for note in report.notes), report.notes
    assert any(region.breaks for region in report.regions)


def counting_calls(crew: Crew, x: torch.Tensor, names: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    crew.calls.add_(1)  # pyright: ignore
    return counting(crew, F.dropout(x, 0.5), names, shares)


def test_a_loop_that_is_none_leaves_chance_and_buffers_as_stock_does(tools: Any) -> None:
    torch.manual_seed(0)
    stock = Train(counting_calls).train()
    for crew in stock.crews:
        crew.register_buffer("calls", torch.zeros(()))
    model = fxopt.optimize(copy.deepcopy(stock))
    batch = tools.make_batch((2, 24), padded="none", device="cpu")
    for step in (1, 2):
        losses: list[torch.Tensor] = []
        for each in (model, stock):
            torch.manual_seed(step)
            losses.append(tools.run_step(each, batch).loss)
        assert tools.relative(*losses) < 1e-5
        assert [crew.calls.item() for crew in model.crews] == [step] * LAYERS


@pytest.mark.slow
def test_a_loop_under_autocast_is_experts(device: str, tools: Any) -> None:
    torch.manual_seed(0)
    stock = Train(plain).train().to(device)
    model = fxopt.optimize(copy.deepcopy(stock))
    batch = tools.make_batch((2, 24), padded="none", device=device)
    with torch.autocast(device, torch.bfloat16):
        ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
    exact = tools.run_step(copy.deepcopy(stock).double(), batch)
    for name, reference in exact.gradients.items():
        own = tools.relative(theirs.gradients[name], reference)
        assert tools.relative(ours.gradients[name], reference) < 2 * own + 2**-9, name
    sites = [site for site in fxopt.explain(model).sites if site.pattern == "experts"]
    assert [(site.status, site.count) for site in sites] == [("rewritten", LAYERS)]
