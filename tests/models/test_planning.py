"""Plans carried out on tiny models: no bit of a gradient changes, and what is saved is what was predicted."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch

import fxopt
from fxopt.capture.installation import find_installation
from fxopt.demo.training import count_saved_bytes
from fxopt.report.records import MODEL_REGION

SHAPE = (4, 96)


def batch_of(tools, shape=SHAPE):
    return tools.make_batch(shape, padded="none", device="cpu")


def plans_of(model):
    installation = find_installation(model)
    assert installation is not None
    assert installation.planner is not None
    assert not installation.ledger.fallbacks
    return installation.planner.plans


def saved_per_block(model, batch):
    """Return the bytes each block saves for backward in one forward, in order, by hooks on saved tensors."""
    installation = find_installation(model)
    found: dict[str, int] = {}
    runs = {calls: calls._run for calls in installation._calls.values()}

    def counted(run):
        def wrapped(path, block, recorders, args, kwargs):
            with count_saved_bytes(model) as saved:
                value = run(path, block, recorders, args, kwargs)
            found[path] = saved.total
            return value

        return wrapped

    for calls, run in runs.items():
        calls._run = counted(run)
    try:
        model(**batch)
    finally:
        for calls in runs:
            del calls._run
    return found


@pytest.mark.parametrize(
    ("arch", "adapted", "with_one_between"),
    [
        ("llama", False, False),
        pytest.param("llama", True, True, marks=pytest.mark.slow),
        pytest.param("gemma2", False, False, marks=pytest.mark.slow),
        *(
            pytest.param(arch, adapted, True, marks=pytest.mark.exhaustive)
            for arch, adapted in (("llama", False), ("qwen2", True), ("gemma2", False))
        ),
    ],
)
def test_no_plan_changes_a_bit_and_residuals_are_as_predicted_byte_for_byte(
    arch, adapted, with_one_between, tools
):
    unplanned = tools.make_trained(arch, adapted)
    batch = batch_of(tools)
    budgets = [None, "min"]
    if with_one_between:
        bounds = [fxopt.plan(unplanned, budget, batch).peak_bytes for budget in budgets]
        budgets.insert(1, sum(bounds) // 2)
    fxopt.optimize(unplanned)
    reference = tools.run_step(unplanned, batch)
    totals = []
    for budget in budgets:
        model = tools.make_trained(arch, adapted)
        fxopt.optimize(model, memory_budget=budget)
        step = tools.run_step(model, batch)
        assert torch.equal(step.loss, reference.loss)
        assert step.gradients.keys() == reference.gradients.keys()
        for name, gradient in reference.gradients.items():
            assert torch.equal(step.gradients[name], gradient), (budget, name)
        (plan,) = plans_of(model)
        predicted = {path: sum(r.bytes for r in plan.decisions[n].saved) for path, n in plan.layers}
        assert saved_per_block(model, batch) == predicted
        totals.append(plan.residual_bytes)
        assert plan.limit_bytes is None or plan.peak_bytes <= plan.limit_bytes
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < totals[0] / 2


@pytest.mark.slow
def test_what_follows_the_blocks_is_predicted_too(tools):
    model = tools.make_trained("llama", adapted=True)
    # its embedding is frozen, so nothing before the blocks saves anything
    batch = batch_of(tools)
    fxopt.optimize(model, memory_budget="min")
    tools.run_step(model, batch)
    with count_saved_bytes(model) as saved:
        loss = model(**batch).loss
    del loss
    (plan,) = plans_of(model)
    assert saved.total == plan.residual_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "adapted"), [pytest.param("gemma2", False, marks=pytest.mark.exhaustive), ("llama", True)]
)
def test_a_plan_is_made_before_the_first_step_and_carried_out_as_it_is(arch, adapted, tools):
    # With adapters the first block is another form.
    model, batch = tools.make_trained(arch, adapted), batch_of(tools)
    plan = fxopt.plan(model, "min", batch)
    read = fxopt.Plan.from_json(plan.to_json())
    assert read == plan
    fxopt.optimize(model, plan=read)
    tools.run_step(model, batch)
    (carried_out,) = plans_of(model)
    assert carried_out.layers == plan.layers
    assert carried_out.decisions == plan.decisions
    assert carried_out.residual_bytes == plan.residual_bytes
    assert "recomputed" in str(plan)


def test_planning_changes_nothing(tools):
    model, batch = tools.make_trained("llama"), batch_of(tools)
    before = copy.deepcopy(model.state_dict())
    fxopt.plan(model, "min", batch)
    assert find_installation(model) is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_on_a_cpu_nothing_is_planned_unless_asked_for(tools):
    model = tools.make_trained("llama")
    fxopt.optimize(model)
    tools.run_step(model, batch_of(tools))
    assert plans_of(model) == ()
    assert fxopt.explain(model).plans == ()


@pytest.mark.slow
def test_ten_budgets_are_monotonic(tools):
    model, batch = tools.make_trained("qwen2", adapted=True), batch_of(tools)
    low, high = (fxopt.plan(model, budget, batch) for budget in ("min", None))
    span = high.peak_bytes - low.smallest_bytes
    plans = [fxopt.plan(model, low.smallest_bytes + span * step // 9, batch) for step in range(10)]
    assert [plan.recompute_ms for plan in plans] == sorted((p.recompute_ms for p in plans), reverse=True)
    assert [plan.step_ms for plan in plans] == sorted((p.step_ms for p in plans), reverse=True)
    assert all(plan.peak_bytes <= plan.limit_bytes for plan in plans)
    assert plans[-1].recompute_ms == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(("order", "use_reentrant"), [("after", False), ("before", True)])
def test_checkpointing_means_the_smallest_plan(order, use_reentrant, tools):
    batch = batch_of(tools)
    smallest = tools.make_trained("llama")
    fxopt.optimize(smallest, memory_budget="min")
    reference = tools.run_step(smallest, batch)
    model = tools.make_trained("llama")
    switch = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    if order == "before":
        model.gradient_checkpointing_enable(**switch)
    fxopt.optimize(model)
    if order == "after":
        tools.run_step(model, batch)
        assert plans_of(model) == ()
        model.gradient_checkpointing_enable(**switch)
    step = tools.run_step(model, batch)
    (plan,) = plans_of(model)
    assert plan.budget == "min"
    assert plan.layers == plans_of(smallest)[0].layers
    assert saved_per_block(model, batch) == saved_per_block(smallest, batch)
    for name, gradient in reference.gradients.items():
        assert torch.equal(step.gradients[name], gradient), name
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    model.gradient_checkpointing_disable()
    tools.run_step(model, batch)
    assert sum(saved_per_block(model, batch).values()) > plan.residual_bytes


def test_a_budget_counts_for_more_than_the_switch(tools):
    model = tools.make_trained("llama")
    model.gradient_checkpointing_enable()
    fxopt.optimize(model, memory_budget=None)
    tools.run_step(model, batch_of(tools))
    (plan,) = plans_of(model)
    assert (plan.budget, plan.recompute_ms) == ("None", 0.0)


@pytest.mark.slow
def test_other_lengths_have_plans_of_their_own_and_few_captures(tools):
    model, stock = tools.make_trained("llama"), tools.make_trained("llama")
    fxopt.optimize(model, memory_budget="min")
    for shape in ((2, 24), (2, 96), (3, 80), (2, 30)):
        batch = batch_of(tools, shape)
        step, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
        for name, gradient in theirs.gradients.items():
            assert tools.relative(step.gradients[name], gradient) < 1e-4, (shape, name)
    assert [plan.tokens for plan in plans_of(model)] == [48, 192, 240, 60]
    installation = find_installation(model)
    variants = len(installation._calls["model.layers"].frames)
    assert variants <= 3
    # each is captured for one shape, for any length, and for any length and batch
    assert sum(capture.region == "model.layers" for capture in installation.ledger.captures) <= 3 * variants


@pytest.mark.slow
def test_a_planned_model_is_freed_with_its_last_reference(tools):
    model = tools.make_trained("llama")
    fxopt.optimize(model, memory_budget="min")
    tools.run_step(model, batch_of(tools))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.slow
def test_dropout_that_is_saved_is_the_same_in_both_passes(tools):
    step_by = {}
    for budget in (None, "min"):
        model = tools.make_trained("gpt_neox", hidden_dropout=0.1)
        fxopt.optimize(model, memory_budget=budget)
        torch.manual_seed(5)
        step_by[budget] = tools.run_step(model, batch_of(tools))
        plans_of(model)
    for name, gradient in step_by[None].gradients.items():
        assert torch.equal(step_by["min"].gradients[name], gradient), name


class Breaking(torch.nn.Module):
    """An activation that Dynamo cannot capture."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return torch.nn.functional.silu(x)


