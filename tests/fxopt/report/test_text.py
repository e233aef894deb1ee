"""The text report, against golden files; `--update-golden` writes them anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fxopt.report.records import (
    Fallback,
    GraphRecord,
    MismatchRecord,
    PassRecord,
    Proof,
    RegionRecord,
    Report,
    RewriteRecord,
    Site,
)
from fxopt.report.text import WIDTH, render_text

GOLDEN = Path(__file__).parent / "golden"

BEFORE = """
def forward(self, L_hidden_ : torch.Tensor, L_weight_ : torch.Tensor, L_gate_ : torch.Tensor):
    l_hidden_ = L_hidden_
    x = l_hidden_.to(torch.float32)
    square = x.pow(2);  l_hidden_ = None
    mean = square.mean(-1, keepdim = True);  square = None
    add = mean + 1e-06;  mean = None
    rsqrt = torch.rsqrt(add);  add = None
    mul = x * rsqrt;  x = rsqrt = None
    to = mul.to(torch.float32);  mul = None
    out = L_weight_ * to;  L_weight_ = to = None
    linear = torch._C._nn.linear(out, L_gate_, None);  out = L_gate_ = None
    return (linear,)
"""
AFTER = """
def forward(self, L_hidden_ : torch.Tensor, L_weight_ : torch.Tensor, L_gate_ : torch.Tensor):
    l_hidden_ = L_hidden_
    rms_norm = fxopt_kernels_rms_norm_rms_norm(l_hidden_, L_weight_, None, eps = 1e-06, offset = 0.0, \
cast_first = True, centre = False, out_dtype = None);  l_hidden_ = L_weight_ = None
    linear = torch._C._nn.linear(rms_norm, L_gate_, None);  rms_norm = L_gate_ = None
    return (linear,)
"""


def proof(error: float, *, passed: bool = True, worst: str = "gradient of weight") -> Proof:
    return Proof(passed, "float32", "cpu", error, 2.5e-7, worst, ("output",), ("[2, 8, 64]", "[64]"))


NORM = RewriteRecord(
    "rms_norm",
    "rms_norm",
    ("to", "pow", "mean", "rsqrt", "mul"),
    ("rms_norm",),
    {"eps": 1e-6},
    "modeling.py:72",
)
PASSES = (PassRecord("canonicalize", 3.25, 12, 11), PassRecord("rewrite", 10.5, 11, 4))
GRAPH = GraphRecord("model.layers.0", 0, BEFORE, AFTER, (NORM,), PASSES)
FULL = Report(
    model="LlamaForCausalLM",
    lowering="plain",
    sites=(
        Site("rms_norm", "rms_norm", 28, "rewritten", "model.layers.0.input_layernorm", "modeling.py:72",
             proof=proof(3e-7)),
        Site("rms_norm", "rms_norm", 28, "rewritten", "model.layers.0.post_attention_layernorm", "modeling.py:72",
             proof=proof(4e-7)),
        Site("rms_norm", "rms_norm", 1, "rewritten", "model.norm", "modeling.py:72", proof=proof(1e-7)),
        Site(
            "glu", "", 28, "refused", "model.layers.0.mlp", "modeling.py:180", "the proof failed",
            proof(0.31, passed=False, worst="gradient of up"),
        ),
        Site(
            "linear_cross_entropy", "", 1, "unmatched", "", "loss_utils.py:40",
            "labels are probabilities of shape [N, V], expected class indices of shape [N]: a soft target needs every "
            "logit, so there is nothing to leave out",
        ),
    ),
    mismatches=(
        MismatchRecord("linear_cross_entropy", "told by the site above", "", "loss_utils.py:41"),
    ),
    graphs=(GRAPH, dataclasses.replace(GRAPH, capture=1)),
    regions=(
        RegionRecord("block", "model.layers.0", 28, "captured", 2),
        RegionRecord("model", "", 1, "stock", 0, "graph break at modeling.py:300: data-dependent loop"),
    ),
    fallbacks=(Fallback("model.layers.0", "called with a cache", 56),),
    guards=("hidden_states: [s0, s1, 64]",),
    notes=("use_cache is True in training: the cache is not built",),
)  # fmt: skip
CASES = {
    "full": FULL,
    "empty": Report("Linear"),
    "clean": dataclasses.replace(
        FULL, sites=FULL.sites[:3], mismatches=(), fallbacks=(), regions=FULL.regions[:1], notes=()
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_text_is_as_in_the_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    text = render_text(CASES[name])
    path = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_no_line_is_wider_than_the_limit(name: str) -> None:
    assert max(map(len, render_text(CASES[name]).splitlines())) <= WIDTH


def test_str_of_a_report_is_its_text() -> None:
    assert str(FULL) == render_text(FULL)


def test_every_no_shows_its_place_and_reason() -> None:
    text = render_text(FULL)
    for site in FULL.sites:
        if site.status != "rewritten":
            assert site.location in text
            assert " ".join(site.reason.split()[:5]) in text


def test_a_miss_that_a_site_tells_already_is_not_repeated() -> None:
    site = Site("glu", "", 1, "unmatched", "mlp", "f:1", "glu: no product")
    miss = MismatchRecord("glu", "no product", "mlp", "f:1")
    assert render_text(Report("Tiny", sites=(site,), mismatches=(miss, miss))).count("no product") == 1


def test_names_freed_by_generated_code_are_no_change() -> None:
    before = "def forward(self, x):\n    y = x + 1;  x = None\n    return y\n"
    graph = GraphRecord("block", 0, before, before.replace(";  x = None", ""), (), ())
    assert "no change" in render_text(Report("Tiny", graphs=(graph,)))


def test_an_oracle_in_float32_is_named() -> None:
    usual, large = proof(2e-7), dataclasses.replace(proof(3e-7), oracle_dtype="float32")
    sites = tuple(
        Site("glu", "glu", 1, "rewritten", "m", "f:1", proof=given) for given in (usual, large, usual)
    )
    rows = [line for line in render_text(Report("Tiny", sites=sites)).splitlines() if " cpu " in line]
    assert [row.split()[:4] for row in rows] == [
        ["glu", "float32", "cpu", "2"],
        ["glu", "float32", "against", "float32"],
    ]
    refused = (Site("glu", "", 1, "refused", "m", "f:1", "wrong", large),)
    assert "against float32" in render_text(Report("Tiny", sites=refused))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((1,), "1"),
        ((1, 1), "2"),
        ((28,), "28 = 1 x 28"),
        ((28, 28, 1), "57 = 2 x 28 + 1"),
        ((3, 1, 2), "6 = 1 x 3 + 1 x 2 + 1"),
    ],
)
def test_counts_show_sites_times_layers(counts: tuple[int, ...], expected: str) -> None:
    sites = tuple(Site("glu", "glu", count, "rewritten", "m", "f:1") for count in counts)
    row = next(
        line for line in render_text(Report("Tiny", sites=sites)).splitlines() if line.startswith("  glu")
    )
    assert row.split("glu")[-1].rsplit("-", 2)[0].strip() == expected
