"""What two reports are compared by beside their sites: plans and figures that are gone."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from fxopt.errors import FxoptError
from fxopt.report.diff import diff_reports
from fxopt.report.load import parse_report
from fxopt.report.plan import Plan
from fxopt.report.records import Fallback, GraphRecord, NodeRecord, Report, Site, Work

NODE = NodeRecord("exp", "exp", "exp", "op", (), "f32[4]", 16, "", "f.py:1", "", ())
GRAPH = GraphRecord("layers", 0, "", "", (), (), 2, (NODE,), (NODE,), "", Work(1, 1, 16), Work(1, 1, 2048))
PLAN = Plan("Tiny", "H100", "plain", "min", None, 32, (), (), 1, 1, 2**30, "tail", 1.0, 0.0)
WHOLE = Report(
    "Tiny",
    (Site("glu", "glu", 2, "rewritten", "mlp", "f.py:1"),),
    graphs=(GRAPH,),
    fallbacks=(Fallback("layers", "a cache", 1),),
    plans=(PLAN,),
)


def test_a_plan_that_is_gone_is_lost() -> None:
    bare = dataclasses.replace(WHOLE, plans=())
    (text,) = diff_reports(WHOLE, bare).lost
    assert text == "plan for H100, budget min, 32 tokens: no longer there"
    assert diff_reports(bare, WHOLE).gained == ("plan for H100, budget min, 32 tokens: new",)


def test_a_plan_for_another_step_is_a_change() -> None:
    other = dataclasses.replace(WHOLE, plans=(dataclasses.replace(PLAN, tokens=64),))
    found = diff_reports(WHOLE, other)
    assert (found.lost, found.gained) == ((), ())
    assert len(found.changed) == 2


def test_figures_that_are_no_longer_known_are_lost() -> None:
    less = dataclasses.replace(WHOLE, graphs=(dataclasses.replace(GRAPH, work_after=None),))
    found = diff_reports(WHOLE, less)
    assert found.lost == (
        "layers, capture 0: 2 kernels -> not known",
        "layers, capture 0: 2.0 KiB saved -> not known",
    )
    back = diff_reports(less, WHOLE)
    assert (back.lost, len(back.gained)) == ((), 2)


@pytest.mark.parametrize(
    ("kind", "field"), [("sites", "count"), ("fallbacks", "count"), ("graphs", "layers"), ("plans", "tokens")]
)
def test_a_negative_count_is_refused(kind: str, field: str) -> None:
    assert parse_report(WHOLE.to_json()) == WHOLE
    fields: Any = json.loads(WHOLE.to_json())
    fields[kind][0][field] = -1
    with pytest.raises(FxoptError, match=rf"{kind}\[0\].{field} is -1, expected 0 or more\nwrite it anew"):
        parse_report(json.dumps(fields))
