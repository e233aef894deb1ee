"""What a block may do as a whole, in chunks, and with some rows of a value kept: each stands for what it says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch import fx

from fxopt.kernels.launch import DECLARED
from fxopt.remat import views
from fxopt.remat.cost import PICOSECONDS
from fxopt.remat.decide import find_choice, make_menu
from fxopt.remat.devices import DEVICES, LINK_SHARE
from fxopt.remat.joint import Joint, read_joint
from fxopt.remat.offload import wait_of
from fxopt.remat.views import Views

TOKENS, WIDE = 128, 4 * 128 * 512


def test_rows_fill_the_bus_and_every_decision_is_found_again_in_its_graph(
    trace_unit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "SMALLEST", TOKENS // 4)
    graph, held = trace_unit("adapted")
    free = dataclasses.replace(DEVICES[0], launch_ps=0, single_flops=1e12)  # products wait for arithmetic
    forward = read_joint(graph, held, free, fuses=True, declared=DECLARED).forward_cost
    device = dataclasses.replace(free, link=0.7 * WIDE * PICOSECONDS / forward / LINK_SHARE)

    def read(graph: fx.Graph) -> Joint:
        return read_joint(graph, held, device, fuses=True, declared=DECLARED)

    block = Views(graph, read, DECLARED)
    plain = make_menu(block.whole, TOKENS, offloads=True)
    menu = block.add_parts(block.add_chunks(plain))
    assert {decision.chunks for decision in menu.decisions} == {1, 4}
    for choice, decision in zip(menu.choices, menu.decisions, strict=True):
        view = block.find_view(decision)
        assert view is not None
        found = find_choice(view.joint, decision)
        assert not isinstance(found, str)
        assert (found.saved, found.recomputed, found.offloaded) == (
            choice.saved,
            choice.recomputed,
            choice.offloaded,
        )
        assert not (decision.part_of and decision.chunks > 1)
        assert not (decision.part_of and wait_of(view.joint, choice))
    kept = [decision for decision in menu.decisions if decision.part_of]
    assert kept
    for decision in kept:
        assert 0 < decision.sixteenths < 16 * 0.7
        one_more = dataclasses.replace(decision, sixteenths=decision.sixteenths + 1)
        view = block.find_view(one_more)
        assert view is not None
        more = find_choice(view.joint, one_more)
        assert not isinstance(more, str)
        assert wait_of(view.joint, more) > 0
