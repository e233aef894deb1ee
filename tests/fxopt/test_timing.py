"""An op is called on random values of the form that it will get, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import time

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

import fxopt
from fxopt import timing
from fxopt.gpu_clock import LONG_MS, GpuClock
from fxopt.kernels.launcher import run_as_backward
from fxopt.remat.devices import find_device
from fxopt.remat.measured import HOST, Measured, Trial
from fxopt.remat.timings import Timing
from fxopt.timed_values import make_value
from fxopt.timing import (
    COPIED,
    ELSEWHERE,
    LIMIT_S,
    NO_MEMORY,
    NO_TIME,
    OpTimer,
    find_room,
)

aten = torch.ops.aten
CPU = torch.device("cpu")


def value_of(tensor):
    node = fx.Graph().placeholder("x")
    node.meta["val"] = tensor
    return make_value(node)


def product_of(rows, device="cpu", dtype=torch.float32, *, fails=False):
    """Return a node that multiplies two square matrices, of shapes that do not fit where it `fails`."""
    graph = fx.Graph()
    with FakeTensorMode():
        a, b = graph.placeholder("a"), graph.placeholder("b")
        a.meta["val"] = torch.empty(rows, rows, device=device, dtype=dtype)
        b.meta["val"] = torch.empty(rows + fails, rows, device=device, dtype=dtype)
        node = graph.call_function(aten.mm.default, (a, b))
        node.meta["val"] = torch.empty(rows, rows, device=device, dtype=dtype)
    return node


def trial_of(node, *, in_backward=False):
    value = node.meta["val"]
    return Trial(node, 3 * value.numel() * value.element_size(), in_backward)


def fake_timer(ms=2.0, room=10**6):
    """Return a timer on a CPU, and the results of what it called."""
    seen = []

    def clock(call):
        seen.append(call())
        return Timing(ms)

    return OpTimer(CPU, lambda place: clock, lambda place, in_step: room + GpuClock.BYTES), seen


def test_values_have_the_form_that_they_stand_for():
    with FakeTensorMode():
        fakes = [
            torch.empty(4, 6)[:, 1:3],
            torch.empty(6, 4).t(),
            torch.empty(1, 3).expand(5, 3),
            torch.empty(0, 3),
            torch.empty(2, 3, dtype=torch.bfloat16),
        ]
    for fake in fakes:
        made = value_of(fake)
        assert not isinstance(made, type(fake))
        assert (made.shape, made.stride(), made.dtype) == (fake.shape, fake.stride(), fake.dtype)
        assert made.isfinite().all()
    assert value_of(fakes[0]).unique().numel() > 1


def test_bytes_are_any_masks_hide_nothing_and_seeds_are_zero():
    with FakeTensorMode():
        codes, mask, seed = (
            torch.empty(1000, dtype=torch.uint8),
            torch.empty(8, dtype=torch.bool),
            torch.empty(2, dtype=torch.uint64),
        )
    assert value_of(codes).unique().numel() > 200
    assert value_of(mask).all()
    assert value_of(seed).tolist() == [0, 0]


def test_an_op_runs_on_real_values_while_others_are_stand_ins():
    timer, seen = fake_timer()
    with FakeTensorMode():
        assert timer([trial_of(product_of(8))], 0) == [Timing(2.0)]
    (result,) = seen
    assert result.isfinite().all()
    assert result.abs().sum() > 0


def test_random_states_stay_as_they_were():
    timer, _ = fake_timer()
    before = torch.get_rng_state()
    timer([trial_of(product_of(8))], 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_changes_no_dtype_of_what_is_timed():
    timer, seen = fake_timer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        timer([trial_of(product_of(8))], 0)
    assert seen[0].dtype == torch.float32


def test_nothing_is_timed_while_threads_compile(monkeypatch):
    happened = []
    monkeypatch.setattr(timing, "finish_compiling", lambda: happened.append("compiled"))

    def clock(call):
        happened.append("timed")
        return Timing(1.0)

    OpTimer(CPU, lambda place: clock, lambda place, in_step: 10**9)([trial_of(product_of(8))], 0)
    assert happened == ["compiled", "timed"]


def test_what_needs_more_than_there_is_room_for_is_not_run():
    timer, seen = fake_timer(room=3 * 8 * 8 * 4)
    results = timer([trial_of(product_of(9)), trial_of(product_of(8))], 0)
    assert results == [NO_MEMORY, Timing(2.0)]
    assert len(seen) == 1


def test_of_the_models_own_tensors_none_is_made_and_none_serves_twice():
    graph = fx.Graph()
    with FakeTensorMode():
        values = [torch.empty(8, 8) for _ in range(3)]
        rows, weight, other = (graph.placeholder(name) for name in "xwv")
        for node, value in zip((rows, weight, other), values, strict=True):
            node.meta["val"] = value
        turned = graph.call_function(torch.ops.aten.t.default, (weight,))
        turned.meta["val"] = values[1].t()
        product = graph.call_function(torch.ops.aten.addmm.default, (other, rows, turned))
        product.meta["val"] = torch.empty(8, 8)
    own = torch.nn.Parameter(torch.full((8, 8), 2.0)), torch.full((9, 8), 3.0)
    small, double = torch.ones(4), torch.ones(100, dtype=torch.float64)
    seen = []

    def clock(call):
        seen.append(call())
        return Timing(1.0)

    need = 4 * 8 * 8 * 4
    for tensors, room, expected in (
        ((*own, small, double), need // 2, Timing(1.0)),
        (own[:1], need // 2, NO_MEMORY),
        (own[:1], need * 3 // 4, Timing(1.0)),
    ):
        timer = OpTimer(
            CPU,
            lambda place: clock,
            lambda place, n, room=room: room + GpuClock.BYTES,
            owned=lambda tensors=tensors: tensors,
        )
        trial = Trial(product, need, False, frozenset({turned, other}))
        assert timer([trial], 0) == [expected]
    assert len(seen) == 2
    assert (own[0] == 2).all()
    assert not seen[0].requires_grad


WITH_CLOCK = 1000 + GpuClock.BYTES + COPIED


@pytest.mark.parametrize(("spare", "most"), [(None, WITH_CLOCK), (0, 500), (700, 700), (2**40, WITH_CLOCK)])
def test_where_memory_is_spared_an_op_of_more_than_half_of_the_steps_is_not_run(spare, most):
    asked = []
    timer = OpTimer(CPU, lambda place: lambda call: Timing(1.0), lambda place, n: asked.append(n) or n, spare)
    timer([trial_of(product_of(8))], 1000)
    assert asked == [most]


def test_an_op_on_another_device_is_not_run():
    timer, seen = fake_timer()
    assert timer([trial_of(product_of(8, "meta"))], 0) == [ELSEWHERE]
    assert seen == []


@pytest.mark.parametrize(("share", "most"), [(0.6, 2), (0.3, 4)])
def test_after_the_limit_nothing_more_is_timed(share, most, monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def clock(call):
        calls.append(call())
        now[0] += share * LIMIT_S  # whatever it returns: what it takes is counted
        return Timing(1.0) if len(calls) % 2 else HOST

    timer = OpTimer(CPU, lambda place: clock, lambda place, in_step: 10**9)
    trials = [trial_of(product_of(8 + place)) for place in range(most + 1)]
    *before, last = timer(trials, 0)
    assert set(before) == {Timing(1.0), HOST}
    assert last == NO_TIME
    assert set(timer(trials, 0)) == {NO_TIME}, "the limit is of all calls together"
    assert len(calls) == most


class ScriptedClock(GpuClock):
    """A clock that is told how long the host and the GPU took alone, and what was seen behind each load."""

    def __init__(self, alone, behind):
        self._place, self._alone, self._behind, self.loads = CPU, alone, iter(behind), []
        self._load_ms = 0.2

    def _time_alone(self, call):
        return self._alone

    def _time_behind_load(self, call, rounds, load_ms):
        self.loads.append((rounds, load_ms))
        return next(self._behind)


LATE, AHEAD = (False, [9.0, 7.0, 8.0]), (True, [1.0, 3.0, 2.0])


@pytest.mark.parametrize(
    ("alone", "behind", "expected", "loads"),
    [
        pytest.param((0.1, 2.5), [AHEAD], Timing(2.0), [(3, 0.6)], id="the host is ahead"),
        pytest.param((1, 1), [LATE, AHEAD], Timing(2.0), [(3, 6), (3, 12)], id="behind a longer load"),
        pytest.param((1, 1), [LATE] * 3, HOST, [(3, 6), (3, 12), (3, 24)], id="a short one is late"),
        pytest.param((4, 8), [LATE] * 3, Timing(8.0), [(3, 24), (1, 16), (1, 32)], id="a long one waits"),
        pytest.param((4, 8), [LATE, AHEAD], Timing(2.0), [(3, 24), (1, 16)], id="a long one was late once"),
        pytest.param((1, 60), [], Timing(60), [], id="a very long one"),
        pytest.param((60, 60), [AHEAD], Timing(2.0), [(3, 360)], id="the host stood still"),
        pytest.param((150, 150), [LATE], HOST, [(3, 900)], id="no load is long enough"),
    ],
)
def test_an_op_waits_for_the_gpu_where_no_load_lets_the_host_be_ahead(
    alone, behind, expected, loads, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device", lambda place: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda place: None)
    clock = ScriptedClock(alone, behind)
    assert clock(lambda: None) == expected
    assert clock.loads == [(rounds, pytest.approx(load_ms)) for rounds, load_ms in loads]


def test_an_op_that_fails_leaves_an_estimate():
    timer, _ = fake_timer()
    results = timer([trial_of(product_of(8, fails=True)), trial_of(product_of(8))], 0)
    assert results == ["it does not run on random values (RuntimeError)", Timing(2.0)]


def test_an_op_that_runs_out_of_memory_says_so():
    def clock(call):
        raise torch.OutOfMemoryError

    timer = OpTimer(CPU, lambda place: clock, lambda place, in_step: 10**9)
    assert timer([trial_of(product_of(8))], 0) == [NO_MEMORY]


class Block(nn.Module):
    def __init__(self, width: int = 4096) -> None:
        super().__init__()
        self.up = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(x).relu()


@pytest.fixture
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@pytest.fixture
def _alone():
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("other tests use the GPU beside this one, which times it: run it without -n")


@pytest.mark.gpu
@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_large_product_takes_about_what_the_datasheet_says(in_backward):
    device = find_device(torch.cuda.get_device_name())
    if device is None:
        pytest.skip("this GPU is in no table")
    node = product_of(8192, "cuda", torch.bfloat16)
    (found,) = OpTimer(torch.device("cuda", 0))([trial_of(node, in_backward=in_backward)], 10**9)
    assert isinstance(found, Timing), found
    share = 2 * 8192**3 / device.half_flops / (found.ms * 1e-3)
    assert 0.3 < share < 1.05, f"{share:.2f} of the datasheet's products"


@pytest.mark.gpu
@pytest.mark.usefixtures("_alone")
def test_the_hosts_time_is_not_in_that_of_a_tiny_op():
    (found,) = OpTimer(torch.device("cuda", 0))([trial_of(product_of(16, "cuda"))], 10**9)
    assert isinstance(found, Timing), found
    assert found.ms < 0.02


@pytest.mark.gpu
def test_what_the_host_launches_too_slowly_is_not_timed():
    clock = GpuClock(torch.device("cuda", 0))
    slept = iter([0, *[0.2] * 100])
    assert clock(lambda: time.sleep(next(slept))) == HOST


@pytest.mark.gpu
@pytest.mark.usefixtures("_alone")
def test_what_waits_for_the_gpu_itself_is_timed_where_it_runs_long_enough():
    def run() -> None:
        torch.cuda._sleep(10_000_000)  # cycles: 5 ms at 2 GHz, of which an eighth of the longest load is more
        torch.cuda.synchronize()

    found = GpuClock(torch.device("cuda", 0))(run)
    assert isinstance(found, Timing), found
    assert 2.5 < found.ms < 15


@pytest.mark.gpu
@pytest.mark.usefixtures("_alone")
def test_what_the_host_launches_slowly_is_not_taken_for_what_waits():
    small = torch.ones(16, 16, device="cuda")

    def run() -> None:
        time.sleep(0.003)
        _ = small @ small

    found = GpuClock(torch.device("cuda", 0))(run)
    assert isinstance(found, Timing), found
    assert found.ms < 0.1


@pytest.mark.gpu
def test_what_runs_for_long_runs_once():
    calls = []

    def sleep() -> None:
        calls.append(1)
        torch.cuda._sleep(400_000_000)  # cycles: 0.2 s at 2 GHz

    found = GpuClock(torch.device("cuda", 0))(sleep)
    assert isinstance(found, Timing), found
    assert found.ms > LONG_MS
    assert len(calls) == 1


@pytest.mark.gpu
def test_timing_leaves_no_memory_no_random_state_and_no_peak():
    place = torch.device("cuda", 0)
    small = torch.ones(512, 512, device=place)

    def multiply() -> None:
        _ = small @ small

    multiply()  # torch's library takes its workspace
    run_as_backward(multiply, place)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated, state = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    nodes = [product_of(rows, "cuda") for rows in (4096, 2048)]
    in_step = 3 * 2048**2 * 4
    for in_backward in (False, True):
        results = OpTimer(place)([trial_of(node, in_backward=in_backward) for node in nodes], in_step)
        assert results[0] == NO_MEMORY, "torch's recorded peak would be higher than the step's"
        assert isinstance(results[1], Timing), results[1]
    assert torch.cuda.memory_allocated() == allocated
    small_bytes = 4 * 512  # the node whose backward pass an op runs in, and its gradient
    assert torch.cuda.max_memory_allocated() <= allocated + in_step + GpuClock.BYTES + COPIED + small_bytes
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert find_room(place, 2**60) <= torch.cuda.get_device_properties(place).total_memory


@pytest.mark.gpu
@pytest.mark.usefixtures("_alone", "_own_cache")
def test_a_plan_on_a_gpu_rests_on_timings_and_a_second_one_times_nothing(monkeypatch):
    model = nn.Sequential(*(Block() for _ in range(3))).to("cuda", torch.bfloat16)
    inputs = {"input": torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)}
    torch.empty(2**29, dtype=torch.uint8, device="cuda")  # what is recorded of a peak so far is room
    plan = fxopt.plan(model, None, inputs)
    assert plan.rooflines == ()
    assert plan.measured_share > 0.5
    products = plan.measured_ms
    assert products < plan.step_ms
    monkeypatch.setattr(timing.OpTimer, "_time", lambda *_: pytest.fail("timed once more"))
    again = fxopt.plan(model, None, inputs)
    assert again.measured_ms == products


def quantize(model):
    """Put NF4 weights with nested scales in the place of all linear layers but the head."""
    library = pytest.importorskip("bitsandbytes").nn
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or layer is model.get_output_embeddings():
            continue
        sizes = layer.in_features, layer.out_features, layer.bias is not None
        new = library.Linear4bit(*sizes, compute_dtype=torch.bfloat16, quant_type="nf4")
        new.load_state_dict(layer.state_dict())
        model.set_submodule(name, new)
    model.is_loaded_in_4bit = True


def make_adapted(device, *, width, tokens, four_bit):
    """Return a llama of two layers with adapters, and inputs of so many tokens a sequence."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 32 if width < 1024 else width // 128,
        num_key_value_heads=2,
        vocab_size=1024,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if four_bit:
        quantize(model)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model.to(device), LoraConfig(r=16, target_modules=targets)).train()
    ids = torch.randint(0, 1024, (4, tokens), device=device)
    return model, {"input_ids": ids, "labels": ids}


