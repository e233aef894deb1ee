"""What may be asked for, and what bad input gets."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import re
import types
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import fxopt
from fxopt import planning
from fxopt.capture.installation import find_installation
from fxopt.errors import FxoptError
from fxopt.options import Options
from fxopt.remat.budget import check_budget
from fxopt.remat.devices import find_device
from fxopt.remat.given import find_difference
from fxopt.remat.offload import HOST_PS, hides_host
from fxopt.report.plan import FORMAT
from fxopt.report.records import MODEL_REGION
from fxopt.report.units import format_bytes


class Block(nn.Module):
    def __init__(self, inner: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, inner), nn.Linear(inner, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, count: int = 3, inner: int = 64) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Block(inner) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x.square().mean()


INPUTS = {"x": torch.randn(32, 8, 16)}


@pytest.fixture(scope="module")
def least() -> fxopt.Plan:
    """Return the plan of a stack for `INPUTS` that needs the least memory."""
    return fxopt.plan(Stack(), "min", INPUTS)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("12GiB", 12 * 2**30),
        ("1.5 gb", 1_500_000_000),
        ("1TiB", 2**40),
        (7, 7),
        (0.5, 0.5),
        (None, None),
        ("min", "min"),
    ],
)
def test_budgets_are_read(given, expected):
    assert check_budget(given) == expected


@pytest.mark.parametrize(
    "given", ["12 potatoes", "", "GiB", "-1GiB", "0GiB", -1, 0, 0.0, 1.5, True, [1], "1e3GiB"]
)
def test_malformed_budgets_are_refused_before_anything_happens(given):
    with pytest.raises(fxopt.FxoptError, match=r"memory_budget: expected bytes.*got"):
        fxopt.optimize(Stack(), memory_budget=given)
    with pytest.raises(fxopt.FxoptError, match="memory_budget: expected bytes"):
        fxopt.plan(Stack(), given, INPUTS)


def test_a_budget_below_the_smallest_peak_names_that_peak(least):
    smallest = least.smallest_bytes
    with pytest.raises(
        fxopt.FxoptError,
        match=rf"expected at least .*\({smallest} bytes\), got .*\n.*weights.* in the (back|for)ward of parts\.\d;",
    ):
        fxopt.plan(Stack(), smallest - 1, INPUTS)
    model = fxopt.optimize(Stack(), memory_budget=smallest - 1)
    with pytest.raises(fxopt.FxoptError, match=rf"expected at least .*\({smallest} bytes\)"):
        model(**INPUTS)
    assert fxopt.plan(Stack(), smallest, INPUTS).peak_bytes <= smallest


class WideBefore(Stack):
    """What stands before the blocks is so wide that the peak of a step is in the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 4096)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.first(x)[..., :16])


def test_of_a_peak_in_the_optimizer_no_smaller_batch_is_promised():
    expected = "optimizer's state, the rest are gradients and what the optimizer's step works on"
    with pytest.raises(fxopt.FxoptError, match=rf"no plan fits.*\n.*{expected}") as raised:
        fxopt.plan(WideBefore(), 1024, {"x": torch.randn(1, 1, 16)})
    assert "a smaller batch" not in str(raised.value)


def test_a_share_is_one_of_the_device():
    from fxopt.planning import finish_plan
    from fxopt.remat.devices import DEVICES
    from fxopt.surveying import options_for_plan, survey_model

    plan = finish_plan(*survey_model(Stack(), options_for_plan(0.25), INPUTS, DEVICES[0]))
    assert plan.limit_bytes == 20 * 2**30
    assert plan.peak_bytes <= plan.limit_bytes


def test_a_budget_above_the_device_is_said_and_unlimited(caplog):
    from fxopt.planning import finish_plan
    from fxopt.remat.devices import DEVICES
    from fxopt.surveying import options_for_plan, survey_model

    with caplog.at_level(logging.WARNING, logger="fxopt"):
        wanted = options_for_plan("500GiB")
        plan = finish_plan(*survey_model(Stack(), wanted, INPUTS, DEVICES[0]))
    assert plan.limit_bytes is None
    said = "500.00 GiB is more than H100 has (80.00 GiB): treated as unlimited"
    assert [said in record.message for record in caplog.records] == [True]


