"""The public functions: what they accept, refuse and leave alone."""

from __future__ import annotations

import collections
import copy
import logging
import shutil
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor
from transformers import AutoConfig, AutoModelForCausalLM

import fxopt
from fxopt import pipeline, runner
from fxopt.capture import compiled
from fxopt.options import Options
from fxopt.report.records import Proof
from fxopt.rewriting.pattern import call
from fxopt.rewriting.terms import exp, tensor

TINY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
    pad_token_id=0,
)
IDS = torch.randint(1, 256, (2, 16), generator=torch.Generator().manual_seed(0))


def llama(layers: int = 2, **overrides):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**TINY, "num_hidden_layers": layers, **overrides})
    return AutoModelForCausalLM.from_config(config).train()


class Gated(nn.Module):
    """A norm and what a gate lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.RMSNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + nn.functional.silu(self.gate(h)) * self.up(h)


def gated() -> nn.Module:
    return nn.Sequential(Gated(), Gated())


GATED: Any = {"input": torch.randn(4, 8, generator=torch.Generator().manual_seed(0))}


def slots(model: nn.Module) -> int:
    return sum("_compiled_call_impl" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("given", [None, 3, "model", object(), nn.Linear])
def test_something_that_is_no_module_is_refused(given):
    for function in (fxopt.optimize, fxopt.explain, fxopt.restore):
        with pytest.raises(fxopt.FxoptError, match=r"expected a torch.nn.Module, got \w+"):
            function(given)


def test_meta_models_are_explained_but_not_optimized():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))
    with pytest.raises(fxopt.FxoptError, match="is on the meta device, expected weights"):
        fxopt.optimize(model)
    report = fxopt.explain(model)
    assert sorted((s.pattern, s.count, s.status) for s in report.sites) == [
        ("attention", 2, "rewritten"),
        ("glu", 2, "rewritten"),
        ("linear_cross_entropy", 1, "rewritten"),
        ("rms_norm", 1, "rewritten"),
        ("rms_norm", 2, "rewritten"),
        ("rms_norm", 2, "rewritten"),
        ("rope", 2, "rewritten"),
        ("rope", 2, "rewritten"),
    ]
    assert slots(model) == 0


def test_the_report_names_the_backend_of_each_attention():
    with torch.device("meta"):
        unused = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))
    model = fxopt.optimize(llama())
    model(input_ids=IDS, labels=IDS).loss.backward()
    for given, served_by in (
        (unused, "chosen at the first call"),
        (model, "torch's flash attention for CPUs"),
    ):
        report = fxopt.explain(given)
        backends = {site.backend for site in report.sites if site.pattern == "attention"}
        assert backends == {served_by}
        assert {site.backend for site in report.sites if site.pattern != "attention"} == {""}
        assert f"attention      2  {served_by}\n" in str(report)
        assert f'"backend": "{served_by}"' in report.to_json()


@pytest.mark.parametrize("name", ["", " ", "a b", "class", None, 3])
def test_a_pattern_has_a_name_that_reports_can_call_it_by(name):
    with pytest.raises(
        fxopt.FxoptError,
        match=r"^Pattern: expected a name that is an identifier, got .*\ngive name='my_pattern'",
    ):
        fxopt.Pattern(name, lambda: exp(tensor("x")), replace=lambda m: m["x"])


def test_a_module_without_repeated_blocks_is_one_region():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    model = fxopt.optimize(Norm())
    x = torch.randn(3, 8, requires_grad=True)
    model(x).sum().backward()
    (site,) = fxopt.explain(model).sites
    assert (site.pattern, site.op, site.status, site.count) == ("rms_norm", "rms_norm", "rewritten", 1)


MINE = fxopt.Pattern("mine", lambda: exp(tensor("x")), replace=lambda m: m["x"])
BROKEN = fxopt.Pattern("broken", lambda: 3, replace=lambda m: m["x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": ("rms_nrom",)}, r"patterns: unknown name 'rms_nrom', expected one of rms_norm, "),
        ({"disable": ("gluu",)}, r"disable: unknown name 'gluu', expected one of glu, "),
        ({"lowering": "inductr"}, r"lowering: unknown name 'inductr', expected one of inductor, "),
        ({"verify": "yes"}, r"verify: unknown name 'yes', expected one of "),
        ({"patterns": (3,)}, r"patterns: expected names or fxopt.Pattern objects, got int"),
        ({"patterns": ("glu", "glu")}, r"patterns: glu is given 2 times"),
        (
            {"patterns": MINE},
            r"patterns: expected a list of names or .*, got Pattern \(mine: exp\(x\)\)\nwrite ",
        ),
        ({"patterns": None}, r"patterns: expected a list of names or fxopt.Pattern objects, got NoneType"),
        (
            {"patterns": (BROKEN,)},
            r"broken: <lambda> \(.*\) returned 3, expected a term, got int\nuse the operators",
        ),
        ({"disable": 3}, r"disable: expected a list of names of patterns, got int \(3\)\nwrite disable="),
        ({"disable": (["glu"],)}, r"disable: unknown name \['glu'\], expected one of "),
        ({"strict": "no"}, r"strict: expected True or False, got 'no'"),
    ],
)
def test_unknown_options_name_the_nearest_valid_ones(options, message):
    model = llama()
    with pytest.raises(fxopt.FxoptError, match=message):
        fxopt.optimize(model, **options)
    assert slots(model) == 0


def test_a_single_weight_on_meta_is_named():
    model = llama()
    model.lm_head.to("meta")
    with pytest.raises(
        fxopt.FxoptError, match=r"model: lm_head\.weight of LlamaForCausalLM is on the meta device"
    ):
        fxopt.optimize(model)
    assert slots(model) == 0


def test_example_inputs_that_are_no_dict_are_refused_though_nothing_reads_them_yet():
    model = llama()
    with pytest.raises(fxopt.FxoptError, match="example_inputs: expected a dict of the forward's keyword"):
        fxopt.optimize(model, example_inputs=[IDS])
    assert slots(model) == 0


@pytest.mark.slow
def test_blocks_put_in_since_are_trained_right_and_optimizing_again_makes_regions_of_them(caplog):
    model, stock = fxopt.optimize(llama()), llama()
    assert_steps_as(model, stock)
    for each in (model, stock):
        added = copy.deepcopy(each.model.layers[0])
        added.self_attn.layer_idx = len(each.model.layers)
        each.model.layers.append(added)
        each.config.num_hidden_layers += 1
    assert_steps_as(model, stock)
    with caplog.at_level(logging.WARNING, logger="fxopt"):
        fxopt.optimize(model)
    assert "was optimized with other blocks than it has now: restored, optimized anew" in caplog.text
    assert_steps_as(model, stock)
    (blocks,) = {site.count for site in fxopt.explain(model).sites if site.pattern == "glu"}
    assert blocks == len(model.model.layers)


def test_optimizing_twice_is_a_no_op_and_other_options_start_anew(caplog):
    model = fxopt.optimize(llama())
    model(input_ids=IDS, labels=IDS).loss.backward()
    before = fxopt.explain(model)
    assert fxopt.optimize(model) is model
    assert fxopt.explain(model) == before
    with caplog.at_level(logging.WARNING, logger="fxopt"):
        fxopt.optimize(model, disable=("glu",))
    assert "was optimized with other options: restored, optimized anew" in caplog.text
    model(input_ids=IDS, labels=IDS).loss.backward()
    sites = {site.pattern: site for site in fxopt.explain(model).sites}
    assert (sites["glu"].status, sites["glu"].reason) == ("unmatched", "glu: disabled by the options")
    assert sites["rms_norm"].status == "rewritten"


def test_lazy_layers_that_were_never_called_are_said_plainly():
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.ReLU())
    with pytest.raises(
        fxopt.FxoptError, match=r"0.weight of Sequential has no shape yet.*\ncall the model once first"
    ):
        fxopt.optimize(model)
    model(torch.ones(2, 3))
    assert fxopt.optimize(model) is model


def test_a_module_of_torchscript_is_said_plainly():
    with pytest.raises(fxopt.FxoptError, match=r"expected a torch\.nn\.Module, got RecursiveScriptModule"):
        fxopt.optimize(torch.jit.script(nn.Linear(4, 4)))


def test_restoring_an_untouched_model_says_so():
    with pytest.raises(fxopt.FxoptError, match="is not optimized, expected a model that"):
        fxopt.restore(llama())


def test_a_model_under_torch_compile_is_said_plainly():
    with pytest.raises(fxopt.FxoptError, match=r"already under torch\.compile, expected the model itself"):
        fxopt.optimize(torch.compile(llama()))
    with pytest.raises(fxopt.FxoptError, match=r"pass model\._orig_mod: explain reads it"):
        fxopt.explain(torch.compile(llama(), backend="fxopt"))
    model = llama()
    model.model.layers[1].compile()
    with pytest.raises(fxopt.FxoptError, match=r"model.layers.1 \(LlamaDecoderLayer\) is already compiled"):
        fxopt.optimize(model)


def test_explain_changes_nothing():
    model = llama(attention_dropout=0.1).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    report = fxopt.explain(model)
    assert report.sites
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert slots(model) == 0


def test_explain_before_the_first_step_runs_small_inputs_and_costs_no_later_capture():
    model = fxopt.optimize(llama())
    before = fxopt.explain(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    after = fxopt.explain(model)
    assert {(s.pattern, s.op, s.count, s.status) for s in before.sites} == {
        (s.pattern, s.op, s.count, s.status) for s in after.sites
    }
    assert all(region.captures == 1 for region in after.regions)
    assert (before.lowering, after.lowering) == ("auto", "plain"), "what was asked for, then what ran"


class Dropping(nn.Module):
    """Drops before its blocks what it reads after them."""

    def __init__(self):
        super().__init__()
        self.units = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))

    def forward(self, x):
        early = nn.functional.dropout(x, 0.5, self.training)
        for unit in self.units:
            x = unit(early)
        return x.square().mean() + early.sum()


def test_what_explain_reads_from_a_call_of_its_own_is_noted_and_counts_no_fallback():
    given = {"x": torch.randn(4, 8)}
    model = Dropping()
    on_given = "read from one call on the inputs given"
    stock = fxopt.explain(model, given)
    fxopt.optimize(model)
    before = fxopt.explain(model, given)
    for report in (stock, before):
        assert report.fallbacks == ()
        assert "it reads dropout" in report.regions[-1].reason
    assert stock.notes[0].endswith(f", {on_given}")
    assert before.notes[0] == f"{on_given}, for there was no training call yet"
    model(**given).backward()
    assert len(fxopt.explain(model).fallbacks) == 1
    assert not any("read from one call" in note for note in fxopt.explain(model).notes)
    assert fxopt.explain(model, given).notes[0] == f"{on_given}, not from training calls"
    own = fxopt.explain(fxopt.optimize(llama())).notes[0]
    assert own.startswith("read from one call on small inputs of fxopt's own (2 x 16 tokens), ")


def test_what_ran_stock_in_a_look_is_noted_where_no_region_tells_it():
    model = llama()
    given = {"input_ids": IDS, "labels": IDS}
    report = fxopt.explain(model, {**given, "use_cache": True})
    assert report.fallbacks == ()
    assert report.regions[0].reason.startswith("past_key_values is a DynamicCache")
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    report = fxopt.explain(model, given)
    assert report.fallbacks == ()
    assert report.regions[0].reason == ""
    assert any("path in model.layers: a hook sits on the LlamaMLP" in note for note in report.notes)


def test_a_model_that_takes_no_input_ids_asks_for_inputs():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(fxopt.FxoptError, match="takes no input_ids, so fxopt cannot make inputs for it"):
        fxopt.explain(model)
    with pytest.raises(fxopt.FxoptError, match="failed on the inputs given"):
        fxopt.explain(model, {"input": torch.ones(2, 3)})


def test_a_model_without_weights_that_fails_is_told_the_cause_and_a_cure_that_exists():
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            y = self.linear(input)
            if not isinstance(y, FakeTensor) and y.sum() > 0:  # what transformers does for packed sequences
                y = y + 1
            return y.topk(None)[0]  # pyright: ignore

    with torch.device("meta"):
        model = nn.Sequential(Reading(), nn.Linear(4, 4))
    message = (
        r"Sequential, without weights, failed on .*topk\(\).*NoneType \(test_pipeline.py:\d+\)\ngive a config"
    )
    with pytest.raises(fxopt.FxoptError, match=message):
        fxopt.explain(model, {"input": torch.ones(2, 4, device="meta")})


def test_a_planted_error_in_the_op_is_refused_with_figures(monkeypatch):
    """The proof runs the op that will run: break the op, and every match must be refused."""
    from fxopt.kernels.glu import reference

    monkeypatch.setattr(reference, "glu_reference", lambda gate, up, **_: gate.sigmoid() * up * 1.01)
    model, stock = fxopt.optimize(llama()), llama()
    ours, theirs = (m(input_ids=IDS, labels=IDS).loss for m in (model, stock))
    assert torch.allclose(ours, theirs, rtol=1e-5)
    site = next(s for s in fxopt.explain(model).sites if s.pattern == "glu")
    assert site.status == "refused"
    assert site.proof is not None
    assert not site.proof.passed
    assert site.proof.error > 1e-3
    with pytest.raises(fxopt.ProofError, match="glu: the proof failed"):
        fxopt.optimize(gated(), strict=True, example_inputs=GATED)


def test_strict_raises_where_the_proof_of_a_head_fails_though_its_loss_is_rewritten(monkeypatch):
    from fxopt.kernels.linear_cross_entropy import op

    right = op.plain_losses
    monkeypatch.setattr(op, "plain_losses", lambda *arguments: right(*arguments) * 1.01)
    with pytest.raises(fxopt.ProofError, match=r"linear_cross_entropy: the proof failed, .*error .*\nat "):
        fxopt.optimize(llama(), strict=True)
    model = fxopt.optimize(llama())
    model(input_ids=IDS, labels=IDS)
    sites = {site.pattern: site for site in fxopt.explain(model).sites}
    assert sites["linear_cross_entropy"].status == "rewritten"
    assert sites["linear_cross_entropy"].op == "cross_entropy"


def swapped(gate, up):
    return torch.atan(gate) * up


class ArcTangentGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Linear(8, 16)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1)
        return x + gate.atan() * up


def test_strict_raises_where_the_proof_of_a_form_of_the_users_own_fails():
    examples = [(torch.randn(4, 8), torch.randn(4, 8))]
    wrong = fxopt.pattern(swapped, lambda gate, up: torch.atan(up) * gate, examples=examples)
    model = nn.Sequential(*(ArcTangentGate() for _ in range(3)))
    example = {"input": torch.randn(2, 8)}
    with pytest.raises(fxopt.ProofError, match=r"swapped: the proof failed, .*error .*\nat .*\nstrict=False"):
        fxopt.optimize(model, patterns=(*fxopt.ALL, wrong), strict=True, example_inputs=example)
    assert slots(model) == 0
    fxopt.optimize(model, patterns=(*fxopt.ALL, wrong), strict=True, verify="off", example_inputs=example)


@pytest.mark.parametrize("given", ["p", [1], (1,), {1}, 3, torch.ones(2)], ids=repr)
def test_example_inputs_of_explain_that_are_no_dict_are_an_error(given):
    with pytest.raises(fxopt.FxoptError, match=r"example_inputs: expected"):
        fxopt.explain(llama(), given)


def test_a_call_of_the_model_inside_the_optimized_one_is_noted():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **inputs):
            return self.inner(**inputs)

    stock, outer = llama(), Wrapper(llama())
    fxopt.optimize(outer)
    outer(input_ids=IDS, labels=IDS).loss.backward()
    assert not any("optimized Wrapper" in note for note in fxopt.explain(outer).notes)
    outer.zero_grad()
    losses = []
    for model in (outer.inner, stock):
        losses.append(model(input_ids=IDS, labels=IDS, use_cache=False).loss)
        losses[-1].backward()
    assert torch.allclose(*losses, rtol=1e-5)
    notes = [note for note in fxopt.explain(outer).notes if "optimized Wrapper" in note]
    assert len(notes) == 1
    assert "what stands after them ran stock" in notes[0]


def test_strict_raises_where_a_known_form_is_left_unmatched():
    model = llama()
    with pytest.raises(
        fxopt.UnmatchedError, match="glu: expected every known form rewritten, this one was unmatched"
    ):
        fxopt.optimize(model, strict=True, disable=("glu",))
    assert slots(model) == 0
    fxopt.optimize(llama(), strict=True)
    optimized = fxopt.optimize(gated())
    with pytest.raises(fxopt.UnmatchedError):
        fxopt.optimize(optimized, strict=True, disable=("glu",), example_inputs=GATED)
    assert slots(optimized) > 0, "a strict failure left the model less optimized than it was"


def test_strict_raises_where_a_region_stays_stock_and_takes_example_inputs():
    class Breaking(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.linear(x)

    model = nn.Sequential(*(Breaking() for _ in range(3)))
    example = {"input": torch.randn(2, 4)}
    with pytest.raises(fxopt.UnmatchedError, match="expected a captured block, it stays stock"):
        fxopt.optimize(model, strict=True, partial=False, example_inputs=example)
    assert slots(model) == 0
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert fxopt.optimize(plain, strict=True, example_inputs=example) is plain


def test_the_first_pass_is_held_to_the_stock_placeholders_and_verifying_is_not_its_time(monkeypatch):
    def adding(gm, job):
        first = next(iter(gm.graph.nodes))
        with gm.graph.inserting_before(first):
            gm.graph.placeholder("z").meta["example_value"] = None

    def slow(gm, name):
        time.sleep(0.2)

    def make():
        graph = torch.fx.Graph()
        graph.output(graph.placeholder("x"))
        return torch.fx.GraphModule({}, graph)

    given = dict(region="", lazy_outputs=False, options=Options(patterns=()), prover=None)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "verify", slow)
        records = runner.run_passes(make(), passes=pipeline.PASSES, **given).graph.passes
    assert [record.name for record in records] == ["canonicalize", "rewrite", "dropouts", "strides"]
    assert all(record.time_ms < 150 for record in records)
    with pytest.raises(fxopt.VerifyError, match="adding: the placeholders changed, expected x, got z, x"):
        runner.run_passes(make(), passes=(("adding", adding),), **given)


def test_a_site_whose_pattern_is_not_given_says_so():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    model = fxopt.optimize(Norm(), patterns=("cross_entropy",))
    model(torch.randn(3, 8, requires_grad=True)).sum().backward()
    (site,) = fxopt.explain(model).sites
    assert (site.pattern, site.status) == ("rms_norm", "unmatched")
    assert site.reason == "rms_norm is not among the patterns given"


def test_the_report_reads_as_text_and_json():
    import json

    report = fxopt.explain(llama())
    text = str(report)
    assert "rms_norm" in text
    assert "modeling_llama.py:" in text
    data = json.loads(report.to_json())
    assert data["model"] == "LlamaForCausalLM"
    assert len(data["sites"]) == len(report.sites)


def count_calls(run: Callable[[], Any]) -> int:
    """Return how many Python functions `run` calls, all libraries' included: no clock, so no noise."""
    count = 0

    def profile(frame: types.FrameType, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "growth"), [pytest.param(16, 1.15, marks=pytest.mark.exhaustive), (64, 1.5)]
)
def test_cost_grows_with_distinct_blocks_not_layers(layers, growth, monkeypatch):
    """Equal layers cost no capture and no pass of their own, and little else.

    What grows: Dynamo traces the model's own loop over its blocks, 6,200 to 7,600 calls per layer. From 4 to 16
    and to 64 layers the calls of compiling grow 1.06x and 1.29x on torch 2.13, 1.08x and 1.40x on 2.11.
    """
    runs: collections.Counter[str] = collections.Counter()

    def counted(name: str, run: Callable[..., None]) -> Callable[..., None]:
        def count(gm: torch.fx.GraphModule, job: runner.Job) -> None:
            runs[name] += 1
            run(gm, job)

        return count

    monkeypatch.setattr(
        pipeline, "PASSES", tuple((name, counted(name, run)) for name, run in pipeline.PASSES)
    )

    step(fxopt.optimize(llama()))  # what is done once per process is nobody's cost
    work: list[int] = []
    for number in (4, layers):
        model = llama(number)
        runs.clear()
        first = count_calls(lambda model=model: step(fxopt.optimize(model)))
        work.append(first - count_calls(lambda model=model: step(model)))
        assert runs == {name: 2 for name, _ in pipeline.PASSES}, f"one block and one tail, of {number} layers"
        assert [region.captures for region in fxopt.explain(model).regions] == [1, 1]
    assert work[1] <= growth * work[0], work


