"""Plans under an engine: what lies on a rank, what is gathered and reduced, and one plan for all ranks."""

from __future__ import annotations

from typing import Any

import pytest

slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
AROUND = 2 * 128 * 32 * 4 + 32 * 4
"""Embedding, head and last norm of the tiny model, in bytes."""
TABLES = 2 * 24 * 8 * 4
"""Cosines and sines of 24 positions, of a head's width each, which all blocks read."""


def instant(plan: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in plan["timeline"] if entry["name"] == name)


@slow
@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}])
def test_a_plan_under_fsdp2_counts_shards_gathered_blocks_and_reductions(options, two):
    """Weights and both of AdamW's moments are halved; embedding, head and norm are gathered for the whole step.

    A block's gradients are reduced from a buffer; blocks that stay gathered are counted with the rest, but for what
    they were received in.
    """
    alone = two.run("plan", engine="none", budget="min")[0]["plan"]
    for answer in two.run("plan", engine="fsdp2", budget="min", options=options):
        made, block = answer["plan"], answer["block"]
        assert answer["weights"] == AROUND + 2 * block
        assert made["static_bytes"] == 3 * answer["weights"] // 2 + answer["buffers"] + answer["workspaces"]
        whole = AROUND + (2 * block if options else 0) + TABLES
        for entry in made["timeline"][:-1]:
            parts = ("saved_bytes", "moving_bytes", "gradient_bytes", "running_bytes")
            assert entry["bytes"] == made["static_bytes"] + whole + sum(entry[part] for part in parts)
        reduction = instant(made, "reduction")
        assert reduction["running_bytes"] == AROUND
        update = instant(made, "optimizer")
        assert update["bytes"] == made["static_bytes"] + answer["weights"] // 2
        for ours, theirs in zip(made["decisions"], alone["decisions"], strict=False):
            if ours["saved"] == theirs["saved"]:
                copies = 0 if options else 2
                assert ours["forward_bytes"] == theirs["forward_bytes"] + max(copies, 1) * block
                assert ours["backward_bytes"] == theirs["backward_bytes"] + (copies + 1) * block
                assert ours["gradient_bytes"] == theirs["gradient_bytes"] // 2


@pytest.mark.parametrize(("view", "buckets"), [(False, 1), pytest.param(True, 0, marks=slow)])
def test_a_plan_under_ddp_counts_the_buckets_that_gradients_are_copied_to(view, buckets, two):
    for answer in two.run("plan", engine="ddp", budget="min", options={"gradient_as_bucket_view": view}):
        expected = (3 + buckets) * answer["weights"] + answer["buffers"] + answer["workspaces"]
        assert answer["plan"]["static_bytes"] == expected


@slow
def test_shards_that_wait_on_the_host_are_not_counted(two):
    for answer in two.run("plan", engine="fsdp2", budget="min", options={"offloaded": True}):
        assert answer["plan"]["static_bytes"] == answer["buffers"] + answer["workspaces"]


@slow
@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=exhaustive)])
def test_ranks_with_other_devices_agree_on_one_plan(engine, two):
    """The last rank's device has half the memory of the others': all plan for a share of that."""
    alone = two.run("plan", engine=engine, budget=0.5)[0]["plan"]["limit_bytes"]
    answers = two.run("plan", engine=engine, budget=0.5, less=0.5)
    assert [answer["plan"]["limit_bytes"] for answer in answers] == [alone // 2] * 2
    assert answers[0]["plan"] == answers[1]["plan"]
    assert answers[0]["residual_bytes"] == answers[1]["residual_bytes"] > 0


@slow
def test_ranks_plan_for_the_most_that_one_of_them_holds(two):
    answers = two.run("plan", engine="fsdp2", budget="min", held=4096)
    assert answers[0]["plan"] == answers[1]["plan"]
    assert answers[0]["buffers"] == answers[1]["buffers"] + 4096


@pytest.mark.parametrize(("engine", "passes"), [pytest.param("ddp", 2, marks=slow), ("fsdp2", 1)])
def test_a_forward_pass_that_gathers_is_not_run_again_where_memory_ran_out(engine, passes, two):
    """The other ranks would not gather with it; a pass without collectives of its own runs once more."""
    for answer in two.run("shortage", engine=engine):
        assert answer["passes"] == passes
        assert ("gathered from all ranks" in answer["notes"]) == (engine == "fsdp2")


@slow
@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=exhaustive), "fsdp2"])
def test_values_that_wait_on_the_host_come_back_under_an_engine(engine, two):
    for answer in two.run("waiting", engine=engine):
        assert answer["fallbacks"] == 0
        assert answer["difference"] == 0.0
        assert answer["host_bytes"] > 0
        assert answer["reserved_bytes"] >= answer["host_bytes"]
        assert answer["used_bytes"] == 0


