"""Where an engine adds up gradients as they come, ranks run each region alike, or all are told before any comes."""

from __future__ import annotations

import pytest

BOUND = 5e-6
CURE = "let it run alike on every rank, or call fxopt.restore(model) on all"


@pytest.mark.parametrize("read", ["loss", pytest.param("logits", marks=pytest.mark.slow)])
def test_an_order_that_differs_is_refused_on_all_ranks_before_a_gradient_is_handed_on(read, two):
    for answer in two.run("order_differs", hooked=[1], read=read):
        (text,) = answer["raised"]
        assert text.startswith(
            "gradients: ranks differ in how model.layers.1 runs, expected the same on every rank, since DeepSpeed "
        )
        assert (
            "got captured on rank 0 and stock (a hook sits on the LlamaMLP inside: calls of this block run "
            "stock; at mlp (" in text
        )
        assert ")) on rank 1" in text
        assert CURE in text


def test_a_block_that_runs_stock_on_all_ranks_is_in_one_order(two):
    for answer in two.run("order_differs", hooked=[0, 1]):
        assert answer["raised"] == []
        assert answer["reduced"] == [[2, "cpu"]] * 2, (
            "one small collective on the host for each backward pass"
        )
        (count,) = (
            count
            for told, count in answer["fallbacks"].items()
            if told.startswith(
                "model.layers: a hook sits on the LlamaMLP inside: calls of this block run stock; at mlp ("
            )
        )
        assert count == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "overlap", "hooked"),
    [
        (1, True, "block"),
        (2, False, "block"),
        pytest.param(2, True, "block", marks=pytest.mark.exhaustive),
        pytest.param(3, False, "block", marks=pytest.mark.exhaustive),
        (3, True, "block"),
        pytest.param(2, False, "head", marks=pytest.mark.exhaustive),
        (3, False, "head"),
    ],
)
def test_a_region_that_falls_back_on_one_rank_later_is_refused_on_all(stage, overlap, hooked, zero_world):
    """In the third step; a form of batch that one rank alone met in the second trains as in stock."""
    region = "what stands after the blocks" if hooked == "head" else "model.layers.0"
    for answer in zero_world.run("zero_orders", stage=stage, hooked=hooked, overlap=overlap):
        assert len(answer["errors"]) == 2
        assert max(answer["errors"]) <= BOUND
        assert answer["raised"] == "RanksDifferError"
        assert answer["text"].startswith(f"gradients: ranks differ in how {region} runs")
        assert "got captured on rank 0 and stock (a hook sits on the L" in answer["text"]


@pytest.mark.slow
def test_orders_are_compared_between_machines_that_gather_for_themselves(zero_four):
    """Under hpZ two ranks gather within a machine; gradients are reduced over all four."""
    for answer in zero_four.run("zero_orders", stage=3, hooked="block", machine=2):
        assert max(answer["errors"]) <= BOUND
        assert answer["raised"] == "RanksDifferError"
        assert "got captured on rank 0 and stock (a hook sits on the L" in answer["text"]
        assert "on rank 3" in answer["text"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "hooked"), [(1, "block"), pytest.param(2, "all", marks=pytest.mark.exhaustive), (3, "all")]
)
def test_a_block_that_falls_back_on_all_ranks_or_where_no_order_matters_trains_as_stock(
    stage, hooked, zero_world
):
    for answer in zero_world.run("zero_orders", stage=stage, hooked=hooked):
        assert answer["raised"] == ""
        assert len(answer["errors"]) == 3
        assert max(answer["errors"]) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("hooked", [False, True])
def test_blocks_that_run_with_gradients_in_backward_alone_are_agreed_on_there(hooked, zero_world):
    for answer in zero_world.run("zero_late", hooked=hooked):
        assert answer["raised"] == ("RanksDifferError" if hooked else "")
        assert ("ranks differ in how layers.1 runs" in answer["text"]) == hooked
