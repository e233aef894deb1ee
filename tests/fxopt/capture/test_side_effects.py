"""Blocks with effects beside their values, copies that share a slot, threads: the same results as stock."""

from __future__ import annotations

import collections
import copy
import inspect
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.report.records import MODEL_REGION

KEPT: list[torch.Tensor] = []


class Block(nn.Module):
    """A residual layer with a side loss that it hands over by `way`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.linear, self.router = nn.Linear(8, 8), nn.Linear(8, 4)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = self.router(x).softmax(-1).pow(2).mean()
        if self.way == "a list":
            KEPT.append(side)
        elif self.way == "an attribute":
            self.side = side
        elif self.way == "a counter":
            self.calls += 1
        return x + F.relu(self.linear(x))


class Net(nn.Module):
    """Three blocks, a head, and the sum of the side losses."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(way) for _ in range(3))
        self.head = nn.Linear(8, 4)
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        KEPT.clear()
        for layer in self.layers:
            x = layer(x)
        loss = self.head(x).pow(2).mean()
        if self.way == "a list":
            loss = loss + sum(KEPT)
        elif self.way == "an attribute":
            loss = loss + self.layers[-1].side
        elif self.way == "a counter":
            loss = loss * self.layers[-1].calls
        return loss


@pytest.mark.parametrize("way", ["a list", "an attribute", "a counter"])
def test_what_a_block_keeps_on_the_way_is_read_as_in_stock(way: str) -> None:
    torch.manual_seed(0)
    model = Net(way).train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    x = torch.randn(2, 5, 8)
    for _ in range(3):
        model.zero_grad()
        stock.zero_grad()
        ours, theirs = model(x), stock(x)
        ours.backward()
        theirs.backward()
        torch.testing.assert_close(ours, theirs)
        for mine, other in zip(model.parameters(), stock.parameters(), strict=True):
            # A side loss that nobody reads is still an output of its compiled block: zeros instead of no gradient.
            found, expected = (torch.zeros_like(mine) if p.grad is None else p.grad for p in (mine, other))
            torch.testing.assert_close(found, expected)
    assert [layer.calls for layer in model.layers] == [layer.calls for layer in stock.layers]
    assert fxopt.explain(model).fallbacks, "the tail was served although a block keeps values"


def test_layers_of_one_class_with_frozen_or_other_weights_are_told_apart() -> None:
    torch.manual_seed(0)
    model = Net("nothing").train()
    for parameter in model.layers[0].parameters():
        parameter.requires_grad_(False)
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    x = torch.randn(2, 5, 8)
    ours, theirs = model(x), stock(x)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(model.head.weight.grad, stock.head.weight.grad)
    assert fxopt.explain(model).fallbacks == ()


def test_a_shallow_copy_runs_its_own_parameters() -> None:
    """What nn.DataParallel makes: a copy of the attributes, with parameters of its own."""
    model = fxopt.optimize(Net("nothing").train())
    x = torch.randn(2, 5, 8)
    model(x).backward()

    def replicate(module: nn.Module) -> Any:
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = replicate(child)
        replica._parameters = {name: value * 2 for name, value in module._parameters.items()}
        return replica

    doubled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(replicate(model)(x), doubled(x))


def test_threads_share_a_model() -> None:
    model = Net("nothing").train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    inputs = [torch.randn(2, 5, 8) for _ in range(4)]
    model(inputs[0])
    results: dict[int, list[torch.Tensor]] = {}
    failures: list[BaseException] = []

    def work(place: int) -> None:
        try:
            with torch.set_grad_enabled(place % 2 == 0):
                results[place] = [model(inputs[place]).detach() for _ in range(10)]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for place, losses in results.items():
        for loss in losses:
            torch.testing.assert_close(loss, stock(inputs[place]).detach())


def test_a_failing_call_leaves_the_next_ones_served() -> None:
    model = Net("nothing").train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 7))
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(model(x), stock(x))
    report = fxopt.explain(model)
    assert all(region.status == "captured" for region in report.regions), report.regions


