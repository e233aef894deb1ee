"""What was timed costs what it took; the rest its roofline; a later process reads the file."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

import fxopt
from fxopt.kernels import launch
from fxopt.options import Options
from fxopt.planning import facts_of
from fxopt.remat.devices import DEVICES, OTHER
from fxopt.remat.joint import read_joint
from fxopt.remat.measured import HANGS, RANKS, ROOFLINES, Measured, is_timed, key_of
from fxopt.remat.timings import Timing, read_timings, write_timings
from fxopt.timing import find_measured

aten = torch.ops.aten
INPUTS = {"input": torch.randn(256, 64)}


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(x).relu()


def make_model():
    return nn.Sequential(*(Block() for _ in range(3)))


class FakeTimer:
    """Says of each trial what it is told to, and counts."""

    def __init__(self, answer=Timing(7.0)) -> None:  # noqa: B008
        self.answer, self.trials, self.in_step = answer, [], 0

    def __call__(self, trials, in_step):
        self.trials += trials
        self.in_step = in_step
        return [self.answer] * len(trials)


def graph_of(make):
    """Return a graph of two matrices, one of whole numbers, and what `make` does to them."""
    graph = fx.Graph()
    with FakeTensorMode():
        values = torch.empty(64, 64), torch.empty(64, 64), torch.empty(64, 64, dtype=torch.int64)
        inputs = [graph.placeholder(name) for name in "abc"]
        for node, value in zip(inputs, values, strict=True):
            node.meta["val"] = value

        def call(target, *args):
            node = graph.call_function(target, args)
            node.meta["val"] = target(*fx.map_arg(args, lambda item: item.meta["val"]))
            return node

        graph.output((make(call, *inputs),))
    return graph


def products(call, a, b, c):
    return call(
        aten.mm.default, call(aten.mm.default, call(aten.mm.default, a, b), b), call(aten.t.default, b)
    )


def test_equal_calls_are_timed_once_and_other_strides_apart():
    timer = FakeTimer()
    graph = graph_of(products)
    costs = Measured(timer).find_costs(graph, (), OTHER, {})
    assert [trial.node.target for trial in timer.trials] == [aten.mm.default] * 2
    assert list(costs.values()) == [7_000_000_000] * 3
    assert timer.in_step == 3 * 64 * 64 * 4
    assert all(trial.bytes == 3 * 64 * 64 * 4 for trial in timer.trials)


def test_the_models_own_tensors_are_not_counted_as_the_steps():
    timer = FakeTimer()
    Measured(timer).find_costs(graph_of(products), {1}, OTHER, {})
    assert timer.in_step == 2 * 64 * 64 * 4, "a view of a weight is in its memory"
    assert timer.trials[0].bytes == 3 * 64 * 64 * 4, "but what is timed has copies of its own"


def test_what_is_timed_costs_what_it_took_and_is_counted():
    graph = graph_of(lambda call, a, b, c: call(aten.add.Tensor, call(aten.mm.default, a, b), a))
    measured = Measured(FakeTimer()).find_costs(graph, (), OTHER, {})
    joint = read_joint(graph, (), OTHER, fuses=False, measured=measured)
    stock = read_joint(graph, (), OTHER, fuses=False)
    assert joint.measured_cost == 7_000_000_000
    assert stock.measured_cost == 0
    added = next(node for node in graph.nodes if node.target is aten.add.Tensor)
    places = {node: place for place, node in enumerate(joint.forward)}
    assert joint.dag.values[places[added]].cost == stock.dag.values[places[added]].cost
    assert joint.compute_cost == 7_000_000_000 + (stock.dag.values[places[added]].cost or 0)


def test_what_is_fused_mutates_or_is_somebody_elses_is_never_timed():
    def make(call, a, b, c):
        return call(aten.add_.Tensor, call(aten.cos.default, a), b)

    assert not any(map(is_timed, graph_of(make).nodes))
    with torch.library._scoped_library("fxopt_tests", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        torch.library.register_fake("fxopt_tests::twice", torch.empty_like, lib=library)
        graph = graph_of(lambda call, a, b, c: call(torch.ops.fxopt_tests.twice.default, a))
        assert not any(map(is_timed, graph.nodes))


def test_an_op_whose_whole_numbers_decide_its_work_is_not_timed():
    timer = FakeTimer()
    measured = Measured(timer)

    def make(call, a, b, c):
        return call(
            torch.ops.fxopt.cross_entropy.default,
            a,
            call(aten.select.int, c, 0, 0),
            None,
            -100,
            True,
            1.0,
            0.0,
            0.0,
            0.0,
            False,
        )

    graph = graph_of(make)
    assert measured.find_costs(graph, (), OTHER, {}) == {}
    assert timer.trials == []
    assert measured.left == (f"fxopt::cross_entropy: {HANGS}",)
    assert len(Measured(timer).find_costs(graph, (), OTHER, launch.DECLARED)) == 1, "labels decide nothing"


def test_a_reason_is_told_and_not_asked_for_again(tmp_path):
    timer = FakeTimer("no memory today")
    measured = Measured(timer, tmp_path / "timings.json")
    for _ in range(2):
        assert measured.find_costs(graph_of(products), (), OTHER, {}) == {}
    assert len(timer.trials) == 2
    assert measured.left == ("aten::mm: no memory today",)
    assert not (tmp_path / "timings.json").exists(), "another process may have memory"


def test_a_second_process_times_nothing(tmp_path):
    path = tmp_path / "folder" / "timings.json"
    first = Measured(FakeTimer(), path).find_costs(graph_of(products), (), OTHER, {})
    timer = FakeTimer(Timing(1.0))
    second = Measured(timer, path).find_costs(graph_of(products), (), OTHER, {})
    assert timer.trials == []
    assert list(first.values()) == list(second.values())
    assert os.listdir(path.parent) == [path.name], "what is written in between is gone"


def test_two_writers_lose_nothing_of_each_other(tmp_path):
    path = tmp_path / "timings.json"
    write_timings(path, {"a": Timing(1.0)})
    write_timings(path, {"b": Timing(2.0)})
    assert read_timings(path) == {"a": Timing(1.0), "b": Timing(2.0)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 2}',
        '{"format": 2, "timings": {"a": {"ms": "much"}}}',
        '{"format": 2, "timings": {"a": 3}}',
    ],
)
def test_a_broken_file_is_ignored_with_a_line_in_the_log(tmp_path, caplog, text):
    path = tmp_path / "timings.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "fxopt"):
        timer = FakeTimer()
        assert Measured(timer, path).find_costs(graph_of(products), (), OTHER, {})
    assert len(timer.trials) == 2
    assert f"{path}: ignored, expected timings of ops" in caplog.text
    assert len(read_timings(path)) == 2, "it is written anew"


def test_a_file_of_another_format_is_as_good_as_none(tmp_path):
    path = tmp_path / "timings.json"
    path.write_text(json.dumps({"format": 99, "timings": "of another kind"}))
    assert read_timings(path) == {}


def test_the_key_tells_ops_forms_and_attributes():
    def make(call, a, b, c):
        turned = call(aten.t.default, a)
        return call(aten.mm.default, turned, b), call(aten.addmm.default, a, a, b)

    keys = [key_of(node) for node in graph_of(make).nodes if is_timed(node)]
    assert keys[0].startswith("aten::mm ")
    assert "torch.float32 [64, 64] [1, 64] cpu" in keys[0]
    assert keys[1].startswith("aten::addmm ")
    assert "torch.float32 [64, 64] [64, 1] cpu" in keys[1]


def test_a_plan_says_how_much_of_its_time_was_measured(monkeypatch, tmp_path):
    model = make_model()
    stock = fxopt.plan(model, None, INPUTS)
    assert stock.measured_ms == 0
    assert stock.measured_share == 0
    assert stock.rooflines == ()
    assert "0% of the device's work from ops timed on it" in str(stock)
    monkeypatch.setattr(
        "fxopt.planning.find_measured", lambda place, spare, owned: Measured(FakeTimer(), tmp_path / "t.json")
    )
    plan = fxopt.plan(model, None, INPUTS)
    products = 3 * 3 - 1  # the first block's input needs no gradient
    assert plan.measured_ms == pytest.approx(7.0 * products)
    rest = plan.step_ms - plan.measured_ms
    assert 0 < rest < stock.step_ms
    assert f"{plan.measured_share:.0%} of the device's work from ops timed on it" in str(plan)
    assert fxopt.Plan.from_json(plan.to_json()) == plan
    again = fxopt.plan(model, "min", INPUTS)
    assert again.recompute_ms > 7
    assert again.measured_ms == pytest.approx(7.0 * products + again.recompute_ms, abs=0.01), (
        "products run again"
    )


def test_a_plan_names_what_was_not_timed(monkeypatch):
    monkeypatch.setattr(
        "fxopt.planning.find_measured", lambda place, spare, owned: Measured(FakeTimer("no time is left"))
    )
    plan = fxopt.plan(make_model(), None, INPUTS)
    assert plan.rooflines == ("aten::mm: no time is left",)
    assert "  by datasheet: aten::mm: no time is left" in str(plan)


def test_a_named_device_costs_its_roofline(monkeypatch):
    monkeypatch.setattr(
        "fxopt.planning.find_measured", lambda place, spare, owned: pytest.fail("nothing of it is here")
    )
    model = make_model()
    assert facts_of(model, ("0", "1", "2"), Options(()), DEVICES[0]).measured is ROOFLINES


def test_ranks_of_one_group_time_nothing(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    measured = find_measured(torch.device("cuda", 0))
    assert measured.left == (f"every op: {RANKS}",)
    assert measured.find_costs(graph_of(products), (), OTHER, {}) == {}
    assert find_measured(torch.device("cpu")) is ROOFLINES
