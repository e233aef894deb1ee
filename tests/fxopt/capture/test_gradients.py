"""Gradients of None stay None, and what has no gradient of its own says so."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

from fxopt.capture.gradients import Sources, find_partial_reach
from fxopt.errors import FxoptError


class TwoResults(nn.Module):
    """A block of which the model reads one result, or the other."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.main, self.side = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.shared(x).tanh()
        return x + self.main(h), self.side(h)


class Model(nn.Module):
    """Three blocks, a head, and a head that may stay unread; `read` says which of the blocks' results count."""

    def __init__(self, read: str = "main") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoResults() for _ in range(3))
        self.head, self.other_head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.read = read

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sides = []
        for block in self.blocks:
            x, side = block(x)
            sides.append(side)
        if self.read == "main":
            return self.head(x), self.other_head(x)
        y = sum(sides) if self.read == "side" else x + sides[-1]
        return self.head(y), self.other_head(y)


class HeadInTwo(nn.Module):
    """Two blocks and a head whose result is taken apart; the loss is computed from the parts, returned too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for block in self.blocks:
            x = block(x)
        start, end = self.head(x).split(1, dim=-1)
        start, end = start.squeeze(-1), end.squeeze(-1)
        return start.square().mean() + end.exp().mean(), start, end


@pytest.mark.parametrize("number", [0, 1, 2])
def test_results_that_are_parts_of_one_value_are_served(install, assert_same_step, number):
    torch.manual_seed(0)
    model = HeadInTwo()
    stock = copy.deepcopy(model)
    installation = install(model)
    x = torch.randn(4, 8)
    assert_same_step(model, stock, lambda m: m(x)[number].square().sum())
    assert_same_step(model, stock, lambda m: sum(result.sum() for result in m(x)))
    assert not installation.ledger.fallbacks


@pytest.mark.parametrize("read", ["main", "side", "both"])
def test_parameters_behind_results_that_nothing_reads_keep_no_gradient(install, assert_same_step, read):
    torch.manual_seed(0)
    model = Model(read)
    stock = copy.deepcopy(model)
    installation = install(model)
    x = torch.randn(4, 8)
    for _ in range(2):
        assert_same_step(model, stock, lambda m: m(x)[0].square().mean())
    assert stock.other_head.weight.grad is None
    assert_same_step(model, stock, lambda m: m(x)[1].square().mean())
    assert_same_step(model, stock, lambda m: sum(out.square().mean() for out in m(x)))
    assert not installation.ledger.fallbacks


def test_inputs_that_only_unread_results_reach_keep_no_gradient(install):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, y):
            return self.linear(x), y.tanh(), y

    model, (x, y) = Pair(), torch.randn(2, 4, 8).requires_grad_().unbind()
    install(model)
    for number, expected in ((0, (True, False)), (1, (False, True)), (2, (False, True))):
        out = model(x, y)[number]
        got = torch.autograd.grad(out.sum(), (x, y), allow_unused=True)
        assert tuple(gradient is not None for gradient in got) == expected, number


def test_a_second_pass_over_the_same_graph_may_read_another_result(install):
    torch.manual_seed(0)
    model = TwoResults()
    stock = copy.deepcopy(model)
    install(model)
    x = torch.randn(4, 8)
    found = []
    for each in (model, stock):
        main, side = each(x)
        for out in (main, side, main):
            out.sum().backward(retain_graph=True)
            found.append([None if p.grad is None else p.grad.clone() for p in each.parameters()])
            each.zero_grad()
    for ours, theirs in zip(found[:3], found[3:], strict=True):
        for gradient, expected in zip(ours, theirs, strict=True):
            assert (gradient is None) == (expected is None)
            assert gradient is None or torch.equal(gradient, expected)


def test_a_graph_that_writes_in_place_counts_as_reached():
    def make(write: bool) -> torch.fx.GraphModule:
        graph = torch.fx.Graph()
        x, y = graph.placeholder("x"), graph.placeholder("y")
        if write:
            graph.call_method("mul_", (y, x))
        graph.output((graph.call_function(torch.tanh, (x,)), graph.call_function(torch.tanh, (y,))))
        for node in graph.nodes:
            if node.op != "output":
                node.meta["example_value"] = torch.ones(2, requires_grad=True)
        return torch.fx.GraphModule({}, graph)

    assert find_partial_reach(make(False)) == {0: frozenset({0}), 1: frozenset({1})}
    assert find_partial_reach(make(True)) == {}


def test_backward_may_run_twice_over_a_graph_that_is_kept(twins, install, assert_same_step):
    model, stock = twins()
    install(model)
    assert_same_step(model, stock)
    ids = torch.randint(1, 256, (2, 16))
    for each in (model, stock):
        each.zero_grad()
        loss = each(input_ids=ids, labels=ids).loss
        loss.backward(retain_graph=True)
        loss.backward()
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), stock.parameters(), strict=True)
    )


def test_a_second_derivative_says_which_region_has_none_and_what_to_do(twins, install, assert_same_step):
    model, stock = twins()
    install(model)
    ids = torch.randint(1, 256, (2, 16))
    gradients = []
    for each in (model, stock):
        loss = each(input_ids=ids, labels=ids).loss
        gradients.append(torch.autograd.grad(loss, tuple(each.parameters()), create_graph=True))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True)), "first ones"
    penalty = sum(gradient.square().sum() for gradient in gradients[0])
    with pytest.raises(FxoptError, match=r"model\.?\w*: second derivatives .*\n.*fxopt\.restore\(model\)"):
        penalty.backward()
    assert_same_step(model, stock)


@pytest.mark.parametrize(
    "by",
    [
        "model.layers.2.mlp.up_proj.weight",
        "",
        *(pytest.param(by, marks=pytest.mark.slow) for by in ("lm_head.weight", "model.embed_tokens.weight")),
    ],
)
def test_a_second_derivative_by_one_tensor_says_so_too(twins, install, by: str):
    model, stock = twins(attn_implementation="eager")
    install(model)
    ids = torch.randint(1, 256, (2, 16))
    asked = []
    for each in (model, stock):
        embedded = each.get_input_embeddings()(ids) if by else torch.randn(2, 16, 64).requires_grad_()
        loss = each(inputs_embeds=embedded, labels=ids).loss
        gradients = torch.autograd.grad(loss, (each.lm_head.weight, embedded), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        asked.append((penalty, [each.get_parameter(by) if by else embedded]))
    assert all(value.any() for value in torch.autograd.grad(*asked[1], retain_graph=True)), "stock has one"
    with pytest.raises(FxoptError, match="second derivatives through a compiled region"):
        torch.autograd.grad(*asked[0], allow_unused=True)


def test_what_a_gradient_is_computed_from_is_known_without_keeping_it() -> None:
    value = torch.randn(3, requires_grad=True) * 2
    find = weakref.ref(value)
    sources = Sources.apply(value)
    del value
    assert find() is None
    assert sources.requires_grad
    assert sources.numel() == 0