def test_what_an_automatic_budget_lacks_is_said_once(caplog):
    from fxopt.planning import finish_plan
    from fxopt.remat.devices import DEVICES
    from fxopt.surveying import options_for_plan, survey_model

    small = dataclasses.replace(DEVICES[0], memory_bytes=1000)
    with caplog.at_level(logging.WARNING, logger="fxopt"):
        plan = finish_plan(*survey_model(Stack(), options_for_plan("auto"), INPUTS, small))
    needed = format_bytes(plan.smallest_bytes)
    said = f"memory_budget='auto': on an assumed H100 970 B are free, the smallest step needs {needed}"
    assert [said in record.message for record in caplog.records] == [True]


def test_a_plan_for_another_model_or_shape_names_the_difference(least):
    with pytest.raises(fxopt.FxoptError, match="expected 2 blocks of Stack, got 3 of Stack"):
        fxopt.optimize(Stack(2), plan=least)(**INPUTS)
    with pytest.raises(fxopt.FxoptError, match="expected at most 256 tokens a call, got 512"):
        fxopt.optimize(Stack(), plan=least)(torch.randn(64, 8, 16))
    odd = dataclasses.replace(
        least,
        decisions=tuple(
            dataclasses.replace(d, saved=tuple(dataclasses.replace(r, op="aten.conv#0") for r in d.saved))
            for d in least.decisions
        ),
    )
    with pytest.raises(fxopt.FxoptError, match=r"got aten\.conv#0, which it does not compute"):
        fxopt.optimize(Stack(), plan=odd)(**INPUTS)


@pytest.mark.parametrize(
    ("budget", "inner"),
    [
        ("min", 32),
        (None, 96),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (("min", 96), (None, 32))),
    ],
)
def test_a_plan_for_blocks_of_another_width_names_the_value(budget, inner):
    plan = fxopt.plan(Stack(), budget, INPUTS)
    with pytest.raises(fxopt.FxoptError, match=rf"another model.* of 64 items a token, got {inner}"):
        fxopt.optimize(Stack(inner=inner), plan=plan)(**INPUTS)


def test_a_plan_that_more_would_be_saved_or_trained_under_than_it_says_is_refused():
    plan = fxopt.plan(Stack(), None, INPUTS)
    with pytest.raises(fxopt.FxoptError, match=r"another model.* expected for a block at most .* saved, got"):
        fxopt.optimize(Stack().double(), plan=plan)(x=INPUTS["x"].double())
    model = Stack()
    for part in model.parts:
        part.down.requires_grad_(False)
    less = fxopt.plan(model, "min", INPUTS)
    with pytest.raises(fxopt.FxoptError, match=r"another model"):
        fxopt.optimize(Stack(), plan=less)(**INPUTS)
    made = less.decisions[0]
    more = dataclasses.replace(made, gradient_bytes=2 * made.gradient_bytes)
    assert find_difference(made, made, less.tokens, less.tokens) == ""
    assert re.fullmatch(r"at most .* of gradients, got .*", find_difference(made, more, 256, 256))
    assert find_difference(made, more, 256, 256, whole_gradients=False) == ""


