"""What lives at each instant of a region: ops that may run in place need no memory beside what they write over."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fxopt.kernels.launch import DECLARED
from fxopt.kernels.lora_linear import gated
from fxopt.remat.devices import DEVICES
from fxopt.remat.joint import Joint, read_joint
from fxopt.remat.liveness import simulate
from fxopt.remat.menu import find_menu

WIDE = 4 * 128 * 512
"""The bytes of gate, of up, and of the gradient of each."""


@pytest.fixture
def read(trace_unit: Any) -> Any:
    """Return what gives a unit's joint graph as the planner reads it."""

    def read(name: str, *, fuses: bool = True) -> Joint:
        graph, held = trace_unit(name)
        return read_joint(graph, held, DEVICES[0], fuses=fuses, declared=DECLARED)

    return read


def spared_by(joint: Joint) -> list[int]:
    """Return the bytes of backward that each choice of the menu is spared by what runs in place, the fastest first."""
    apart = dataclasses.replace(joint, overwriting={})
    return [
        simulate(apart, choice).backward - simulate(joint, choice).backward for choice in find_menu(joint.dag)
    ]


@pytest.mark.parametrize(("name", "at_most"), [("adapted", 2), ("dense", 3)])
def test_what_is_computed_again_is_written_over_and_what_is_saved_is_not(
    name: str, at_most: int, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated, "_suits", lambda *_: True)  # as with wide values in 16 bits
    spared = spared_by(read(name))
    assert spared[0] == WIDE  # gate and up are saved: over the gradient of the unit
    assert WIDE < spared[-1] <= at_most * WIDE


def test_where_nodes_run_one_by_one_nothing_is_written_over(read: Any) -> None:
    assert not any(spared_by(read("adapted", fuses=False)))
