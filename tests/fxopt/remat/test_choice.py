"""Decisions for all blocks: never over the budget, more budget never slower, and no choice of two forms is better."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.remat.choice import choose_decisions, find_candidates, find_smallest, peak_of, time_of
from fxopt.remat.records import Decision
from fxopt.remat.step import Around, find_peak, peak_bytes, simulate_step


def decision(saved: int, recompute_ms: float, extra: int = 0, gradients: int = 0) -> Decision:
    backward = saved + extra
    return Decision((), (), saved, saved + 5, backward, gradients, 100.0, recompute_ms)


@st.composite
def menus(draw: st.DrawFn) -> tuple[Decision, ...]:
    count = draw(st.integers(1, 3))
    sizes = sorted(draw(st.sets(st.integers(1, 40), min_size=count, max_size=count)), reverse=True)
    times = sorted(draw(st.sets(st.integers(1, 40), min_size=count, max_size=count)))
    extras = draw(st.lists(st.integers(0, 60), min_size=count, max_size=count))
    return tuple(
        decision(size, 0.0 if place == 0 else float(time), extra, 3)
        for place, (size, time, extra) in enumerate(zip(sizes, times, extras, strict=True))
    )


PATHS = ("layers.0", "layers.1", "layers.2", "layers.3")
AROUND = Around(50, (decision(7, 0.0, 4),), 12, 2)


@settings(max_examples=200, deadline=None)
@given(menus(), st.integers(0, 300))
def test_never_over_the_budget_and_no_mix_of_two_is_faster(menu, limit):
    offered = (menu,) * len(PATHS)
    chosen = choose_decisions(find_candidates(offered), AROUND, limit)
    fitting = [
        numbers
        for numbers in itertools.product(range(len(menu)), repeat=len(PATHS))
        if list(numbers) == sorted(numbers, reverse=True)
        and len(set(numbers)) <= 2
        and peak_of(offered, numbers, AROUND) <= limit
    ]
    if chosen is None:
        assert not fitting
        return
    assert peak_of(offered, chosen, AROUND) <= limit
    assert time_of(offered, chosen) <= min(time_of(offered, numbers) for numbers in fitting)


@settings(max_examples=100, deadline=None)
@given(menus(), menus())
def test_more_budget_is_never_slower(first, rest):
    offered = (first, rest, rest, rest)
    smallest = find_smallest(find_candidates(offered), AROUND)
    assert choose_decisions(find_candidates(offered), AROUND, smallest - 1) is None
    times = []
    for limit in range(smallest, smallest + 120, 7):
        chosen = choose_decisions(find_candidates(offered), AROUND, limit)
        assert chosen is not None
        assert peak_of(offered, chosen, AROUND) <= limit
        times.append(time_of(offered, chosen))
    assert times == sorted(times, reverse=True)


def test_without_a_limit_nothing_is_computed_again():
    menu = (decision(40, 0.0), decision(10, 3.0))
    assert choose_decisions(find_candidates((menu,) * 4), AROUND, None) == (0, 0, 0, 0)


def test_the_last_block_is_spared_where_its_own_recomputation_would_live_at_that_instant():
    menu = (decision(40, 0.0), decision(10, 30.0, extra=40))
    around = Around(0)
    smallest = find_smallest(find_candidates((menu,) * 4), around)
    assert choose_decisions(find_candidates((menu,) * 4), around, smallest) == (1, 1, 1, 0)


def test_a_step_is_simulated_instant_by_instant():
    blocks = (decision(10, 0.0, 2, 3), decision(20, 0.0, 2, 3))
    instants = simulate_step(("a", "b"), blocks, Around(100, (), 6, 200))
    assert [(instant.name, instant.bytes) for instant in instants] == [
        ("forward of a", 115),
        ("forward of b", 100 + 10 + 25),
        ("backward of b", 100 + 10 + 22),
        ("backward of a", 100 + 3 + 12),
        ("optimizer", 306),
    ]
    assert find_peak(instants).name == "optimizer"


@settings(max_examples=100, deadline=None)
@given(menus(), st.integers(0, 500))
def test_the_peak_is_that_of_the_simulated_step(menu, update):
    around = Around(50, (decision(7, 0.0, 4),), 12, update)
    assert peak_bytes(menu, around) == find_peak(simulate_step(("x",) * len(menu), menu, around)).bytes
