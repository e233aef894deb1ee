"""Plans that run a block's widest part in chunks of its tokens, carried out on tiny models.

A product of fewer rows may round otherwise, and a weight's gradient is a sum of partial sums: gradients are not bit
for bit those of the whole. They are held against float64, as ops are.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fxopt
from fxopt.capture.installation import find_installation
from fxopt.demo.training import count_saved_bytes
from fxopt.offline import Setting, plan_offline
from fxopt.remat import views
from fxopt.report.plan_table import step_parts

SHAPE = (4, 96)
CASES = [
    ("llama", "full", torch.float32),
    *(
        pytest.param(arch, trained, dtype, marks=mark)
        for arch, trained, dtype, mark in (
            ("llama", "lora", torch.bfloat16, pytest.mark.exhaustive),
            ("gemma2", "full", torch.bfloat16, pytest.mark.exhaustive),
            ("gemma2", "lora", torch.float32, pytest.mark.exhaustive),
            ("gpt2", "full", torch.float32, pytest.mark.exhaustive),
            ("gpt2", "lora", torch.bfloat16, pytest.mark.slow),
            ("phi3", "full", torch.bfloat16, pytest.mark.exhaustive),
            ("phi3", "lora", torch.float32, pytest.mark.exhaustive),
            ("bloom", "full", torch.float32, pytest.mark.slow),
            ("bloom", "lora", torch.bfloat16, pytest.mark.exhaustive),
        )
    ),
]
"""Each two of an architecture, what is trained and a dtype meet; the slow ones have each of the last two."""
MOST = 0.03
"""Of the mean over all gradients of log(error in chunks / error whole), both against float64.

