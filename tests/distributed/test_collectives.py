"""Collectives of a step, counted: fxopt adds none, and recomputation gathers no block a third time.

FSDP2 with two blocks and the rest in the root's group: a block is gathered for its forward and for its backward, the
root's group once, as it stays until backward. Each of the three groups' gradients are reduced once. Carved as
accelerate does, embedding (freed after its forward) and tail (kept) are groups of their own, and the root has none.
"""

from __future__ import annotations

import pytest

WHOLE = {"gather": 2 * 2 + 1, "reduce": 3}
CARVED = {"gather": 2 * 3 + 1, "reduce": 4}


@pytest.mark.parametrize(
    ("options", "expected"),
    [pytest.param({}, WHOLE, marks=pytest.mark.exhaustive), ({"carved": True}, CARVED)],
    ids=["whole", "carved"],
)
def test_fsdp2_gathers_and_reduces_as_in_stock(options, expected, two):
    for answer in two.run("collectives", engine="fsdp2", options=options):
        assert answer["counts"] == {"before": expected, "stock": expected}
        assert answer["plans"] == 0
        assert answer["fallbacks"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["auto", "min"], ids=["checkpointed", "planned"])
def test_recomputation_gathers_nothing_again(budget, two):
    for answer in two.run("collectives", engine="fsdp2", checkpointed=budget == "auto", budget=budget):
        assert answer["plans"] == 1
        assert answer["counts"] == {"before": WHOLE, "stock": WHOLE}


@pytest.mark.slow
def test_collectives_are_in_one_order_on_all_ranks_where_values_leave_for_the_host(two):
    """Six blocks with adapters, the rest frozen: the root's group has no gradients to reduce."""
    answers = two.run("collectives", engine="fsdp2", budget="min", host="64MiB")
    for answer in answers:
        assert answer["plans"] == 1
        assert answer["host_bytes"] > 0
        assert answer["fallbacks"] == {}
        assert answer["counts"]["before"] == {"gather": 2 * 6 + 1, "reduce": 6}
        assert answer["order"]["before"] == answer["order"]["stock"] == answers[0]["order"]["before"]


@pytest.mark.parametrize("budget", [pytest.param("auto", marks=pytest.mark.exhaustive), "min"])
@pytest.mark.slow
def test_collectives_are_in_one_order_where_one_rank_falls_back(budget, two):
    """Beside ranks that recompute by a plan, one has a block that runs stock, and keeps all."""
    answers = two.run("collectives", engine="fsdp2", budget=budget, hooked=True)
    assert [bool(answer["fallbacks"]) for answer in answers] == [False, True]
    for answer in answers:
        assert answer["plans"] == (budget == "min")
        assert answer["order"]["before"] == answer["order"]["stock"] == answers[0]["order"]["before"]


@pytest.mark.parametrize("unused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ddp_reduces_as_many_buckets_as_in_stock(unused, two):
    for answer in two.run("collectives", engine="ddp", options={"find_unused_parameters": unused}):
        assert answer["counts"]["before"] == answer["counts"]["stock"] == {"bucket": 1}
        assert not answer["computed"]["before"], (
            "to find unused parameters it goes through the loss's gradient function"
        )
