"""The text report, against golden files; `--update-golden` writes them anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from fxopt.graph import vocabulary
from fxopt.graph.snapshot import snapshot
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


def rms_norm(x: torch.Tensor, weight: torch.Tensor, gate: None, **attributes: Any) -> torch.Tensor:
    return x * weight


def snapshots() -> tuple[str, str]:
    """Return a small graph before and after its norm became one op, written as the pipeline writes them."""

    def start() -> tuple[fx.Graph, list[fx.Node]]:
        graph = fx.Graph()
        nodes = [
            graph.placeholder(name)
            for name in (
                "l_hidden_",
                "l_self_modules_norm_parameters_weight_",
                "l_self_modules_up_parameters_weight_",
            )
        ]
        for node, shape in zip(nodes, ((2, 8, 64), (64,), (128, 64)), strict=True):
            node.meta["example_value"] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        return graph, nodes

    def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda item: item.meta["example_value"])
        node.meta["example_value"] = target(*values[0], **values[1])
        return node

    texts: list[str] = []
    for fused in (False, True):
        graph, (x, weight, up) = start()
        if fused:
            options = dict(
                eps=1e-6, offset=0.0, cast_first=True, centre=False, groups=1, out_dtype=torch.bfloat16
            )
            y = call(graph, rms_norm, x, weight, None, **options)
        else:
            wide = call(graph, vocabulary.cast, x, dtype=torch.float32)
            mean = call(graph, torch.mean, call(graph, torch.pow, wide, exponent=2), dim=(-1,), keepdim=True)
            root = call(graph, torch.rsqrt, call(graph, torch.add, mean, 1e-6))
            normal = call(graph, vocabulary.cast, call(graph, torch.mul, wide, root), dtype=torch.bfloat16)
            y = call(graph, torch.mul, weight, normal)
        graph.output((call(graph, torch.nn.functional.linear, y, up, None),))
        texts.append(snapshot(fx.GraphModule({}, graph)))
    return texts[0], texts[1]


def proof(error: float, *, passed: bool = True, worst: str = "gradient of weight") -> Proof:
    return Proof(passed, "float32", "cpu", error, 2.5e-7, worst, ("output",), ("[2, 8, 64]", "[64]"))


NORM = RewriteRecord(
    "rms_norm",
    "rms_norm",
    ("cast", "pow_1", "mean", "add", "rsqrt", "mul", "cast_1", "mul_1"),
    ("rms_norm",),
    {"eps": 1e-6},
    "modeling.py:72",
)
PASSES = (PassRecord("canonicalize", 3.25, 12, 11), PassRecord("rewrite", 10.5, 11, 4))
GRAPH = GraphRecord("model.layers.0", 0, *snapshots(), (NORM,), PASSES)
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
        RegionRecord(
            "model", "", 1, "stock", 0, "graph break at modeling.py:300: data-dependent loop", unseen=1
        ),
    ),
    fallbacks=(Fallback("model.layers.0", "called with a cache", 56),),
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


def test_backends_are_named_with_the_layers_they_serve() -> None:
    served, other = "cudnn (2 x 4096 x 4096: cudnn 0.61 ms, flash 0.92 ms)", "chosen at the first call"
    sites = (
        Site("attention", "attention", 24, "rewritten", "layers.0", "f:1", backend=served),
        Site("attention", "attention", 4, "rewritten", "layers.24", "f:2", backend=served),
        Site("attention", "attention", 1, "rewritten", "last", "f:3", backend=other),
        Site("glu", "glu", 28, "rewritten", "layers.0", "f:4"),
    )
    assert (
        f"Backends\n  op         sites  served by\n  attention     28  {served}\n  attention      1  {other}\n\n"
    ) in render_text(Report("Tiny", sites=sites))
    assert "Backends" not in render_text(Report("Tiny", sites=sites[-1:]))


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


def test_equal_graphs_are_no_change() -> None:
    before, _ = snapshots()
    graph = GraphRecord("block", 0, before, before, (), ())
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
