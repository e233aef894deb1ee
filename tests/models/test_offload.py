"""Plans that leave values on the host, carried out on tiny models: no bit changes, and what is where was predicted."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import fxopt
from fxopt.capture.installation import find_installation
from fxopt.demo.training import count_saved_bytes
from fxopt.remat.offload import SMALLEST

SHAPE = (4, 96)
HOST = "64MiB"


def make(tools, arch="llama", adapted=False, layers=6, **config):
    return tools.make_trained(arch, adapted, num_hidden_layers=layers, **config)


def batch_of(tools, shape=SHAPE):
    return tools.make_batch(shape, padded="none", device="cpu")


def plan_of(model):
    installation = find_installation(model)
    assert not installation.ledger.fallbacks
    assert not any("offload" in note for note in installation.ledger.notes)
    (plan,) = installation.planner.plans
    return plan


def used_bytes(model):
    return find_installation(model).offloader.memory.used_bytes


def saved_per_block(model, batch):
    """Return the loss of one forward, and the bytes that each block leaves on the device for backward."""
    found: dict[str, int] = {}
    runs = {calls: calls._run for calls in find_installation(model)._calls.values()}

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
        return model(**batch).loss, found
    finally:
        for calls in runs:
            del calls._run


@pytest.mark.parametrize(
    ("arch", "adapted"),
    [
        ("llama", False),
        pytest.param("llama", True, marks=pytest.mark.slow),
        *(
            pytest.param(arch, adapted, marks=pytest.mark.exhaustive)
            for arch, adapted in (("qwen2", True), ("gemma2", False), ("gpt_neox", False), ("gpt_neox", True))
        ),
    ],
)
def test_no_bit_changes_and_what_is_on_the_host_and_the_device_is_as_predicted(arch, adapted, tools):
    batch = batch_of(tools)
    unplanned = make(tools, arch, adapted)
    fxopt.optimize(unplanned)
    reference = tools.run_step(unplanned, batch)
    without = fxopt.plan(make(tools, arch, adapted), "min", batch)
    model = make(tools, arch, adapted)
    fxopt.optimize(model, memory_budget="min", max_host_memory=HOST)
    for _ in range(2):
        step = tools.run_step(model, batch)
        assert torch.equal(step.loss, reference.loss)
        for name, gradient in reference.gradients.items():
            assert torch.equal(step.gradients[name], gradient), name
        assert used_bytes(model) == 0
    plan = plan_of(model)
    # with all weights trained their gradients are the peak: where nothing would lower it, nothing leaves
    assert plan.host_bytes > 0 or (plan.peak_bytes == without.peak_bytes and not adapted)
    assert plan.peak_bytes < without.peak_bytes or not adapted
    assert not plan.decisions[plan.layers[-1][1]].offloaded
    loss, saved = saved_per_block(model, batch)
    assert used_bytes(model) == plan.host_bytes
    assert saved == {path: sum(r.bytes for r in plan.decisions[n].saved) for path, n in plan.layers}
    del loss
    gc.collect()
    assert used_bytes(model) == 0


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["plain", "inductor"])
def test_all_that_a_plan_has_leave_does(lowering, tools):
    """Backward reads v through a view alone: torch saves that view, in the memory of the value that the plan names."""
    batch = batch_of(tools)
    plan = fxopt.plan(make(tools, "qwen2", adapted=True, layers=3), None, batch)
    decisions = tuple(map(send_off_all, plan.decisions))
    assert "fxopt.lora_linear#0.1" in [residual.op for residual in decisions[-1].offloaded]
    plan = dataclasses.replace(plan, decisions=decisions)
    model = make(tools, "qwen2", adapted=True, layers=3)
    fxopt.optimize(model, plan=plan, max_host_memory=HOST, lowering=lowering)
    tools.run_step(model, batch)
    loss = model(**batch).loss
    leaving = sum(residual.bytes for _, n in plan.layers for residual in decisions[n].offloaded)
    assert used_bytes(model) == plan_of(model).host_bytes == leaving
    loss.backward()


def send_off_all(decision):
    """Return `decision` with all on the host that may wait there, but for the block's input."""
    movable = [r for r in decision.saved if r.bytes >= SMALLEST and not r.op.startswith("input#")]
    left = tuple(r for r in decision.saved if r not in movable)
    return dataclasses.replace(decision, saved=left, offloaded=tuple(movable))


@pytest.mark.slow
def test_nothing_holds_what_has_left(tools):
    """The input of a block is the result of the one before: once it has left, its memory is given up."""
    model, batch = make(tools, adapted=True), batch_of(tools)
    fxopt.optimize(model, memory_budget="min", max_host_memory=HOST)
    tools.run_step(model, batch)
    plan = plan_of(model)
    leaves = [any(r.op.startswith("input#") for r in plan.decisions[n].offloaded) for _, n in plan.layers]
    assert any(leaves[1:])
    (calls,) = find_installation(model)._calls.values()
    run, made = calls._run, []

    def watched(path, block, recorders, args, kwargs):
        value = run(path, block, recorders, args, kwargs)
        made.append(StorageWeakRef(value.untyped_storage()))
        # the block that ran before has sent off its values by now: its input is the result of the one before that
        assert all(made[number - 1].expired() for number in range(1, len(made) - 1) if leaves[number])
        return value

    calls._run = watched
    loss = model(**batch).loss
    assert [made[number - 1].expired() for number in range(1, len(leaves))] == leaves[1:]
    loss.backward()