def test_a_plan_serves_another_batch_and_fewer_tokens(least):
    model = fxopt.optimize(Stack(), plan=least)
    for shape in ((8, 32, 16), (3, 8, 16)):
        model(torch.randn(shape)).backward()
    assert fxopt.explain(model).fallbacks == ()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("layers", [["parts.0", 9]], "decision 9 of"),
        ("layers", "x", "unpack"),
        ("tokens", "many", "tokens is 'many'"),
        ("peak_bytes", True, "peak_bytes is True"),
    ],
)
def test_a_plan_whose_text_was_damaged_is_refused_when_it_is_read(name, value, said, least):
    data = json.loads(least.to_json())
    with pytest.raises(fxopt.FxoptError, match=rf"expected the JSON text of a plan.*{said}"):
        fxopt.Plan.from_json(json.dumps({**data, name: value}))


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        ("min", 2),
        (None, 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("min", 3), (None, 1))),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (("min", 1), (None, 2))),
    ],
)
def test_blocks_before_all_that_trains_save_nothing_and_are_planned(budget, count):
    def make() -> Stack:
        torch.manual_seed(0)
        model = Stack()
        model.scale = nn.Parameter(torch.ones(1))
        model.register_forward_hook(lambda module, _, value: value * module.scale)
        for part in model.parts[:count]:
            part.requires_grad_(False)
        return model

    stock, model = make(), make()
    plan = fxopt.plan(make(), budget, INPUTS)
    saved = [plan.decisions[number].saved_bytes for _, number in plan.layers]
    assert [size > 0 for size in saved] == [False] * count + [True] * (3 - count)
    fxopt.optimize(model, memory_budget=budget)
    given = fxopt.optimize(make(), plan=fxopt.Plan.from_json(plan.to_json()))
    for each in (stock, model, given):
        for _ in range(2):
            each.zero_grad()
            each(**INPUTS).backward()
    for each in (model, given):
        assert fxopt.explain(each).fallbacks == ()
        (carried_out,) = fxopt.explain(each).plans
        assert carried_out.layers == plan.layers
        assert (carried_out.budget, carried_out.limit_bytes) == (plan.budget, plan.limit_bytes)
        for ours, theirs in zip(each.parameters(), stock.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_what_is_no_plan_is_refused(least):
    with pytest.raises(fxopt.FxoptError, match=r"plan: expected what fxopt\.plan returns, got dict"):
        fxopt.optimize(Stack(), plan={})  # pyright: ignore
    with pytest.raises(fxopt.FxoptError, match="memory_budget: expected none beside a plan"):
        fxopt.optimize(Stack(), plan=least, memory_budget="min")
    with pytest.raises(fxopt.FxoptError, match="expected the JSON text of a plan, got 'no plan'"):
        fxopt.Plan.from_json("no plan")
    with pytest.raises(fxopt.FxoptError, match="rooflines is 'mm: no time'"):
        fxopt.Plan.from_json(json.dumps({**json.loads(least.to_json()), "rooflines": "mm: no time"}))
    with pytest.raises(fxopt.FxoptError, match=r"example_inputs: expected a dict .*, got Tensor"):
        fxopt.plan(Stack(), "min", torch.ones(2, 4))  # pyright: ignore
    with pytest.raises(fxopt.FxoptError, match=f"expected format {FORMAT} of a plan, got 99"):
        fxopt.Plan.from_json(least.to_json().replace(f'"format": {FORMAT}', '"format": 99'))


def test_inputs_on_another_device_are_refused():
    with pytest.raises(
        fxopt.FxoptError, match="example_inputs: x is on meta, expected the model's device cpu"
    ):
        fxopt.plan(Stack(), "min", {"x": torch.randn(4, 8, 16, device="meta")})


def test_a_model_without_blocks_has_no_plan():
    with pytest.raises(fxopt.FxoptError, match="has no repeated blocks"):
        fxopt.plan(nn.Linear(4, 4), "min", {"input": torch.randn(2, 4)})


def test_host_memory_that_cannot_be_given_is_refused():
    with pytest.raises(
        fxopt.FxoptError, match=r"max_host_memory: expected at most the .* that are free, got"
    ):
        fxopt.optimize(Stack(), max_host_memory=2**60)
    for given in ("12 potatoes", -1, 0.5, True):
        with pytest.raises(fxopt.FxoptError, match="max_host_memory: expected bytes"):
            fxopt.optimize(Stack(), max_host_memory=given)  # pyright: ignore
    plan = fxopt.plan(Stack(8), "min", {"x": torch.randn(256, 16, 16)}, max_host_memory="64MiB")
    assert plan.host_bytes > 0
    with pytest.raises(fxopt.FxoptError, match=r"plan: keeps .* on the host, expected at most 0 B"):
        fxopt.optimize(Stack(8), plan=plan, max_host_memory=0)(**INPUTS)


def test_half_of_the_free_host_memory_is_used_on_a_gpu_and_shared_by_its_ranks(monkeypatch):
    monkeypatch.setattr(planning, "free_host_bytes", lambda: 64)
    found = []
    for place, ranks in (("cpu", "1"), ("cuda", "1"), ("cuda", "4")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        found.append(planning._host_bytes(Options(()), torch.device(place)))
    assert found == [0, 32, 8]
    assert planning._host_bytes(Options((), max_host_memory=5), torch.device("cuda")) == 5


def test_what_is_tied_outside_the_blocks_is_known_and_workspaces_of_a_gpu():
    model = Stack()
    model.table = nn.Embedding(8, 16)
    assert planning.find_tied_bytes(model, ("blocks.0",), list(model.parameters())) == 0
    model.head = nn.Linear(16, 8, bias=False)
    model.head.weight = model.table.weight
    assert planning.find_tied_bytes(model, ("blocks.0",), list(model.parameters())) == 8 * 16 * 4
    assert planning.find_tied_bytes(model, ("blocks.0",), []) == 0, "an engine holds it"
    model.head.weight.requires_grad_(False)
    assert planning.find_tied_bytes(model, ("blocks.0",), list(model.parameters())) == 0
    found = [planning.workspace_bytes(torch.device("cpu"), find_device(name)) for name in ("H100", "A100")]
    assert found == [2 * 32 * 2**20, 2 * (2 * 4096 + 8 * 16) * 1024]
    assert planning.workspace_bytes(torch.device("cpu")) == 0


def test_unasked_a_block_offloads_only_where_it_runs_longer_than_the_host_launches_it(monkeypatch):
    inputs = {"x": torch.randn(256, 16, 16)}
    monkeypatch.setattr(planning, "_host_bytes", lambda options, place: 2**26)
    found = []
    for hides in (False, True):
        monkeypatch.setattr("fxopt.remat.planner.hides_host", lambda joint, hides=hides: hides)
        found.append(fxopt.plan(Stack(4), "min", inputs).host_bytes > 0)
        found.append(fxopt.plan(Stack(4), "min", inputs, max_host_memory="64MiB").host_bytes > 0)
    assert found == [False, True, True, True]


def test_a_plan_is_made_with_the_patterns_that_will_be_used():
    inputs = {"x": torch.randn(4, 8, 16)}
    found = {residual.op for d in fxopt.plan(Stack(), None, inputs).decisions for residual in d.saved}
    without = fxopt.plan(Stack(), None, inputs, disable=("activation",))
    assert any(op.startswith("fxopt.") for op in found)
    assert not any(residual.op.startswith("fxopt.") for d in without.decisions for residual in d.saved)
    model = fxopt.optimize(Stack(), plan=without, disable=("activation",))
    model(**inputs).backward()


class TwoStacks(nn.Module):
    """Blocks over patches, then blocks over their means: each stack has its own count of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Block() for _ in range(2))
        self.second = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.first:
            x = part(x)
        x = x.unflatten(1, (-1, 4)).mean(2)
        for part in self.second:
            x = part(x)
        return x.square().mean()


@pytest.mark.slow
def test_stacks_with_token_counts_of_their_own_have_one_plan():
    model, inputs = TwoStacks(), {"x": torch.randn(32, 8, 16)}
    plan = fxopt.plan(model, None, inputs)
    assert plan.tokens == 256
    saved = [plan.decisions[number].saved_bytes for _, number in plan.layers]
    assert saved[0] == saved[1] == 4 * saved[2] == 4 * saved[3]
    fxopt.optimize(model, memory_budget=None)
    for size in (32, 24, 32, 64):
        model(torch.randn(size, 8, 16)).backward()
    plans = fxopt.explain(model).plans
    assert [plan.tokens for plan in plans] == [256, 512]
    for layer in range(4):
        first, second = (plan.decisions[plan.layers[layer][1]].saved_bytes for plan in plans)
        assert second == 2 * first


@pytest.mark.slow
def test_a_tail_captured_again_is_counted_once():
    model = Stack()
    fxopt.optimize(model, memory_budget=None)
    counts = []
    for inputs in (torch.randn(8, 8, 16), torch.randn(16, 8, 16), torch.randn(16, 8, 16, requires_grad=True)):
        model(inputs).backward()
        counts.append(len(fxopt.explain(model).plans[-1].after))
    assert counts == [1, 1, 1]
    assert sum(c.region == MODEL_REGION for c in find_installation(model).ledger.captures) > 1


@pytest.mark.parametrize(("less", "hides"), [(0, True), (1, False)])
def test_a_block_hides_the_host_where_it_runs_as_long_as_that_takes_for_it(less, hides):
    joint = types.SimpleNamespace(compute_cost=HOST_PS - less)
    assert hides_host(joint) is hides  # pyright: ignore[reportArgumentType]


def test_a_value_on_the_host_tells_a_graph_apart_from_one_that_keeps_it():
    """Caches know graphs by it, and backward may write over what lies on the device only."""
    told: dict[Any, list[str]] = {0: [], "64MiB": []}
    inputs = {"x": torch.randn(256, 16, 16)}
    for host, texts in told.items():
        model = fxopt.optimize(Stack(4), memory_budget="min", max_host_memory=host)
        planner = find_installation(model).planner
        mark = planner.mark_block
        planner.mark_block = lambda *args, mark=mark, texts=texts: texts.append(mark(*args)) or texts[-1]
        model(**inputs).backward()
    assert all(text.endswith(" []") for text in told[0])
    assert not all(text.endswith(" []") for text in told["64MiB"])


def test_blocks_that_train_after_all_are_planned_within_the_budget():
    inputs = {"x": torch.randn(32, 8, 16)}
    limit = fxopt.plan(Stack(6), "min", inputs).peak_bytes * 5 // 4
    model = Stack(6)
    model.parts[:5].requires_grad_(False)
    fxopt.optimize(model, memory_budget=limit)
    for _ in range(2):
        model(**inputs).backward()
    model.requires_grad_(True)
    model(**inputs).backward()
    plan = fxopt.explain(model).plans[-1]
    assert plan.peak_bytes <= limit
    assert not fxopt.explain(model).fallbacks
    assert all(plan.decisions[number].saved_bytes for _, number in plan.layers)


class Normed(nn.Module):
    """A block that writes to its buffers, as vision and audio models have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.gelu(self.norm(self.linear(x)))


class Checkpointed(GradientCheckpointingLayer):
    """The same as transformers would have it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Normed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


@pytest.mark.parametrize("budget", ["min", pytest.param(None, marks=pytest.mark.slow), "checkpointed"])
def test_blocks_that_write_to_their_buffers_train_as_stock(budget: Any) -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(*((Checkpointed if budget == "checkpointed" else Normed)() for _ in range(3)))
    model = copy.deepcopy(stock)
    fxopt.optimize(model, **({} if budget == "checkpointed" else {"memory_budget": budget}))
    if budget == "checkpointed":
        for block in model:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
    for size in (4, 4, 6):
        x = torch.randn(size, 16)
        for each in (model, stock):
            each.zero_grad()
            each(x).square().mean().backward()
        assert all(
            torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), stock.parameters(), strict=True)
        )
        assert all(map(torch.equal, model.buffers(), stock.buffers()))
    report = fxopt.explain(model)
    assert not report.fallbacks
    if budget in ("min", "checkpointed"):
        assert {plan.budget for plan in report.plans} == {"min"}


@pytest.mark.parametrize(
    ("sizes", "budget"),
    [
        ((3, 0, 3), "min"),
        pytest.param((0, 3), None, marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (((3, 0, 3), None), ((0, 3), "min"))),
    ],
)
def test_a_batch_without_rows_has_no_plan(budget: Any, sizes: tuple[int, ...]) -> None:
    stock = Stack(2).train()
    model = copy.deepcopy(stock)
    fxopt.optimize(model, memory_budget=budget)
    for size in sizes:
        x = torch.randn(size, 8, 16)
        for each in (model, stock):
            each.zero_grad()
            each(x).nansum().backward()
        assert all(
            torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), stock.parameters(), strict=True)
        )
    report = fxopt.explain(model)
    assert not report.fallbacks
    assert [plan.tokens for plan in report.plans] == [24]
    with pytest.raises(FxoptError, match="example_inputs: expected at least one token, got none"):
        fxopt.plan(Stack(2), budget, {"x": torch.randn(0, 8, 16)})


class Widening(nn.Module):
    """A block whose number of values depends on the batch, so that captures of it have menus of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.up(x)
        if x.shape[0] % 2:
            inner = inner.exp().sin().tanh() * inner.cos()
        return x + self.down(torch.nn.functional.gelu(inner))


@pytest.mark.slow
def test_plans_stay_what_they_were_when_blocks_are_captured_anew() -> None:
    model = nn.Sequential(*(Widening() for _ in range(3)))
    fxopt.optimize(model, memory_budget="min")
    told: dict[int, str] = {}
    for size in (3, 8, 25, 64):  # more than twice as many tokens each
        model(torch.randn(size, 16)).square().mean().backward()
        for plan in fxopt.explain(model).plans:
            assert told.setdefault(plan.tokens, plan.to_json()) == plan.to_json()
    assert sorted(told) == [3, 8, 25, 64]