@pytest.mark.slow
@pytest.mark.parametrize("four_bit", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_every_op_of_an_adapted_llama_runs_on_random_values(monkeypatch, four_bit):
    timer, seen = fake_timer(ms=1.0, room=10**9)
    monkeypatch.setattr("fxopt.planning.find_measured", lambda place, spare, owned: Measured(timer))
    model, inputs = make_adapted("cpu", width=64, tokens=32, four_bit=four_bit)
    plan = fxopt.plan(model, "min", inputs)
    assert plan.rooflines == ()
    assert plan.measured_ms > len(seen) > 10, "equal calls are made once"


@pytest.mark.gpu
@pytest.mark.usefixtures("_alone", "_own_cache")
@pytest.mark.parametrize("four_bit", [False, True])
def test_a_plan_of_an_adapted_llama_rests_on_timings(four_bit):
    model, inputs = make_adapted("cuda", width=4096, tokens=2048, four_bit=four_bit)
    allocated = torch.cuda.memory_allocated()
    plan = fxopt.plan(model, "min", inputs)
    print(plan)
    assert [reason for reason in plan.rooflines if "random values" in reason] == []
    assert plan.measured_share > 0.5, plan.rooflines
    assert torch.cuda.memory_allocated() - allocated < 2**27, "what libraries keep for themselves alone"
    fxopt.optimize(model, plan=plan)
    model(**inputs).loss.backward()
    assert fxopt.explain(model).plans[0].residual_bytes == plan.residual_bytes
