"""What patterns without sites rewrote is told at the top of every form of a report."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

import fxopt
from fxopt.report.diff import diff_reports
from fxopt.report.html import render_html
from fxopt.report.load import parse_report
from fxopt.report.records import Report

X = torch.randn(4, 8)


def growth(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x) - 1


def softer(x: torch.Tensor) -> torch.Tensor:
    return torch.log(x.abs() + 1)


MINE = (
    fxopt.pattern(growth, torch.expm1, [(X,)]),
    fxopt.pattern(softer, lambda x: torch.log1p(x.abs()), [(X,)], name="softer"),
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + growth(self.up(x)) + growth(softer(x))


@pytest.fixture(scope="module")
def report() -> Report:
    model = fxopt.optimize(nn.Sequential(*(Block() for _ in range(3))), patterns=(*fxopt.ALL, *MINE))
    model(torch.randn(2, 4, 8)).sum().backward()
    return fxopt.explain(model)


def test_text_tells_them_at_the_top(report: Report) -> None:
    _, sites, elsewhere, *_ = str(report).splitlines()
    assert sites == "no sites of the library's forms found"
    assert re.fullmatch(r"9 rewrites elsewhere: .*", elsewhere)
    assert "growth -> expm1 x 6" in elsewhere
    assert "softer -> softer x 3" in elsewhere
    assert re.search(r"^  growth +expm1 +6 = 2 x 3  0 \(test_elsewhere.py:\d+\)$", str(report), re.MULTILINE)
    assert re.search(r"^  expm1 +float32 +cpu ", str(report), re.MULTILINE), "their proofs are told too"


def test_html_and_json_tell_the_same(report: Report) -> None:
    text = re.sub(r"\s+", " ", render_html(report))
    head = text[: text.index("</header>")]
    assert '<span class="name">Rewrites elsewhere</span><b>9</b>' in head
    assert "growth → expm1 × 6" in head
    assert "softer → softer × 3" in head
    assert "No sites found" not in text
    fields = json.loads(report.to_json())["elsewhere"]
    assert sorted((each["pattern"], each["op"], each["count"]) for each in fields) == [
        ("growth", "expm1", 3),
        ("growth", "expm1", 3),
        ("softer", "softer", 3),
    ]
    assert parse_report(report.to_json()).elsewhere == report.elsewhere


def test_a_report_without_rewrites_has_none_elsewhere() -> None:
    bare = fxopt.explain(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), {"input": X})
    assert bare.elsewhere == ()
    assert "elsewhere" not in str(bare) + render_html(bare)
    assert str(bare).splitlines()[1] == "the model is stock: no sites found"


def test_rewrites_at_sites_are_not_told_twice() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    found = fxopt.explain(nn.Sequential(Gated()), {"input": X})
    assert [(site.op, site.status) for site in found.sites] == [("glu", "rewritten")]
    assert found.elsewhere == ()


def test_a_diff_tells_them_lost(report: Report) -> None:
    found = diff_reports(report, Report(report.model, regions=report.regions))
    assert sorted(text.partition(":")[0] for text in found.lost) == ["growth x 6 at 0", "softer x 3 at 0"]


def test_a_file_written_before_they_were_told_is_read(report: Report) -> None:
    fields = json.loads(report.to_json())
    del fields["elsewhere"]
    assert parse_report(json.dumps(fields)).elsewhere == ()
