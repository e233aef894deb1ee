"""The public functions: what they accept, refuse and leave alone."""

from __future__ import annotations

import logging
import time

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import fxopt

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
    ]
    assert slots(model) == 0


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": ("rms_nrom",)}, r"patterns: unknown name 'rms_nrom', expected one of rms_norm, "),
        ({"disable": ("gluu",)}, r"disable: unknown name 'gluu', expected one of glu, "),
        ({"lowering": "inductr"}, r"lowering: unknown name 'inductr', expected one of inductor, "),
        ({"verify": "yes"}, r"verify: unknown name 'yes', expected one of "),
        ({"patterns": (3,)}, r"patterns: expected names or fxopt.Pattern objects, got int"),
        ({"patterns": ("glu", "glu")}, r"patterns: glu is given 2 times"),
        ({"strict": "no"}, r"strict: expected True or False, got 'no'"),
    ],
)
def test_unknown_options_name_the_nearest_valid_ones(options, message):
    model = llama()
    with pytest.raises(fxopt.FxoptError, match=message):
        fxopt.optimize(model, **options)
    assert slots(model) == 0


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
    assert sites["glu"].status == "unmatched"
    assert sites["rms_norm"].status == "rewritten"


def test_restoring_an_untouched_model_says_so():
    with pytest.raises(fxopt.FxoptError, match="is not optimized, expected a model that"):
        fxopt.restore(llama())


def test_a_model_under_torch_compile_is_said_plainly():
    with pytest.raises(fxopt.FxoptError, match=r"already under torch\.compile, expected the model itself"):
        fxopt.optimize(torch.compile(llama()))
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


def test_a_model_that_takes_no_input_ids_asks_for_inputs():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(fxopt.FxoptError, match="takes no input_ids, so fxopt cannot make inputs for it"):
        fxopt.explain(model)
    with pytest.raises(fxopt.FxoptError, match="failed on small inputs"):
        fxopt.explain(model, {"input": torch.ones(2, 3)})


def test_a_planted_error_in_the_op_is_refused_with_figures(monkeypatch):
    """The proof runs the op that will run: break the op, and every match must be refused."""
    from fxopt.kernels import glu

    monkeypatch.setattr(glu, "glu_reference", lambda gate, up, *, act: gate.sigmoid() * up * 1.01)
    model, stock = fxopt.optimize(llama()), llama()
    ours, theirs = (m(input_ids=IDS, labels=IDS).loss for m in (model, stock))
    assert torch.allclose(ours, theirs, rtol=1e-5)
    site = next(s for s in fxopt.explain(model).sites if s.pattern == "glu")
    assert site.status == "refused"
    assert site.proof is not None
    assert not site.proof.passed
    assert site.proof.error > 1e-3
    with pytest.raises(fxopt.ProofError, match="glu: the proof failed"):
        fxopt.optimize(llama(), strict=True)


def test_strict_raises_where_a_known_form_is_left_unmatched():
    model = llama()
    with pytest.raises(fxopt.UnmatchedError, match="glu: a known form was left unmatched"):
        fxopt.optimize(model, strict=True, disable=("glu",))
    assert slots(model) == 0
    fxopt.optimize(llama(), strict=True)


def test_the_report_reads_as_text_and_json():
    import json

    report = fxopt.explain(llama())
    text = str(report)
    assert "rms_norm" in text
    assert "modeling_llama.py:" in text
    data = json.loads(report.to_json())
    assert data["model"] == "LlamaForCausalLM"
    assert len(data["sites"]) == len(report.sites)


def test_cost_grows_with_distinct_blocks_not_layers():
    """Optimize and look: 4, 16 and 64 equal layers within 1.5x of each other, by the best of three."""
    times = {}
    for layers in (4, 16, 64):
        best = float("inf")
        for _ in range(3):
            model = llama(layers)
            start = time.perf_counter()
            fxopt.optimize(model)
            best = min(best, time.perf_counter() - start)
        times[layers] = best
    report = fxopt.explain(llama(64))
    assert all(region.captures <= 2 for region in report.regions)
    assert max(times.values()) < 0.5, times