Measured on a CPU, the architectures below: -0.025 to -0.004 in float32, 0.001 to 0.007 in bfloat16.
"""
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 512, "n_positions": 128}
GPT2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(views, "SMALLEST", 32)


def make(tools, arch, adapted=False, **overrides):
    wide = {"gpt2": GPT2, "bloom": {}}.get(arch, {"intermediate_size": 512})
    return tools.make_trained(arch, adapted, **{**wide, **overrides})


def batch_of(tools, shape=SHAPE):
    return tools.make_batch(shape, padded="none", device="cpu")


def plan_of(model):
    installation = find_installation(model)
    assert not installation.ledger.fallbacks
    return installation.planner.plans[-1]


def chunks_of(plan):
    return [plan.decisions[number].chunks for _, number in plan.layers]


@pytest.mark.parametrize(("arch", "trained", "dtype"), CASES)
def test_gradients_are_as_near_to_float64_as_those_of_the_whole(arch, trained, dtype, tools):
    batch = batch_of(tools)
    exact = make(tools, arch, trained == "lora").to(dtype).double()
    whole, model = copy.deepcopy(exact).to(dtype), copy.deepcopy(exact).to(dtype)
    reference = tools.run_step(exact, batch)
    fxopt.optimize(whole, memory_budget=None)
    fxopt.optimize(model, memory_budget="min")
    theirs = tools.run_step(whole, batch)
    steps = [tools.run_step(model, batch) for _ in range(2)]
    assert max(chunks_of(plan_of(whole))) == 1
    assert min(chunks_of(plan_of(model))[:-1]) > 1
    assert steps[0].gradients.keys() == theirs.gradients.keys() == reference.gradients.keys()
    for name, gradient in steps[0].gradients.items():
        assert torch.equal(steps[1].gradients[name], gradient), name
    assert tools.gradient_excess(steps[0], theirs, reference) < MOST


@pytest.mark.slow
def test_other_lengths_run_whole(tools):
    """A graph for any length has no chunks yet: its sizes are not known when it is divided."""
    model, stock = make(tools, "llama"), make(tools, "llama")
    fxopt.optimize(model, memory_budget="min")
    for shape in (SHAPE, (2, 120)):
        batch = batch_of(tools, shape)
        step, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
        for name, gradient in theirs.gradients.items():
            assert tools.relative(step.gradients[name], gradient) < 1e-4, (shape, name)
    assert not find_installation(model).ledger.fallbacks


class Mixing(nn.Module):
    """A block whose wide values are not those of one token alone."""

    def __init__(self, mix: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.mix = nn.Linear(16, 128), nn.Linear(128, 16), mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.mix(torch.tanh(self.up(x))))


class Stack(nn.Module):
    """Blocks around one `mix`, and a loss of all tokens."""

    def __init__(self, mix: Callable[[torch.Tensor], torch.Tensor] = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(Mixing(mix) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x.square().mean()


MIXES = {
    "tokens apart": (lambda x: x.relu(), True),
    "within a token": (lambda x: x.sum(-1, keepdim=True) + x.split(64, -1)[0].repeat(1, 1, 2), False),
    "halves of a token": (lambda x: torch.cat([x[..., 64:], x[..., :64]], -1), True),
    "along tokens": (lambda x: x.cumsum(1), False),
    "over tokens": (lambda x: x - x.mean((0, 1), keepdim=True), False),
    "tokens turned": (lambda x: x.flip(1), False),
    "random": (lambda x: torch.nn.functional.dropout(x, 0.5), False),
    "between sequences": (lambda x: x + x[:1], False),
    "a sum of all tokens": (lambda x: x * (1 + x.sum() * 1e-3), False),
}


class Pair(nn.Module):
    """A block of two wide parts, side by side or one behind the other."""

    def __init__(self, in_turn: bool) -> None:
        super().__init__()
        self.first, self.second, self.in_turn = Mixing(torch.relu), Mixing(torch.tanh), in_turn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) if self.in_turn else self.first(x) + self.second(x)


@pytest.mark.parametrize(
    "in_turn",
    [pytest.param(False, id="side by side"), pytest.param(True, id="in turn")],
)
@pytest.mark.slow
def test_two_wide_parts_of_a_block_are_divided(in_turn, tools):
    def make_pairs():
        model = Stack()
        torch.manual_seed(0)
        model.parts = nn.ModuleList(Pair(in_turn) for _ in range(3))
        return model

    inputs = torch.randn(4, 96, 16)
    whole = fxopt.optimize(make_pairs(), memory_budget=None)
    model = fxopt.optimize(make_pairs(), memory_budget="min")
    for one in (whole, model):
        one(inputs).backward()
    assert max(chunks_of(plan_of(model))) > 1
    for parameter, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert tools.relative(parameter.grad, other.grad) < 1e-5


QUICK = ("tokens apart", "over tokens", "random")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MIXES]
)
def test_only_what_treats_tokens_apart_is_divided(name, tools):
    mix, is_divided = MIXES[name]

    inputs = torch.randn(4, 96, 16)
    torch.manual_seed(5)
    whole = fxopt.optimize(Stack(mix), memory_budget=None)
    whole(inputs).backward()
    torch.manual_seed(5)
    model = fxopt.optimize(Stack(mix), memory_budget="min")
    model(inputs).backward()
    assert (max(chunks_of(plan_of(model))) > 1) == is_divided
    for parameter, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert tools.relative(parameter.grad, other.grad) < 1e-5


def test_a_plan_in_chunks_is_written_given_back_and_needs_what_it_says(monkeypatch):
    inputs = {"x": torch.randn(4, 96, 16)}
    plan = fxopt.plan(Stack(), "min", inputs)
    assert min(chunks_of(plan)) > 1
    assert "runs its widest part in 4 chunks of tokens" in str(plan)
    read = fxopt.Plan.from_json(plan.to_json())
    assert read == plan
    model = fxopt.optimize(Stack(), plan=read)
    model(**inputs).backward()
    carried_out = plan_of(model)
    assert carried_out.layers == plan.layers
    assert carried_out.decisions == plan.decisions
    with count_saved_bytes(model) as saved:
        loss = model(**inputs)
    del loss
    assert saved.total == plan.residual_bytes
    monkeypatch.setattr(views, "SMALLEST", 97)
    whole = fxopt.plan(Stack(), "min", inputs)
    assert max(chunks_of(whole)) == 1
    assert whole.peak_bytes > 1.3 * plan.peak_bytes
    with pytest.raises(fxopt.FxoptError, match="expected for a block what it can do, got 4 chunks"):
        fxopt.optimize(Stack(), plan=plan)(**inputs)


@pytest.mark.slow
def test_inductor_runs_the_chunks_too(tools):
    batch = batch_of(tools)
    gradients = []
    for budget in (None, "min"):
        model = make(tools, "llama", adapted=True)
        fxopt.optimize(model, memory_budget=budget, lowering="inductor")
        gradients.append(tools.run_step(model, batch).gradients)
    assert min(chunks_of(plan_of(model))) > 1
    for name, gradient in gradients[0].items():
        assert tools.relative(gradients[1][name], gradient) < 1e-5, name


@pytest.mark.slow
def test_adapters_over_four_bit_weights_run_in_chunks(monkeypatch):
    """Products decode their weights per chunk; the largest difference measured is 2.9e-3, a rounding of bfloat16."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    rows = importlib.import_module("benchmarks.shapes")
    monkeypatch.setitem(rows.TINY, "intermediate_size", 512)
    ids = torch.randint(0, 512, (1, 256), generator=torch.Generator().manual_seed(0))
    gradients = []
    for budget in (None, "min"):
        model = rows.build("qwen2.5-7b", "qlora", "cpu", tiny=True)
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        fxopt.optimize(model, memory_budget=budget, verify="off")
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients.append({n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None})
    assert min(chunks_of(plan_of(model))) > 1
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 2**-7 * gradient.norm(), name


@pytest.mark.slow
def test_what_chunks_compute_again_is_not_counted_twice(tmp_path, monkeypatch):
    """Of gate and up computed again in chunks, each product is a fourth as long and there are four."""
    monkeypatch.setattr(views, "SMALLEST", 2048)
    sizes = ("num_hidden_layers=2", "hidden_size=2048", "intermediate_size=8192", "vocab_size=1024")
    fields = (*sizes, "num_attention_heads=16", "num_key_value_heads=4")
    setting = Setting(None, "llama", "min", 1, 8192, True, "H100", fields=fields)
    plan, _ = plan_offline(setting, tmp_path / "curve.png")
    assert min(chunks_of(plan)) > 1
    assert sum(ms for ms, _ in step_parts(plan)) == pytest.approx(plan.step_ms)
    for decision in plan.decisions:
        again = [r for r in decision.recomputed if r.op.startswith("fxopt.lora_linear_output/chunk")]
        assert len(again) == 2
        # Counted twice, all of it would be there; 0.50 of it are the weights read again, and the unit's value, which
        # one kernel writes with its product only from 4096 rows on.
        assert 0 < decision.chunk_ms < 0.75 * sum(residual.recompute_ms for residual in again)