@pytest.mark.slow
def test_gradients_accumulate_and_graphs_may_live_side_by_side(tools):
    batches = [batch_of(tools), {**batch_of(tools)}]
    batches[1]["input_ids"] = batches[1]["labels"] = batches[0]["input_ids"].flip(1)
    gradients = []
    for options in ({}, {"memory_budget": "min", "max_host_memory": HOST}):
        model = make(tools)
        fxopt.optimize(model, **options)
        for batch in batches:
            model(**batch).loss.backward()
        with torch.no_grad():
            model(**batches[0])
        losses = [model(**batch).loss for batch in batches]
        for loss in losses:
            loss.backward()
        dropped = model(**batches[0]).loss
        del loss, losses, dropped
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
    assert used_bytes(model) == 0
    memory = find_installation(model).offloader.memory
    assert memory.reserved_bytes == 2 * plan_of(model).host_bytes


@pytest.mark.slow
def test_a_plan_with_values_on_the_host_is_printed_written_and_given_back(tools):
    model, batch = make(tools), batch_of(tools)
    plan = fxopt.plan(model, "min", batch, max_host_memory=HOST)
    assert "  offloaded   " in str(plan)
    assert "wait in the host's memory" in str(plan)
    read = fxopt.Plan.from_json(plan.to_json())
    assert read == plan
    fxopt.optimize(model, plan=read)
    tools.run_step(model, batch)
    carried_out = plan_of(model)
    assert carried_out == plan
    with count_saved_bytes(model):
        loss = model(**batch).loss
    assert used_bytes(model) == plan.host_bytes
    loss.backward()


@pytest.mark.slow
def test_little_host_memory_is_used_by_the_first_blocks(tools):
    model, batch = make(tools, adapted=True), batch_of(tools)
    much = fxopt.plan(model, "min", batch, max_host_memory=HOST)
    little = fxopt.plan(model, "min", batch, max_host_memory=much.host_bytes // 2 * 8 // 7 + 1024)
    none = fxopt.plan(model, "min", batch, max_host_memory=0)
    assert 0 < little.host_bytes <= much.host_bytes // 2 + 1024
    assert much.peak_bytes <= little.peak_bytes <= none.peak_bytes
    assert none.host_bytes == 0
    assert fxopt.plan(model, None, batch, max_host_memory=HOST).host_bytes == 0


@pytest.mark.parametrize(
    "adapted", [pytest.param(False, marks=pytest.mark.exhaustive), pytest.param(True, marks=pytest.mark.slow)]
)
def test_inductor_saves_the_same_values_elsewhere(adapted, tools):
    """With all weights trained their gradients are the peak, and nothing leaves: units' take no memory of their own."""
    batch = batch_of(tools)
    gradients = []
    for options in ({}, {"memory_budget": "min", "max_host_memory": HOST}):
        model = make(tools, adapted=adapted)
        fxopt.optimize(model, lowering="inductor", **options)
        step = tools.run_step(model, batch)
        gradients.append(step.gradients)
    for name, gradient in gradients[0].items():
        assert tools.relative(gradients[1][name], gradient) < 1e-5, name
    loss = model(**batch).loss
    assert used_bytes(model) == plan_of(model).host_bytes
    assert bool(used_bytes(model)) is adapted
    loss.backward()


def make_deep(tools):
    """Return a model with adapters that is deep enough for values on the host to lower its peak."""
    return make(tools, adapted=True, layers=12, max_position_embeddings=2048, hidden_size=512)


@pytest.mark.slow
def test_values_on_the_host_lower_the_peak_of_the_model_that_trains_on_a_gpu(tools):
    batch = batch_of(tools, (2, 512))
    plans = [fxopt.plan(make_deep(tools), "min", batch, max_host_memory=host) for host in (0, "8GiB")]
    assert plans[1].host_bytes > 0
    assert plans[1].peak_bytes < plans[0].peak_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["off", "auto"])
def test_on_a_gpu_values_come_back_and_the_peak_falls(graphs, tools):
    """Five steps: with CUDA graphs one warms up, one records, and three are replayed."""
    batch = {name: value.cuda() for name, value in batch_of(tools, (8, 1024)).items()}
    peaks, gradients = [], []
    for host in (0, "8GiB"):
        model = make_deep(tools).cuda()
        fxopt.optimize(model, memory_budget="min", max_host_memory=host, cuda_graphs=graphs)
        for _ in range(5):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            model(**batch).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
        if host:
            assert ("replayed as CUDA graphs" in fxopt.explain(model).lowering) is (graphs == "auto")
            loss = model(**batch).loss
            assert used_bytes(model) == plan_of(model).host_bytes > 0
            assert all(chunk.is_pinned() for chunk in find_installation(model).offloader.memory._chunks)
            del loss
        del model
        gc.collect()
        torch.cuda.empty_cache()
    for name, gradient in gradients[0].items():
        assert tools.relative(gradients[1][name], gradient) < 1e-2, name
    # What replays of CUDA graphs write to is not counted as allocated after they were recorded.
    assert graphs == "auto" or peaks[1] < peaks[0]