def test_a_refused_match_of_a_users_own_pattern_is_in_the_report():
    class Growth(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Linear(8, 8)

        def forward(self, x):
            return torch.exp(self.rate(x)) - 1

    wrong = fxopt.Pattern("expm1", lambda: exp(tensor("x")) - 1, lambda m: call(torch.exp, m["x"]))
    unwanted = fxopt.Pattern(
        "expm1", wrong.search, lambda m: call(torch.expm1, m["x"]), lambda m: m.fail("not today", "x")
    )
    for pattern, reason in ((wrong, "error"), (unwanted, "not today")):
        model = fxopt.optimize(Growth(), patterns=(pattern,))
        model(torch.randn(4, 8)).sum().backward()
        report = fxopt.explain(model)
        assert report.rewrites == ()
        told = [miss for miss in report.mismatches if miss.pattern == "expm1" and reason in miss.reason]
        assert told, report.mismatches
        assert told[0].location.startswith("test_pipeline.py:")


def step(model: nn.Module) -> torch.Tensor:
    """Return the loss of one step on `IDS`, its gradients made."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach()


def assert_steps_as(model: nn.Module, stock: nn.Module) -> None:
    assert torch.allclose(step(model), step(stock), rtol=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, atol=1e-5), name


@pytest.mark.parametrize(
    "path",
    [
        "",
        *(pytest.param(path, marks=pytest.mark.slow) for path in ("model.layers.1", "model.layers.0.mlp")),
        pytest.param("model.layers.0", marks=pytest.mark.exhaustive),
    ],
)
def test_what_the_user_compiles_after_optimize_runs_is_told_and_survives_restore(path, caplog):
    model, stock = fxopt.optimize(llama()), llama()
    assert_steps_as(model, stock)
    compiled = model.get_submodule(path)
    compiled.compile(backend="eager")
    theirs = compiled.__dict__["_compiled_call_impl"]
    assert_steps_as(model, stock)
    if path != "model.layers.0.mlp":
        told = f"{path or 'the model'} was compiled by module.compile() after fxopt.optimize"
        assert told in str(fxopt.explain(model))
        with pytest.raises(fxopt.FxoptError, match=r"already compiled by module.compile\(\), expected stock"):
            fxopt.optimize(model, disable=("glu",))
    with caplog.at_level(logging.WARNING, logger="fxopt"):
        assert fxopt.restore(model) is model
    assert ("left so" in caplog.text) == (path != "model.layers.0.mlp")
    assert compiled.__dict__["_compiled_call_impl"] is theirs
    assert slots(model) == 1, "nothing of fxopt is left"
    assert_steps_as(model, stock)


def glus(report: fxopt.Report) -> int:
    return sum(site.count for site in report.sites if site.pattern == "glu")


@pytest.mark.parametrize("place", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_block_that_was_replaced_since_has_no_sites(place):
    model = fxopt.optimize(llama(), patterns=("glu", "linear_cross_entropy"))
    step(model)
    whole = fxopt.explain(model)
    assert glus(whole) == 2
    other = copy.deepcopy(model.model.layers[place])
    model.model.layers[place] = other
    report = fxopt.explain(model)
    assert glus(report) == 1
    assert {graph.layers for graph in report.graphs} == {1}
    assert (report.regions[0].count, report.regions[0].unseen) == (2, 1)
    (note,) = (note for note in report.notes if "replaced" in note)
    assert note == (
        f"model.layers.{place} was replaced after fxopt.optimize: what is there now is not captured as a block; "
        "fxopt.optimize(model) again takes it in"
    )
    assert "not captured, their sites are in no count: 1 of 2 blocks at model.layers.0" in str(report)
    assert_steps_as(model, copy.deepcopy(model))
    fxopt.optimize(model, patterns=("glu", "linear_cross_entropy"))
    step(model)
    report = fxopt.explain(model)
    assert (glus(report), report.regions[0].unseen) == (2, 0)
    assert not any("replaced" in note for note in report.notes)


@pytest.mark.parametrize("place", [0, *(pytest.param(place, marks=pytest.mark.slow) for place in (1, 2))])
def test_a_block_that_was_taken_out_since_has_no_sites(place):
    model = fxopt.optimize(llama(3), patterns=("glu", "linear_cross_entropy"))
    step(model)
    del model.model.layers[place]
    report = fxopt.explain(model)
    assert glus(report) == 2
    assert (report.regions[0].count, report.regions[0].unseen) == (2, 0)
    assert f"model.layers.{place} was taken out of the model after fxopt.optimize" in report.notes
    assert not any("replaced" in note for note in report.notes)


def test_a_block_in_a_wrapper_is_still_a_block():
    model = fxopt.optimize(llama(), patterns=("glu", "linear_cross_entropy"))
    step(model)
    model.model.layers[1] = nn.Sequential(model.model.layers[1])
    report = fxopt.explain(model)
    assert (glus(report), report.regions[0].unseen) == (2, 0)
    assert not any("model.layers.1" in note for note in report.notes)


def test_a_module_under_torch_compile_inside_is_said_plainly():
    model = llama()
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    for function in (fxopt.optimize, fxopt.explain):
        with pytest.raises(
            fxopt.FxoptError, match=r"model.layers.1 \(OptimizedModule\) is already compiled by"
        ):
            function(model)
    for function in (fxopt.explain, fxopt.restore):
        with pytest.raises(
            fxopt.FxoptError, match=r"already under torch\.compile, expected the model itself"
        ):
            function(torch.compile(fxopt.optimize(llama()), backend="eager"))


def with_adapters(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], r=4)
    return peft.get_peft_model(model, config)


@pytest.mark.slow
def test_adapters_put_on_an_optimized_model_train_as_on_a_stock_one(caplog):
    model = fxopt.optimize(llama())
    step(model)
    adapted, stock = with_adapters(model), with_adapters(llama())
    assert_steps_as(adapted, stock)
    assert not fxopt.explain(adapted).fallbacks
    assert {site.status for site in fxopt.explain(adapted).sites} == {"rewritten"}
    with caplog.at_level(logging.WARNING, logger="fxopt"):
        fxopt.optimize(adapted)
    assert "was optimized as LlamaForCausalLM: restored, optimized anew" in caplog.text
    assert_steps_as(adapted, stock)
    assert fxopt.restore(adapted) is adapted
    assert slots(adapted) == 0
    fxopt.optimize(model)
    fxopt.restore(adapted)
    assert slots(adapted) == 0


@pytest.mark.slow
def test_a_model_taken_out_of_its_adapters_is_restored_and_optimized(caplog):
    adapted, stock = fxopt.optimize(with_adapters(llama())), with_adapters(llama())
    assert_steps_as(adapted, stock)
    merged, stock = (each.merge_and_unload().requires_grad_(True) for each in (adapted, stock))
    assert_steps_as(merged, stock)
    assert fxopt.restore(merged) is merged
    assert slots(merged) == 0
    adapted = fxopt.optimize(with_adapters(llama()))
    merged = adapted.merge_and_unload().requires_grad_(True)
    with caplog.at_level(logging.WARNING, logger="fxopt"):
        fxopt.optimize(merged)
    assert "was optimized as PeftModelForCausalLM: restored, optimized anew" in caplog.text
    assert_steps_as(merged, stock)
    assert not fxopt.explain(merged).fallbacks
    fxopt.restore(merged)
    assert slots(merged) == 0


@pytest.mark.parametrize(
    "kinds",
    [("rms_norm", "attention"), pytest.param(("rope", "linear_cross_entropy"), marks=pytest.mark.slow)],
)
def test_a_disabled_pattern_is_the_reason_of_its_sites(kinds):
    disable = (*kinds, "cross_entropy") if "linear_cross_entropy" in kinds else kinds
    model = fxopt.optimize(llama(), disable=disable)
    step(model)
    report = fxopt.explain(model)
    left = [site for site in report.sites if site.status != "rewritten"]
    expected = {(kind, f"{kind}: disabled by the options") for kind in kinds}
    assert {(site.pattern, site.reason) for site in left} == expected
    assert str(report).count("did not match") == 0, "told once, with its site"


class Breaking(nn.Module):
    """Two norms, and between them two lines that Dynamo cannot capture."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.ones(8)) for _ in range(2))
        self.linear = nn.Linear(8, 8)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x, self.first)
        if x.sum().item() > 1e9:
            return x
        x = self.linear(x)
        torch._dynamo.graph_break()
        return self.norm(x, self.second)