@pytest.mark.parametrize(
    ("why", "use_reentrant"),
    [
        pytest.param("pieces", False, marks=pytest.mark.slow),
        ("a hook inside", True),
        pytest.param("a hook inside", False, marks=pytest.mark.slow),
        pytest.param("pieces", True, marks=pytest.mark.exhaustive),
        ("partial=False", False),
    ],
)
def test_blocks_that_no_plan_serves_are_checkpointed_as_in_stock(why, use_reentrant, tools):
    batch = batch_of(tools)
    model, stock = tools.make_trained("llama"), tools.make_trained("llama")
    for each in (model, stock):
        for layer in each.model.layers:
            if why == "a hook inside":
                layer.mlp.register_forward_hook(lambda *_: None)
            else:
                layer.mlp.act_fn = Breaking()
    fxopt.optimize(model, partial=why != "partial=False")
    tools.run_step(model, batch)
    with count_saved_bytes(model) as plain:
        model(**batch)
    for each in (model, stock):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    step, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
    for name, gradient in theirs.gradients.items():
        assert tools.relative(step.gradients[name], gradient) < 1e-4, name
    with count_saved_bytes(model) as checkpointed:
        model(**batch)
    assert checkpointed.total < 0.5 * plain.total
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    report = fxopt.explain(model)
    assert bool(report.fallbacks) == (why != "pieces")


