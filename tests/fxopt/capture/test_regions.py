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
