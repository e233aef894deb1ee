"""Choices side by side: each peak is that of its own simulated step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.remat.choice import host_bytes_of, peak_of, time_of
from fxopt.remat.peaks import host_bytes_of_all, peaks_of, times_of
from fxopt.remat.step import Around
from fxopt.report.plan import Decision

sizes = st.integers(0, 60)


@st.composite
def decisions(draw: st.DrawFn) -> Decision:
    saved, moved = draw(sizes), draw(st.sampled_from((0, 0, 8, 13)))
    return Decision(
        saved=(),
        recomputed=(),
        saved_bytes=saved,
        forward_bytes=saved + draw(sizes),
        backward_bytes=saved + moved + draw(sizes),
        gradient_bytes=draw(sizes),
        compute_ms=1.0,
        recompute_ms=draw(st.sampled_from((0.0, 0.1, 0.7))),
        offloaded_bytes=moved,
        wait_ms=draw(st.sampled_from((0.0, 0.3))),
    )


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), sizes, sizes, sizes)
def test_each_peak_is_that_of_its_own_step(data, count, tied, reduced, whole):
    menus = [tuple(data.draw(st.lists(decisions(), min_size=1, max_size=3))) for _ in range(count)]
    tail = tuple(data.draw(st.lists(decisions(), max_size=2)))
    around = Around(50, tail, 30, 10**6, whole, reduced, tied)
    numbers = list(itertools.product(*(range(len(menu)) for menu in menus)))
    table = np.array(numbers)
    assert peaks_of(menus, table, around).tolist() == [peak_of(menus, each, around) for each in numbers]
    assert host_bytes_of_all(menus, table).tolist() == [host_bytes_of(menus, each) for each in numbers]
    times = [time_of(menus, each) for each in numbers]
    assert times_of(menus, table).tolist() == pytest.approx(
        times, rel=1e-12
    )  # sums of floats in another order
