"""Menus against brute force: every weighting of bytes and time has its best set in the menu."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.remat.dag import Dag, Value
from fxopt.remat.knapsack import Option, choose, find_front
from fxopt.remat.menu import find_menu, find_steps, make_choice


@st.composite
def dags(draw: st.DrawFn, most: int = 7) -> Dag:
    """Return a graph of at most `most` values: inputs, views, values that draw random numbers, others."""
    values: list[Value] = []
    for place in range(draw(st.integers(2, most))):
        sources = draw(st.sets(st.integers(0, place - 1), max_size=3)) if place else set()
        size = draw(st.integers(0, 9))
        if not sources:
            values.append(Value(f"input#{place}", (), size, None))
            continue
        kind = draw(st.sampled_from(("op", "op", "op", "view", "random")))
        cost = {"op": draw(st.integers(0, 9)), "view": 0, "random": None}[kind]
        values.append(Value(f"op#{place}", tuple(sorted(sources)), None if kind == "view" else size, cost))
    needed = draw(st.sets(st.integers(0, len(values) - 1), min_size=1))
    return Dag(tuple(values), frozenset(needed))


def all_points(dag: Dag) -> Iterator[tuple[int, int]]:
    """Yield the bytes and cost of every set of values that could be saved."""
    savable = [place for place, value in enumerate(dag.values) if value.bytes is not None]
    for count in range(len(savable) + 1):
        for saved in itertools.combinations(savable, count):
            recomputed = dag.find_recomputed(saved)
            if recomputed is not None:
                yield dag.bytes_of(saved), dag.cost_of(recomputed)


@settings(max_examples=300, deadline=None)
@given(dags(), st.integers(1, 12), st.integers(1, 12))
def test_no_set_beats_the_menu_at_any_exchange_rate(dag, byte_weight, cost_weight):
    def weigh(point):
        return point[0] * byte_weight + point[1] * cost_weight

    menu = [(choice.bytes, choice.cost) for choice in find_menu(dag)]
    assert min(map(weigh, menu)) == min(map(weigh, all_points(dag)))


@settings(max_examples=200, deadline=None)
@given(dags())
def test_steps_lie_between_two_choices_and_no_better_than_a_mix_of_both(dag):
    menu = find_menu(dag)
    points, hull = set(all_points(dag)), [(choice.bytes, choice.cost) for choice in menu]
    for step in find_steps(dag, menu):
        assert (step.bytes, step.cost) in points
        left, right = next((a, b) for a, b in itertools.pairwise(hull) if a[0] > step.bytes > b[0])
        slope = (right[1] - left[1]) * (left[0] - step.bytes)
        assert (step.cost - left[1]) * (left[0] - right[0]) >= slope


SIZES = ((4, 9, 1, 5), (2, 1, 8, 3), (7, 3, 3, 3), (1, 6, 6, 0))
COSTS = ((0, 3, 5, 2), (0, 1, 9, 4), (0, 0, 2, 7), (0, 5, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "costs"),
    [
        pytest.param(*case, marks=[] if place < 2 else pytest.mark.exhaustive)
        for place, case in enumerate(zip(SIZES, COSTS, strict=True))
    ],
)
def test_every_graph_of_four_values_has_its_lower_hull(sizes, costs):
    """Of each way to draw four values, and each set that backward reads: no set lies below the menu."""
    number = 0
    sources = [
        [s for n in range(place + 1) for s in itertools.combinations(range(place), n)] for place in range(4)
    ]
    for inputs in itertools.product(*sources):
        values = tuple(
            Value(f"op#{place}", of, sizes[place], costs[place] if of else None)
            for place, of in enumerate(inputs)
        )
        for bits in range(1, 16):
            dag = Dag(values, frozenset(place for place in range(4) if bits >> place & 1))
            menu = [(choice.bytes, choice.cost) for choice in find_menu(dag)]
            assert menu == lower_hull(set(all_points(dag)))
            number += 1
    assert number == 64 * 15


def lower_hull(points: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the corners of the lower hull of cost over bytes, the fastest first: by all pairs, and no cleverer."""

    def is_corner(point: tuple[int, int]) -> bool:
        if any(b <= point[0] and c <= point[1] for b, c in points - {point}):
            return False
        pairs = itertools.product(
            [left for left in points if left[0] < point[0]],
            [right for right in points if right[0] > point[0]],
        )
        return all(
            (point[1] - left[1]) * (right[0] - left[0]) < (right[1] - left[1]) * (point[0] - left[0])
            for left, right in pairs
        )

    return sorted(filter(is_corner, points), reverse=True)