def test_a_budget_for_a_model_without_blocks_is_refused():
    model = torch.nn.Linear(4, 4)
    with pytest.raises(fxopt.FxoptError, match="no repeated blocks"):
        fxopt.optimize(model, memory_budget="min")
    assert find_installation(model) is None


def test_a_second_thread_runs_stock_blocks_and_changes_no_plan(tools):
    model, batch = tools.make_trained("llama"), batch_of(tools)
    other = batch_of(tools, (2, 24))
    fxopt.optimize(model, memory_budget="min")
    reference = tools.run_step(model, batch)
    installation = find_installation(model)
    calls = installation._calls["model.layers"]
    run, started, ran = calls._run, [], []

    def within(path, block, recorders, args, kwargs):
        ran.append(threading.get_ident())
        if not started:
            thread = threading.Thread(target=lambda: model(**other).loss.backward())
            started.append(thread)
            thread.start()
            thread.join()
            model.zero_grad()
        return run(path, block, recorders, args, kwargs)

    calls._run = within
    step = tools.run_step(model, batch)
    assert set(ran) == {threading.get_ident()}
    assert [plan.tokens for plan in installation.planner.plans] == [384]
    assert dict(installation.ledger.fallbacks) == {(MODEL_REGION, "another thread runs the model"): 1}
    for name, gradient in reference.gradients.items():
        assert torch.equal(step.gradients[name], gradient), name