def test_with_dynamo_switched_off_the_model_runs_stock_and_says_so() -> None:
    model = Net("nothing").train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    x = torch.randn(2, 5, 8)
    with torch._dynamo.config.patch(disable=True):
        torch.testing.assert_close(model(x), stock(x))
    assert any("switched off" in fallback.reason for fallback in fxopt.explain(model).fallbacks)


class Sharing(nn.Module):
    """A layer that hands its keys to the next one in a mapping that all layers are given."""

    def __init__(self, gives: bool) -> None:
        super().__init__()
        self.linear, self.gives = nn.Linear(8, 8), gives

    def forward(self, x: torch.Tensor, shared: Any) -> torch.Tensor:
        if self.gives:
            shared["keys"] = self.linear(x)
        return x + F.relu(shared["keys"])


@pytest.mark.parametrize("mapping", [dict, pytest.param(collections.UserDict, marks=pytest.mark.slow)])
def test_blocks_that_share_tensors_in_a_mapping_are_captured_and_trained_as_in_stock(mapping: type) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Sharing(gives=index % 2 == 0) for index in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shared = mapping()
            for layer in self.layers:
                x = layer(x, shared)
            return x.pow(2).mean()

    torch.manual_seed(0)
    model = Shared().train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    for step in range(2):
        x = torch.randn(2, 5 + step, 8)
        for each in (model, stock):
            each.zero_grad()
            each(x).backward()
        for (name, mine), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), name
            if theirs.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad)
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert [region.status for region in report.regions] == ["captured", "captured"]


@pytest.mark.parametrize(
    "way",
    [
        "a mapping",
        "a list",
        *(
            pytest.param(way, marks=pytest.mark.slow)
            for way in ("a list in a mapping", "a list, after a look at values")
        ),
    ],
)
def test_what_blocks_put_into_their_arguments_is_read_after_them_as_in_stock(way: str) -> None:
    class Putting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, kept: Any) -> torch.Tensor:
            side = self.linear(x).pow(2).mean()
            if way == "a list, after a look at values" and side.item() < 0:
                raise ValueError(side)
            if way == "a mapping":
                kept["side"] = side
            elif way == "a list in a mapping":
                kept["sides"].append(side)
            else:
                kept.append(side)
            return x + F.relu(self.linear(x))

    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Putting() for _ in range(3))
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept: Any = {"sides": []} if "mapping" in way else []
            for layer in self.layers:
                x = layer(x, kept)
            sides = kept if isinstance(kept, list) else kept["sides"]
            extra = kept["side"] if way == "a mapping" else sum(sides)
            return self.head(x).pow(2).mean() + extra

    torch.manual_seed(0)
    model = Reading().train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    for step in range(2):
        x = torch.randn(2, 5 + step, 8)
        ours, theirs = model(x), stock(x)
        torch.testing.assert_close(ours, theirs)
        for each, loss in ((model, ours), (stock, theirs)):
            each.zero_grad()
            loss.backward()
        for mine, other in zip(model.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)
    report = fxopt.explain(model)
    assert report.fallbacks, "the tail was served although it reads what blocks put in"
    if way != "a mapping":
        reasons = {fallback.reason for fallback in report.fallbacks if fallback.region == MODEL_REGION}
        line = inspect.getsourcelines(Putting.forward)[1]
        assert reasons == {
            "what stands after the blocks was not captured: a block appends to a list that it is given, which the "
            f"model may read after the blocks; at test_side_effects.py:{line}"
        }


def test_blocks_that_take_the_size_of_an_image_are_captured() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, size: torch.Size) -> torch.Tensor:
            return x + F.relu(self.linear(x)) / size[0]

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Sized() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x, size=torch.Size((4, 2)))
            return x.pow(2).mean()

    model = fxopt.optimize(Images().train())
    model(torch.randn(2, 8)).backward()
    report = fxopt.explain(model)
    assert report.regions[0].status == "captured"
    assert report.fallbacks == ()