@settings(max_examples=300, deadline=None)
@given(dags())
def test_a_menu_reaches_from_the_fastest_to_the_smallest_and_lies_on_the_hull(dag):
    points = set(all_points(dag))
    menu = find_menu(dag)
    assert (menu[0].bytes, menu[0].cost) == min(points, key=lambda point: (point[1], point[0]))
    assert (menu[-1].bytes, menu[-1].cost) == min(points)
    for left, right in itertools.pairwise(menu):
        assert left.bytes > right.bytes
        assert left.cost < right.cost
        assert {(left.bytes, left.cost), (right.bytes, right.cost)} <= points
    slopes = [(b.cost - a.cost) / (a.bytes - b.bytes) for a, b in itertools.pairwise(menu)]
    assert slopes == sorted(slopes), "each byte less costs more than the one before"


@settings(max_examples=300, deadline=None)
@given(dags())
def test_a_choice_can_be_carried_out(dag):
    for choice in find_menu(dag):
        assert dag.find_recomputed(choice.saved) == choice.recomputed
        assert choice.saved.isdisjoint(choice.recomputed)
        assert dag.needed <= choice.saved | choice.recomputed


MENUS = st.lists(
    st.lists(st.builds(Option, st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def sums(menus):
    for numbers in itertools.product(*(range(len(menu)) for menu in menus)):
        options = [menu[number] for menu, number in zip(menus, numbers, strict=True)]
        yield sum(option.bytes for option in options), sum(option.cost for option in options)


@settings(max_examples=300, deadline=None)
@given(MENUS, st.integers(0, 120))
def test_the_knapsack_is_exact_and_never_over_its_capacity(menus, capacity):
    chosen = choose(menus, capacity)
    fitting = [cost for size, cost in sums(menus) if size <= capacity]
    if chosen is None:
        assert not fitting
        return
    options = [menu[number] for menu, number in zip(menus, chosen, strict=True)]
    assert sum(option.bytes for option in options) <= capacity
    assert sum(option.cost for option in options) == min(fitting)


@settings(max_examples=200, deadline=None)
@given(MENUS)
def test_the_front_holds_all_sums_that_none_beats(menus):
    everything = set(sums(menus))
    best = {
        (size, cost)
        for size, cost in everything
        if not any((s <= size and c < cost) or (s < size and c <= cost) for s, c in everything)
    }
    front: list[tuple[int, int]] = []
    for numbers in find_front(menus):
        options = [menu[number] for menu, number in zip(menus, numbers, strict=True)]
        front.append((sum(option.bytes for option in options), sum(option.cost for option in options)))
    assert front == sorted(best)


def test_what_stands_for_a_saved_value_is_read_from_it():
    x = Value("input#0", (), 4, None)
    norm = Value("norm#0", (0,), 10, 9)
    again = Value("norm_output#0", (0,), 10, 2, stands_for=1)
    late = Value("mm#0", (1,), 30, 50)
    dag = Dag((x, norm, again, late), frozenset({2, 3}))
    saved = make_choice(dag, {0, 2, 3})
    assert saved is not None
    assert saved.saved == {0, 1, 3}, "backward reads the norm that forward computed"
    assert saved.recomputed == frozenset()
    again_choice = make_choice(dag, {0, 3})
    assert again_choice is not None
    assert (again_choice.saved, again_choice.recomputed) == ({0, 3}, {2})
    shared = make_choice(dag, {0, 1})
    assert shared is not None
    assert (shared.saved, shared.recomputed) == ({0, 1}, {3}), "saved once, for both readers"


def test_random_numbers_are_never_drawn_twice():
    x, mask = Value("input#0", (), 4, None), Value("dropout#0", (0,), 1, None)
    y = Value("mul#0", (0, 1), 100, 1)
    menu = find_menu(Dag((x, mask, y), frozenset({2})))
    assert [choice.saved for choice in menu] == [{2}, {0, 1}]


@pytest.mark.parametrize("count", [28])
def test_two_options_for_many_layers_are_few_sums(count):
    assert len(find_front([[Option(100, 0), Option(30, 7)]] * count)) == count + 1