def test_partial_tells_all_pieces_of_a_block_and_where_and_why_it_breaks():
    first_line = Breaking.forward.__code__.co_firstlineno
    model = fxopt.optimize(nn.Sequential(*(Breaking() for _ in range(3))))
    for _ in range(2):
        model(torch.randn(4, 8)).sum().backward()
    report = fxopt.explain(model)
    assert [(site.pattern, site.count) for site in report.sites] == [("rms_norm", 3), ("rms_norm", 3)]
    assert len({graph.capture for graph in report.graphs}) >= 3
    block, tail = report.regions
    assert (block.kind, block.status) == ("block", "captured")
    item, inserted = block.breaks
    assert item.startswith("what is computed depends on the values of a tensor; ")
    assert item.endswith(f"at test_pipeline.py:{first_line + 2}")
    assert "graph_break" in inserted
    assert inserted.endswith(f"at test_pipeline.py:{first_line + 5}")
    text = " ".join(str(report).split())
    assert f"breaks into pieces: {item}" in text
    assert tail.status == "captured"
    assert report.fallbacks == ()


def test_what_keeps_the_head_stock_is_told_by_the_models_own_line():
    model = fxopt.optimize(Dropping())
    model(torch.randn(4, 8)).backward()
    (fallback,) = fxopt.explain(model).fallbacks
    line = Dropping.forward.__code__.co_firstlineno + 1
    assert (
        f"it reads dropout at test_pipeline.py:{line} (before the last block), which may" in fallback.reason
    )


