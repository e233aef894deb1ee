"""Plans under which some rows of a value wait on the host and the others are computed again, on tiny models."""

from __future__ import annotations

import dataclasses

import pytest

import fxopt
from fxopt.capture.installation import find_installation
from fxopt.offline import Setting, plan_offline
from fxopt.remat import views
from fxopt.remat.launching import AHEAD_MS
from fxopt.report.plan import SHARES
from fxopt.report.plan_table import step_parts

SHAPE = (4, 96)
HOST = "64MiB"
SHARE = 5
GATE = "fxopt.lora_linear#2.0"
"""The first result of the third op of its kind: behind queries, keys and values, and what follows attention."""


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    monkeypatch.setattr(views, "SMALLEST", 128)


def make(tools):
    return tools.make_trained("llama", True, num_hidden_layers=4)


def with_rows_kept(plan):
    """Return `plan` with rows of the gate on the host wherever a block leaves values there and computes that again."""
    decisions = []
    for decision in plan.decisions:
        again = next((r for r in decision.recomputed if r.op == f"{GATE}/again"), None)
        if decision.offloaded and again is not None:
            kept = dataclasses.replace(again, op=f"{GATE}/rows")
            decision = dataclasses.replace(
                decision, part_of=GATE, sixteenths=SHARE, offloaded=(*decision.offloaded, kept)
            )
        decisions.append(decision)
    return dataclasses.replace(plan, decisions=tuple(decisions))


@pytest.mark.parametrize(
    "lowering",
    [
        pytest.param("plain", marks=pytest.mark.exhaustive),
        pytest.param("inductor", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_the_whole(lowering, tools):
    batch = tools.make_batch(SHAPE, padded="none", device="cpu")
    whole, model = make(tools), make(tools)
    fxopt.optimize(whole, lowering=lowering)
    expected = tools.run_step(whole, batch)
    plan = fxopt.plan(model, "min", batch, max_host_memory=HOST)
    fxopt.optimize(model, plan=with_rows_kept(plan), lowering=lowering)
    step = tools.run_step(model, batch)
    for name, gradient in expected.gradients.items():
        assert tools.relative(step.gradients[name], gradient) < 1e-5, name
    installation = find_installation(model)
    assert not installation.ledger.fallbacks
    (carried_out,) = installation.planner.plans
    parts = [r for d in carried_out.decisions for r in d.offloaded if r.op.endswith("/rows")]
    assert parts
    assert all(r.shape == (384 * SHARE // SHARES, 128) for r in parts)
    loss = model(**batch).loss
    assert installation.offloader.memory.used_bytes == carried_out.host_bytes > plan.host_bytes
    loss.backward()
    assert installation.offloader.memory.used_bytes == 0


@pytest.mark.slow
def test_rows_leave_where_the_bus_has_time_for_no_more_and_the_step_is_faster(tmp_path, monkeypatch):
    monkeypatch.setattr(views, "SMALLEST", 2048)
    sizes = ("num_hidden_layers=8", "hidden_size=3584", "intermediate_size=18944", "vocab_size=1024")
    fields = (*sizes, "num_attention_heads=28", "num_key_value_heads=4")
    setting = Setting(
        None, "qwen2", "min", 2, 4096, True, "H100", four_bit=True, host_memory="64GiB", fields=fields
    )
    _, curve = plan_offline(setting, tmp_path / "curve.png")
    plan = next(plan for plan in curve if any(decision.part_of for decision in plan.decisions))
    blocks = [plan.decisions[number] for _, number in plan.layers]
    busy_ms = plan.update_ms + sum(decision.compute_ms + decision.extra_ms for decision in blocks)
    busy_ms += sum(decision.compute_ms + decision.chunk_ms for decision in plan.after)
    assert plan.step_ms == pytest.approx(busy_ms + plan.idle_ms)
    assert plan.idle_ms == AHEAD_MS
    for each in curve:
        assert sum(ms for ms, _ in step_parts(each)) == pytest.approx(each.step_ms)
    for decision in plan.decisions:
        rows = [r.shape for r in decision.offloaded if r.op == f"{decision.part_of}/rows"]
        assert rows == ([(8192 * decision.sixteenths // SHARES, 18944)] if decision.part_of else [])
        assert not (decision.part_of and decision.wait_ms), "what waits leaves no rows beside"
    monkeypatch.setattr(views, "SMALLEST", 8192)
    within = dataclasses.replace(setting, budget=str(plan.limit_bytes))
    without, _ = plan_offline(within, tmp_path / "curve.png")
    assert not any(decision.part_of for decision in without.decisions)
    assert plan.peak_bytes <= plan.limit_bytes
    assert plan.step_ms < 0.99 * without.step_ms


def make_plan(model, tools):
    """Return a plan with rows of the gate on the host, as it comes back from a file."""
    batch = tools.make_batch(SHAPE, padded="none", device="cpu")
    plan = with_rows_kept(fxopt.plan(model, "min", batch, max_host_memory=HOST))
    read = fxopt.Plan.from_json(plan.to_json())
    assert read == plan
    assert f"computes {SHARES - SHARE}/{SHARES} of the rows of {GATE} again, the others are kept" in str(read)
    return read


@pytest.mark.slow
def test_a_plan_with_rows_kept_is_followed(tools):
    """Its gradients are held against those of the whole above, and fewer tokens are passed below."""
    model = make(tools)
    fxopt.optimize(model, plan=make_plan(model, tools))
    loss = model(**tools.make_batch(SHAPE, padded="none", device="cpu")).loss
    installation = find_installation(model)
    assert not installation.ledger.fallbacks
    (carried_out,) = installation.planner.plans
    assert installation.offloader.memory.used_bytes == carried_out.host_bytes
    loss.backward()
    assert installation.offloader.memory.used_bytes == 0


@pytest.mark.slow
def test_a_plan_is_followed_with_fewer_tokens_and_refused_where_it_was_changed(tools):
    model = make(tools)
    plan = make_plan(model, tools)
    fxopt.optimize(model, plan=plan)
    stock = make(tools)
    for shape in ((1, 12), SHAPE, (2, 7)):
        batch = tools.make_batch(shape, padded="none", device="cpu")
        step, expected = tools.run_step(model, batch), tools.run_step(stock, batch)
        for name, gradient in expected.gradients.items():
            assert tools.relative(step.gradients[name], gradient) < 1e-4, (shape, name)
    notes = fxopt.explain(model).notes
    assert [
        note
        for note in notes
        if "is for 384 tokens a call: in shorter calls, and where lengths change" in note
    ]
    wrong = tuple(dataclasses.replace(d, sixteenths=99 if d.part_of else 0) for d in plan.decisions)
    other = make(tools)
    fxopt.optimize(other, plan=dataclasses.replace(plan, decisions=wrong))
    with pytest.raises(fxopt.FxoptError, match=f"expected for .* got rows of {GATE}|that it can carry out"):
        tools.run_step(other, tools.make_batch(SHAPE, padded="none", device="cpu"))
