"""Decisions for all blocks: never over the budget, more budget never slower, and no choice of two forms is better."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.options import MOST_COPIED
from fxopt.remat.choice import (
    choose_decisions,
    find_candidates,
    find_smallest,
    host_bytes_of,
    peak_of,
    time_of,
)
from fxopt.remat.step import (
    Around,
    copy_shared,
    find_peak,
    landing_bytes,
    peak_bytes,
    shared_bytes_of,
    simulate_step,
)
from fxopt.report.plan import Decision, Residual


def decision(saved: int, recompute_ms: float, extra: int = 0, gradients: int = 0) -> Decision:
    backward = saved + extra
    return Decision((), (), saved, saved + 5, backward, gradients, 100.0, recompute_ms)


def offloading(taken: Decision, size: int, wait_ms: float) -> Decision:
    """Return `taken` with so many of its bytes on the host."""
    left = taken.saved_bytes - size
    return dataclasses.replace(taken, saved_bytes=left, offloaded_bytes=size, wait_ms=wait_ms)


@st.composite
def menus_with_host(draw: st.DrawFn) -> tuple[Decision, ...]:
    menu = draw(menus())
    found = [*menu]
    for base in menu:
        for size in draw(st.sets(st.integers(1, base.saved_bytes), max_size=2)):
            found.append(offloading(base, size, float(draw(st.integers(0, 9)))))
    return tuple(sorted(found, key=lambda d: (d.extra_ms, d.offloaded_bytes)))


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
AROUND = Around(50, (decision(7, 0.0, 4),), 14)


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


@settings(max_examples=200, deadline=None)
@given(menus(), st.integers(0, 300))
def test_never_worse_than_saving_all_or_computing_all_again(menu, limit):
    """What peers can be told to do: where it fits the budget, the plan fits too and takes no longer."""
    offered = (menu,) * len(PATHS)
    candidates = find_candidates(offered)
    save_all, recompute_all = ((number,) * len(PATHS) for number in (0, len(menu) - 1))
    chosen = choose_decisions(candidates, AROUND, limit)
    for numbers in (save_all, recompute_all):
        assert find_smallest(candidates, AROUND) <= peak_of(offered, numbers, AROUND)
        if peak_of(offered, numbers, AROUND) <= limit:
            assert chosen is not None
            assert time_of(offered, chosen) <= time_of(offered, numbers)


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
    instants = simulate_step(("a", "b"), blocks, Around(100, (), 206))
    assert [(instant.name, instant.bytes) for instant in instants] == [
        ("forward of a", 115),
        ("forward of b", 100 + 10 + 25),
        ("backward of b", 100 + 10 + 22),
        ("backward of a", 100 + 3 + 12),
        ("optimizer", 306),
    ]
    assert find_peak(instants).name == "optimizer"


def test_a_tied_weight_has_two_gradients_at_the_end_of_backward():
    blocks = (decision(10, 0.0, 2, 3), decision(20, 0.0, 2, 3))
    instants = simulate_step(("a", "b"), blocks, Around(100, (), 6, tied_bytes=90))
    assert [(instant.name, instant.bytes) for instant in instants[4:]] == [
        ("backward of what stands before the blocks", 100 + 3 + 3 + 90),
        ("optimizer", 106),
    ]


@settings(max_examples=100, deadline=None)
@given(menus(), st.integers(0, 500), st.integers(0, 90), st.integers(0, 90))
def test_the_peak_is_that_of_the_simulated_step(menu, gradients, reduced, tied):
    around = Around(50, (decision(7, 0.0, 4),), gradients, reduced_bytes=reduced, tied_bytes=tied)
    assert peak_bytes(menu, around) == find_peak(simulate_step(("x",) * len(menu), menu, around)).bytes


def test_what_leaves_lives_beside_the_next_block_and_what_comes_back_has_memory_of_its_own():
    away = offloading(decision(10, 0.0, 2, 3), 8, 0.0)
    instants = simulate_step(("a", "b"), (away, decision(20, 0.0, 2, 3)), Around(100, (), 6))
    assert [(instant.name, instant.bytes) for instant in instants] == [
        ("forward of a", 100 + 8 + 15),
        ("forward of b", 100 + 8 + 2 + 8 + 25),
        ("backward of b", 100 + 8 + 2 + 22),
        ("backward of a", 100 + 3 + 12),
        ("optimizer", 100 + 8 + 6),
    ]


@pytest.mark.parametrize(
    ("moved", "kept"), [((8, 8, 8, 0), 16), ((8, 0, 0, 0), 8), ((8, 0, 8, 0), 8), ((4, 8, 6, 0), 6 + 8)]
)
def test_memory_is_kept_for_as_many_blocks_as_hold_values_from_the_host_at_once(moved, kept):
    blocks = [offloading(decision(10, 0.0), each, 0.0) if each else decision(10, 0.0) for each in moved]
    assert landing_bytes(blocks) == kept


@settings(max_examples=100, deadline=None)
@given(menus_with_host(), st.integers(0, 500))
def test_the_peak_with_values_on_the_host_is_that_of_the_simulated_step(menu, gradients):
    around = Around(50, (decision(7, 0.0, 4),), gradients)
    assert peak_bytes(menu, around) == find_peak(simulate_step(("x",) * len(menu), menu, around)).bytes


@settings(max_examples=200, deadline=None)
@given(menus_with_host(), st.integers(0, 300), st.integers(0, 80))
def test_the_host_holds_no_more_than_it_may_and_no_mix_of_two_is_faster(menu, limit, host):
    offered = (menu,) * len(PATHS)
    around = dataclasses.replace(AROUND, host_bytes=host)
    chosen = choose_decisions(find_candidates(offered), around, limit)
    alone = choose_decisions(find_candidates(offered), dataclasses.replace(around, host_bytes=0), limit)
    if chosen is None:
        assert alone is None
        return
    assert host_bytes_of(offered, chosen) <= host
    assert peak_of(offered, chosen, around) <= limit
    assert not menu[chosen[-1]].offloaded_bytes
    if alone is not None:
        assert time_of(offered, chosen) <= time_of(offered, alone)
        assert not host_bytes_of(offered, alone)
    offloads = [bool(menu[number].offloaded_bytes) for number in chosen]
    assert offloads == sorted(offloads, reverse=True)
    for pair in itertools.combinations_with_replacement(range(len(menu)), 2):
        for count in range(len(PATHS)):
            first, last = sorted(pair, key=lambda n: (not menu[n].offloaded_bytes, menu[n].saved_bytes))
            numbers = (first,) * count + (last,) * (len(PATHS) - count)
            if menu[last].offloaded_bytes or host_bytes_of(offered, numbers) > host:
                continue
            if peak_of(offered, numbers, around) <= limit:
                assert time_of(offered, chosen) <= time_of(offered, numbers)


@settings(max_examples=100, deadline=None)
@given(menus_with_host(), st.integers(0, 80))
def test_with_a_host_more_budget_is_never_slower(menu, host):
    offered = (menu,) * len(PATHS)
    around = dataclasses.replace(AROUND, host_bytes=host)
    candidates = find_candidates(offered)
    smallest = find_smallest(candidates, around)
    times = []
    for limit in range(smallest, smallest + 120, 7):
        chosen = choose_decisions(candidates, around, limit)
        assert chosen is not None
        times.append(time_of(offered, chosen))
    assert times == sorted(times, reverse=True)


@st.composite
def menus_in_chunks(draw: st.DrawFn) -> tuple[Decision, ...]:
    """Return a menu in which some decisions can be had in 4 and in 16 chunks: the same saved, less needed, slower."""
    found: list[Decision] = []
    for base in draw(menus()):
        found.append(base)
        for count in (4, 16) if draw(st.booleans()) else ():
            less = dataclasses.replace(
                base,
                chunks=count,
                forward_bytes=base.forward_bytes - min(count, 5),
                backward_bytes=max(base.saved_bytes, base.backward_bytes - 2 * count),
                chunk_ms=float(count),
            )
            found.append(less)
    return tuple(sorted(found, key=lambda d: d.extra_ms))


@settings(max_examples=200, deadline=None)
@given(menus_in_chunks(), st.integers(0, 300))
def test_in_chunks_never_over_the_budget_more_budget_never_slower_and_no_uniform_choice_better(menu, limit):
    offered = (menu,) * len(PATHS)
    candidates = find_candidates(offered)
    chosen = choose_decisions(candidates, AROUND, limit)
    for number in range(len(menu)):
        numbers = (number,) * len(PATHS)
        if peak_of(offered, numbers, AROUND) <= limit:
            assert chosen is not None
            assert time_of(offered, chosen) <= time_of(offered, numbers)
    if chosen is not None:
        assert peak_of(offered, chosen, AROUND) <= limit
    times = [
        time_of(offered, found)
        for more in range(limit, limit + 60, 7)
        if (found := choose_decisions(candidates, AROUND, more)) is not None
    ]
    assert times == sorted(times, reverse=True)


def test_chunks_are_taken_where_one_that_runs_whole_saves_less_in_less_time_but_does_not_fit():
    whole, less = Decision((), (), 2, 7, 12, 3, 100.0, 0.0), Decision((), (), 1, 6, 12, 3, 100.0, 2.0)
    chunked = dataclasses.replace(whole, forward_bytes=2, backward_bytes=2, chunks=16, chunk_ms=16.0)
    offered = ((whole, less, chunked),) * len(PATHS)
    in_chunks = (2,) * len(PATHS)
    limit = peak_of(offered, in_chunks, AROUND)
    assert limit < peak_of(offered, (1,) * len(PATHS), AROUND)
    assert choose_decisions(find_candidates(offered), AROUND, limit) == in_chunks


def test_a_mask_that_two_kinds_of_blocks_read_is_there_once_and_two_of_one_kind_are_two():
    table = Residual("input#1", (4, 2), "float32", 32, 0.0, "", shared=True)
    mask = Residual("input#2", (8,), "bool", 8, 0.0, "", shared=True)
    assert shared_bytes_of([]) == 0
    assert shared_bytes_of([(table, table, mask), (table, dataclasses.replace(mask, op="input#7"))]) == 72
    around = dataclasses.replace(AROUND, whole_bytes=72)
    taken = (decision(16, 0.0, 2, 3),) * len(PATHS)
    before, after = (simulate_step(PATHS, taken, each) for each in (AROUND, around))
    assert [b.bytes - a.bytes for a, b in zip(before, after, strict=True)] == [72] * (len(before) - 1) + [0]
    assert peak_bytes(taken, around) == find_peak(after).bytes


def test_a_replayed_block_keeps_copies_of_what_other_blocks_read_too():
    mask = Residual("input#1", (8,), "bool", 8, 0.0, "", shared=True)
    own = Residual("input#0", (4,), "float32", 16, 0.0, "")
    block = dataclasses.replace(decision(16, 0.0, 2, 3), saved=(own, mask))
    copied = copy_shared(block, 28)
    assert (copied.saved_bytes, copied.forward_bytes, copied.backward_bytes) == (
        block.saved_bytes + 8,
        block.forward_bytes + 8,
        block.backward_bytes + 8,
    )
    assert copy_shared(decision(16, 0.0), 28) == decision(16, 0.0)
    wide = dataclasses.replace(block, saved=(own, dataclasses.replace(mask, bytes=MOST_COPIED // 28)))
    assert copy_shared(wide, 28).saved_bytes == wide.saved_bytes + MOST_COPIED // 28
    assert copy_shared(wide, 29) == wide, "more blocks than may copy it are not replayed"
