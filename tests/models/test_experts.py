"""Mixtures of experts against stock: every layer's experts rewritten, loss and all gradients equal, less saved."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

import fxopt
from fxopt.coverage.shrink import tiny_config
from fxopt.demo.training import count_saved_bytes

LAYERS = 4
"""Of the tiny configs, and of the model below."""
MIXTURES = {
    "mixtral": LAYERS,  # softmax before the choice, weights of the chosen ones sum to one
    "qwen3_moe": LAYERS,
    "qwen2_moe": LAYERS,  # with an expert that all tokens share, behind a gate
    "deepseek_v3": LAYERS - 1,  # sigmoid, chosen by group with a bias; the first layer is dense
    "gpt_oss": LAYERS,  # softmax after the choice; interleaved, clamped, with biases
    "granitemoe": LAYERS,
    "olmoe": LAYERS,
    "phimoe": LAYERS,  # chosen one by one with jitter
}
"""Experts per model."""
UNROUTED = ("phimoe",)
"""Mixtures whose routing is another one than the op's."""
SHAPES = ((2, 24), (3, 17))
HOWS = ("grouped_mm", "batched_mm", "eager")
slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
PAIRS = [(arch, HOWS[place % len(HOWS)]) for place, arch in enumerate(MIXTURES)]
"""Each mixture once, and each way to compute experts more than once."""
RESIZED = [("olmoe", "grouped_mm")]
"""Of these, what trains on a size unseen at capture too."""
CASES = [
    ("mixtral", "grouped_mm", SHAPES[:1]),
    *(
        pytest.param(arch, how, SHAPES[: 1 + ((arch, how) in RESIZED)], marks=slow)
        for arch, how in PAIRS
        if arch != "mixtral"
    ),
    *(
        pytest.param(arch, how, SHAPES[: 1 + ((arch, how) in PAIRS)], marks=exhaustive)
        for arch in MIXTURES
        for how in HOWS
        if (arch, how) not in RESIZED
    ),
]


def make_mixture(arch: str, how: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(arch)).train()
    model.set_experts_implementation(how)
    return model


def check_steps(tools: Any, model: Any, stock: Any, device: str, shapes: Any) -> fxopt.Report:
    for shape in shapes:
        batch = tools.make_batch(shape, padded="left", device=device)
        ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
        assert tools.relative(ours.loss, theirs.loss) < 1e-5
        assert ours.gradients.keys() == theirs.gradients.keys()
        for name, gradient in theirs.gradients.items():
            assert tools.relative(ours.gradients[name], gradient) < 1e-4, (name, shape)
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    return report


def count_experts(report: fxopt.Report) -> int:
    sites = [site for site in report.sites if site.pattern == "experts"]
    assert all((site.status, site.op) == ("rewritten", "experts") for site in sites), sites
    assert all(site.proof is not None and site.proof.passed for site in sites)
    return sum(site.count for site in sites)


def count_routes(report: fxopt.Report) -> int:
    sites = [site for site in report.sites if site.pattern == "route"]
    assert all((site.status, site.op) == ("rewritten", "route") for site in sites), sites
    return sum(site.count for site in sites)


@pytest.mark.parametrize(("arch", "how", "shapes"), CASES)
def test_a_mixture_equals_stock_and_all_experts_are_rewritten(arch, how, shapes, device, tools) -> None:
    model = make_mixture(arch, how).to(device)
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    report = check_steps(tools, model, stock, device, shapes)
    assert count_experts(report) == MIXTURES[arch]
    assert count_routes(report) == (0 if arch in UNROUTED else MIXTURES[arch])
    units = [site for site in report.sites if site.pattern == "glu" and site.op == "experts"]
    assert sum(site.count for site in units) == MIXTURES[arch], "the unit is a part of them"


