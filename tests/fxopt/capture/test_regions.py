"""Which modules are regions: repeated blocks, single ones, and the whole model where nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.capture.regions import find_regions

WIDTH, TOKENS = 8, 512


class Unit(nn.Module):
    """A block whose second part is a list that repeats, of leaves or of modules."""

    def __init__(self, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.inner = inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.mix(x))
        for part in self.inner.children():
            x = part(x)
        return x


def leaves() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def modules() -> nn.Module:
    return nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))


class Net(nn.Module):
    """Tables of many tokens around a list of blocks."""

    def __init__(self, number: int, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS, bias=False)
        self.parts = nn.ModuleList(Unit(inner) for _ in range(number))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for part in self.parts:
            x = part(x)
        return self.head(x)


@pytest.mark.parametrize("inner", [leaves, modules])
@pytest.mark.parametrize("number", [1, 2])
def test_one_block_is_found_as_several_are(number: int, inner: Callable[[], nn.Module]) -> None:
    (stack,) = find_regions(Net(number, inner)).stacks
    assert (stack.path, len(stack.blocks)) == ("parts", number)


def test_a_single_module_beside_most_of_a_model_is_no_region() -> None:
    model = Net(1, leaves)
    assert find_regions(model).stacks
    model.wide = nn.Linear(64, 64)
    assert find_regions(model).stacks == ()


def test_blocks_may_have_names_and_other_named_modules_are_no_blocks() -> None:
    model = Net(3, leaves)
    model.parts = nn.ModuleDict({f"part_{number}": part for number, part in enumerate(model.parts)})
    (stack,) = find_regions(model).stacks
    assert stack.paths == ("parts.part_0", "parts.part_1", "parts.part_2")
    named = {"table": model.table, "positions": nn.Embedding(TOKENS, WIDTH), "parts": model.parts}
    model.parts = nn.ModuleDict(named)
    assert [stack.path for stack in find_regions(model).stacks] == ["parts.parts"]
    model.heads = nn.ModuleDict({name: nn.Linear(64, 64) for name in "ab"})
    assert [stack.path for stack in find_regions(model).stacks] == ["parts.parts"]


def test_a_list_of_one_plain_layer_is_no_block_beside_those_that_are() -> None:
    model = Net(2, leaves)
    model.extra = nn.ModuleList([nn.Linear(WIDTH, 64)])
    assert [stack.path for stack in find_regions(model).stacks] == ["parts"]


def test_a_model_of_one_layer_trains_as_stock_with_all_its_sites(
    twins: Callable[..., Any], assert_same_step: Callable[..., None]
) -> None:
    model, stock = twins(num_hidden_layers=1, vocab_size=4096)
    fxopt.optimize(model, patterns=())
    assert_same_step(model, stock)
    report = fxopt.explain(model)
    assert [(region.kind, region.count, region.status) for region in report.regions] == [
        ("block", 1, "captured"),
        ("model", 1, "captured"),
    ]
    assert report.fallbacks == ()
    assert {site.pattern for site in report.sites} >= {
        "rms_norm",
        "rope",
        "attention",
        "glu",
        "linear_cross_entropy",
    }


class Choosing(nn.Module):
    """No list of blocks, and an argument called as transformers call theirs, which means another thing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, use_cache: bool | None = None) -> torch.Tensor:
        y = self.norm(self.layer(x))
        return y * 2 if use_cache is None else y * 3


def test_an_argument_of_a_model_of_ones_own_is_left_alone_whatever_its_name() -> None:
    stock, x = Choosing(), torch.randn(2, WIDTH)
    model = fxopt.optimize(copy.deepcopy(stock))
    for given in ({}, {"use_cache": True}):
        torch.testing.assert_close(model(x, **given), stock(x, **given))
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert not any("use_cache" in note for note in report.notes)


class Spelled(nn.Module):
    """Three layers of a norm and a gated unit, held and called as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "lists of a list":
            self.parts = nn.ModuleList(nn.ModuleList(Gated() for _ in range(2)) for _ in range(2))
        elif how == "modules by name":
            self.parts = nn.ModuleList(nn.ModuleDict(dict(Gated().named_children())) for _ in range(3))
        elif how == "a list of each layer":
            self.norms, self.ups, self.downs = (
                nn.ModuleList(layers) for layers in zip(*(Gated().children() for _ in range(3)), strict=True)
            )
        elif how == "torch's blocks":
            self.parts = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 16) for _ in range(3))
        else:
            self.parts = nn.ModuleList(Gated() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "lists of a list":
            for part in self.parts:
                for block in part:  # pyright: ignore[reportGeneralTypeIssues]
                    x = block(x)
        elif self.how == "modules by name":
            for part in self.parts:
                x = x + gated(x, *part.values())  # pyright: ignore
        elif self.how == "a list of each layer":
            for layers in zip(self.norms, self.ups, self.downs, strict=True):
                x = x + gated(x, *layers)
        else:
            for part in self.parts:
                x = part.forward(x) if self.how == "forward itself" else part(x)
        return x.square().mean()


def gated(x: torch.Tensor, norm: nn.Module, up: nn.Module, down: nn.Module) -> torch.Tensor:
    gate, value = up(norm(x)).chunk(2, -1)
    return down(torch.nn.functional.silu(gate) * value)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(16, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + gated(x, self.norm, self.up, self.down)


@pytest.mark.parametrize(
    ("how", "stacks", "count"),
    [
        ("lists of a list", ["parts.0", "parts.1"], 4),
        ("modules by name", [], 3),
        ("a list of each layer", [], 3),
        ("torch's blocks", ["parts"], 0),
    ],
)
def test_layers_are_found_however_they_are_held(how: str, stacks: list[str], count: int) -> None:
    stock = Spelled(how)
    model = copy.deepcopy(stock)
    assert [stack.path for stack in find_regions(model).stacks] == stacks
    if not count:
        return
    fxopt.optimize(model)
    x = torch.randn(2, 3, WIDTH)
    for each in (model, stock):
        each(x).backward()
    for own, other in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
    report = fxopt.explain(model)
    for pattern in ("layer_norm", "glu"):
        assert sum(s.count for s in report.sites if (s.pattern, s.status) == (pattern, "rewritten")) == count
    assert not report.fallbacks


def test_a_model_of_which_nothing_is_captured_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = fxopt.optimize(Spelled("forward itself"))
    for _ in range(2):
        model(torch.randn(2, 3, WIDTH)).backward()
    (told,) = [record.getMessage() for record in caplog.records if "runs as stock" in record.getMessage()]
    assert "no block was called" in told