def test_a_rehearsal_leaves_the_graph_alone_and_its_failure_to_the_rewriting(
    monkeypatch, caplog, tmp_path
) -> None:
    """Where kernels compile, rewrites are rehearsed on a copy: the same report, and each structure ran once.

    What a process noted as compiled is not rehearsed again.
    """
    rehearsed = []
    cache = tmp_path / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(compiled.launch, "is_available", lambda: True)

    def count(self, match, replacement):
        rehearsed.append(match.pattern.name)
        return Proof(True, "", "", 0.0, 0.0, "", (), (), "", "")

    def report_of(fails=False):
        def fail(self, match, replacement):
            raise RuntimeError("no compiler")

        monkeypatch.setattr(pipeline.Prover, "rehearse", fail if fails else count)
        return fxopt.explain(gated(), GATED)

    without = report_of()
    assert {rewrite.pattern for rewrite in without.rewrites} == {"rms_norm", "glu"}
    assert not rehearsed
    monkeypatch.setattr(compiled, "find_gpu", lambda gm: torch.device("cuda"))
    assert report_of().sites == without.sites
    assert sorted(rehearsed) == sorted(rewrite.pattern for rewrite in without.rewrites)
    num_rehearsed = len(rehearsed)
    assert report_of().sites == without.sites
    assert len(rehearsed) == num_rehearsed
    shutil.rmtree(cache)
    caplog.set_level("DEBUG", "fxopt")
    assert report_of(fails=True).sites == without.sites
    assert "a rehearsal of the rewrites failed: RuntimeError: no compiler" in caplog.text


@pytest.mark.parametrize("disable", [(), pytest.param(("linear_cross_entropy",), marks=pytest.mark.slow)])
def test_a_label_that_is_no_class_is_an_error_of_the_type_that_stock_raises(disable):
    model = fxopt.optimize(llama(), disable=disable)
    step(model)
    for label in (9999, -1):
        labels = IDS.clone()
        labels[0, 3] = label
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
            llama()(input_ids=IDS, labels=labels)
        with pytest.raises(IndexError, match=f"label {label} is out of bounds, expected 0 to "):
            model(input_ids=IDS, labels=labels)
        assert step(model).isfinite(), "the next call is served as before"
    assert not fxopt.explain(model).fallbacks