SLIGHT = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 400_000}
AHEAD = {**SLIGHT, "stage3_max_reuse_distance": 1_500_000, "stage3_prefetch_bucket_size": 200_000}
PERSISTENT = {
    "stage3_param_persistence_threshold": 100_000,
    "stage3_prefetch_bucket_size": 200_000,
    "reduce_bucket_size": 1_000_000,
}


@slow
@pytest.mark.parametrize(
    ("settings", "half"),
    [
        pytest.param(SLIGHT, False, id="slight-float32"),
        pytest.param(SLIGHT, True, id="slight-bfloat16", marks=exhaustive),
        pytest.param(PERSISTENT, False, id="persistent-float32", marks=exhaustive),
        pytest.param(PERSISTENT, True, id="persistent-bfloat16"),
    ],
)
def test_a_plan_under_zero_3_counts_all_that_lives_between_steps(settings, half, zero_world, new_world):
    """Parts of weights, of their fp32 copies, gradients and moments, what stays gathered, and the bucket.

    On a GPU a plan counts all that the process has there: what is left of other tests too, so it has its own processes.
    """
    world = new_world(zero_world.size) if zero_world.on_gpu else zero_world
    for answer in world.run("zero_memory", budget="min", settings=settings, half=half, measured=False):
        in_tensors = answer["static_bytes"] - answer["workspaces"]  # cuBLAS's are in none
        assert in_tensors == pytest.approx(answer["living_bytes"], rel=0.01)


@slow
@pytest.mark.parametrize(
    ("budget", "settings"),
    [
        pytest.param("min", SLIGHT, id="slight"),
        pytest.param("min", AHEAD, id="ahead", marks=exhaustive),
        pytest.param(None, PERSISTENT, id="persistent"),
    ],
)
def test_a_plan_under_zero_3_has_the_peak_that_a_step_allocates(budget, settings, zero_world):
    """Beside what lives between steps; without what is gathered and reduced it would be a quarter less, or half."""
    if zero_world.on_gpu:
        pytest.skip("the profiler adds up what a CPU allocates")
    for answer in zero_world.run("zero_memory", budget=budget, settings=settings):
        predicted = answer["peak_bytes"] - answer["static_bytes"]
        assert predicted == pytest.approx(max(answer["peaks"]), rel=0.05)


SMALL = {"reduce_bucket_size": 400_000}
WHOLE = {"reduce_bucket_size": 5_000_000}
"""Buckets smaller than a block's gradients, and as large as all of them."""


@slow
@pytest.mark.parametrize(
    ("stage", "settings", "more"),
    [
        pytest.param(1, SMALL, {}, id="1 small"),
        pytest.param(1, WHOLE, {}, id="1 whole", marks=exhaustive),
        pytest.param(1, SMALL, {"micro_batches": 2}, id="1 micro-batches", marks=exhaustive),
        pytest.param(2, SMALL, {}, id="2 small", marks=exhaustive),
        pytest.param(2, WHOLE, {"half": True}, id="2 whole, bfloat16"),
        pytest.param(2, SMALL, {"micro_batches": 2}, id="2 micro-batches"),
        pytest.param(2, {**SMALL, "overlap_comm": True}, {}, id="2 two buckets"),
    ],
)
def test_a_plan_under_zero_1_and_2_has_the_peaks_that_a_step_allocates(stage, settings, more, zero_world):
    """Of backward and of the optimizer's step, on the rank that needs most: few tokens, so that gradients weigh most.

    What lives between steps are weights, this rank's part of them in fp32 and of both moments, and nothing else.
    """
    if zero_world.on_gpu:
        pytest.skip("the profiler adds up what a CPU allocates")
    case: dict[str, Any] = {"budget": None, "length": 32, "stage": stage, "settings": settings}
    answers = zero_world.run("zero_memory", **case, **more)
    living = answers[0]["living_bytes"]
    update = answers[0]["timeline"].pop("optimizer")
    backward = max(answers[0]["timeline"].values())
    assert backward - living == pytest.approx(max(max(each["peaks"]) for each in answers), rel=0.05)
    assert update - living == pytest.approx(max(max(each["updates"]) for each in answers), rel=0.05)
    for answer in answers:
        assert answer["static_bytes"] == answers[0]["static_bytes"]
        assert answer["living_bytes"] == pytest.approx(living, rel=0.001)
        if "micro_batches" not in more:  # what they add up to is counted all the time
            assert answer["static_bytes"] == pytest.approx(living, rel=0.001)