@pytest.mark.parametrize("tokens", [8, pytest.param(9, marks=slow)])
def test_proofs_run_few_tokens_too_whatever_the_sizes_have_in_common(tokens, tools) -> None:
    """With 4 experts and 2 choices a token, 8 tokens make as many choices as there are pairs of experts."""
    model = make_mixture("mixtral", "grouped_mm")
    report = fxopt.explain(model, tools.make_batch((1, tokens), padded="none", device="cpu"))
    shapes = [shape for site in report.sites if site.pattern == "experts" for shape in site.proof.shapes]
    few = [shape.partition(": ")[2].partition(" and ")[0] for shape in shapes]
    sizes = [int(size) for shape in few for size in re.findall(r"\d+", shape)]
    assert shapes
    assert not {tokens, 2 * tokens} & set(sizes), shapes


@pytest.mark.parametrize(
    "shapes", [pytest.param(SHAPES[:1], marks=slow), pytest.param(SHAPES, marks=exhaustive)]
)
def test_experts_of_all_tokens_are_computed_for_the_chosen_alone(shapes, device, tools) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama4_text")).train().to(device)
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    report = check_steps(tools, model, stock, device, shapes)
    assert count_experts(report) == LAYERS
    assert sum(rewrite.pattern == "experts_of_all" for rewrite in report.rewrites) > 0
    assert [site.reason for site in report.sites if site.op == "experts" and site.reason] == []


@pytest.mark.parametrize("how", ["grouped_mm", pytest.param("batched_mm", marks=slow)])
def test_less_is_saved_than_in_stock(how, tools) -> None:
    model = make_mixture("mixtral", how)
    stock = copy.deepcopy(model)
    fxopt.optimize(model, memory_budget=None)
    batch = tools.make_batch((2, 24), padded="none", device="cpu")
    tools.run_step(model, batch)
    totals: list[int] = []
    for each in (model, stock):
        with count_saved_bytes(each) as saved:
            loss = each(**batch).loss
        totals.append(saved.total)
        loss.backward()
    assert totals[0] < 0.75 * totals[1], totals


@slow
def test_experts_of_which_none_is_trained_need_no_gradients(device, tools) -> None:
    model = make_mixture("qwen3_moe", "grouped_mm").to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim != 3)
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    assert count_experts(check_steps(tools, model, stock, device, SHAPES[:1])) == LAYERS


@dataclasses.dataclass
class Result:
    """What the model below returns."""

    loss: torch.Tensor


class Herd(nn.Module):
    """Experts of a model's own: matrices in the order of a product, weights that are not normed."""

    def __init__(self, width: int, inner: int, number: int) -> None:
        super().__init__()
        self.choose = nn.Linear(width, number, bias=False)
        self.into = nn.Parameter(torch.randn(number, width, 2 * inner) / width**0.5)
        self.out = nn.Parameter(torch.randn(number, inner, width) / inner**0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        scores = torch.sigmoid(self.choose(flat))
        shares, chosen = scores.topk(2, dim=-1)
        names = chosen.flatten()
        rows = flat.repeat_interleave(2, 0)
        up, gate = torch.bmm(rows[:, None], self.into[names])[:, 0].split(self.out.shape[1], -1)
        rows = torch.bmm((up * F.gelu(gate))[:, None], self.out[names])[:, 0]
        y = (shares.flatten()[:, None] * rows).unflatten(0, (-1, 2)).sum(-2).view_as(x)
        return x + y, scores, chosen


class Ranch(nn.Module):
    """Blocks of such experts, with a loss, and one that keeps their loads equal."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 32)
        self.pens = nn.ModuleList(Herd(32, 24, 5) for _ in range(LAYERS))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:
        x = self.table(input_ids)
        balance = x.new_zeros(())
        for pen in self.pens:
            x, scores, chosen = pen(x)
            share = F.one_hot(chosen, scores.shape[-1]).float().mean((0, 1))
            balance = balance + (share * scores.mean(0)).sum()
        loss = F.cross_entropy(F.linear(x, self.table.weight).flatten(0, 1), labels.clamp(min=0).flatten())
        loss = loss + 0.1 * balance
        return Result(loss)


def test_experts_of_an_unknown_model_are_found(device, tools) -> None:
    torch.manual_seed(0)
    stock = Ranch().train().to(device)
    model = fxopt.optimize(copy.deepcopy(stock))
    assert count_experts(check_steps(tools, model, stock, device, SHAPES)) == LAYERS
