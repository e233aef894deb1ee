"""Engines of other packages, and what keeps weights where fxopt may not read them: served, or stock with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxopt.capture.engines import say_kept

BOUND = 5e-6
SITES = {"rms_norm": 5, "rope": 4, "attention": 2, "glu": 2, "linear_cross_entropy": 1}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_accelerate_shards_what_it_shards_in_stock(engine, two):
    for answer in two.run("accelerated", engine=engine):
        assert answer["before"] == answer["after"] == answer["stock"]
        assert ("FSDPLlamaDecoderLayer" in answer["stock"]) == (engine == "fsdp2")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.exhaustive)])
def test_transformers_trainer_accumulates(engine, two, tmp_path):
    check_trained(two, tmp_path, engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.exhaustive), "fsdp2"])
def test_four_processes_under_transformers_trainer(engine, four, tmp_path):
    check_trained(four, tmp_path, engine)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_transformers_trainer_accumulates_under_deepspeed(stage, zero_world, tmp_path):
    check_trained(zero_world, tmp_path, f"zero {stage}")


@pytest.mark.slow
def test_four_processes_under_transformers_trainer_and_deepspeed(zero_four, tmp_path):
    check_trained(zero_four, tmp_path, "zero 3")


def check_trained(world, folder, engine):
    """The Trainer's steps are those of stock, on each rank."""
    for answer in world.run("trained", folder=str(folder), library="transformers", engine=engine):
        for order in ("before", "after"):
            assert answer[order]["fallbacks"] == {}
            assert answer[order]["sites"] == SITES
            check_steps(answer[order], answer["stock"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "engine"),
    [pytest.param(False, "fsdp2", marks=pytest.mark.exhaustive), (True, "ddp")],
    ids=["full-fsdp2", "lora-ddp"],
)
def test_trls_trainer_accumulates(lora, engine, two, tmp_path):
    check_trained_by_trl(two, tmp_path, engine, lora)


@pytest.mark.exhaustive
def test_four_processes_under_trls_trainer(four, tmp_path):
    check_trained_by_trl(four, tmp_path, "ddp", lora=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "stage"),
    [pytest.param(False, 3, id="full-3"), pytest.param(True, 2, id="lora-2", marks=pytest.mark.exhaustive)],
)
def test_trls_trainer_accumulates_under_deepspeed(lora, stage, zero_world, tmp_path):
    check_trained_by_trl(zero_world, tmp_path, f"zero {stage}", lora)


def check_trained_by_trl(world, folder, engine, lora):
    """Its head is its own: that stays stock, with the reason."""
    pytest.importorskip("trl")
    sites = {name: count for name, count in SITES.items() if name != "linear_cross_entropy"} | {"rms_norm": 4}
    for answer in world.run("trained", folder=str(folder), library="trl", engine=engine, lora=lora):
        for order in ("before", "after"):
            assert [reason.partition(":")[0] for reason in answer[order]["fallbacks"]] == ["(model)"]
            assert answer[order]["sites"] == ({**sites, "lora_linear": 6} if lora else sites)
            check_steps(answer[order], answer["stock"])


def check_steps(ours, stock):
    """Losses and norms of gradients of three steps of SGD are those of stock, and so is what they changed."""
    assert len(ours["figures"]) == len(stock["figures"]) == 3
    for row, expected in zip(ours["figures"], stock["figures"], strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert ours["error"] <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "order", "lora"),
    [
        (2, "after", True),
        pytest.param(3, "before", False, marks=pytest.mark.exhaustive),
        (3, "after", True),
    ],
)
def test_logits_stay_lazy_under_deepspeed_and_parameters_are_freed(stage, order, lora, zero_world):
    """Of ZeRO-3 those of a block are gathered together, those of the head for as long as the model's forward."""
    for answer in zero_world.run("zero", stage=stage, order=order, lora=lora):
        assert answer["lazy"]
        assert answer["whole"] == [] or stage == 2
        assert all(error <= BOUND for error in answer["errors"].values()), answer["errors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"checkpointed": True},
        {"overrides": {"tie_word_embeddings": True}},
        {"leaves": True},
        {"budget": "min", "lowering": "inductor"},
    ],
    ids=["checkpointed", "tied", "blocks as leaves", "planned"],
)
def test_models_under_zero_3_are_served(options, zero_world):
    for answer in zero_world.run("zero", stage=3, order="before", **options):
        assert answer["fallbacks"] == {}
        assert answer["sites"] == SITES
        assert all(error <= BOUND for error in answer["errors"].values()), answer["errors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hooked", "checkpointed"),
    [
        pytest.param("block", False, marks=pytest.mark.exhaustive),
        ("block", True),
        ("whole block", True),
        ("head", False),
    ],
)
def test_under_zero_3_ranks_gather_in_one_order_where_one_falls_back(hooked, checkpointed, zero_world):
    """DeepSpeed compares the order between ranks, and its collectives hang or raise where it differs.

    All gradients fit in one bucket here, whose order is that of the parameters: several are filled as they come.
    """
    answers = zero_world.run("zero", stage=3, order="before", hooked=hooked, checkpointed=checkpointed)
    assert [bool(answer["fallbacks"]) for answer in answers] == [False, True]
    assert all(error <= BOUND for answer in answers for error in answer["errors"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "again"),
    [
        pytest.param({"budget": "auto"}, 0, id="kept", marks=pytest.mark.exhaustive),
        pytest.param({"budget": "min"}, 0, id="planned"),
        pytest.param({"budget": "auto", "checkpointed": True}, 1, id="checkpointed"),
    ],
)
def test_zero_3_gathers_each_parameter_twice_a_step(options, again, zero_world):
    """Once for forward and once for backward, recomputation or not; stock gathers checkpointed blocks again."""
    for answer in zero_world.run("zero_gathers", **options):
        assert answer["fallbacks"] == {}
        assert answer["gathered"]["before"][1] == 2 * answer["whole"]
        assert (answer["gathered"]["stock"][1] > 2 * answer["whole"]) == bool(again)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [*(pytest.param(stage, marks=pytest.mark.exhaustive) for stage in (1, 2)), 3]
)
def test_other_options_under_zero_are_named_on_all_ranks(stage, zero_world):
    for answer in zero_world.run("zero_differs", stage=stage):
        assert answer["raised"] == "RanksDifferError"
        assert "'glu' on rank 1" in answer["text"]


@pytest.mark.slow
def test_logits_read_under_zero_3_after_their_weight_was_freed_say_so(zero_world):
    for answer in zero_world.run("zero_logits"):
        assert answer["raised"] == "StaleLogitsError"
        assert answer["text"].startswith(
            "logits: read after the head's weight was freed, which an engine gathers"
        )


@pytest.mark.parametrize(("place", "kind"), [("all", "Embedding"), ("head", "Linear")])
def test_a_weight_that_hooks_gather_is_not_read(place, kind, two):
    """By an engine that fxopt does not know: the head would be multiplied with an empty weight."""
    for answer in two.run("gathered_by_hooks", place=place):
        reason = f"a weight of the {kind} is empty outside its own forward"
        assert answer["fallbacks"][f"(model): {reason}"] == 1
        assert answer["errors"]["stock"] <= BOUND
        assert "linear_cross_entropy" not in answer["sites"]


def test_a_weight_that_has_no_items_of_its_own_is_read():
    """As of an image model without register tokens; what an engine takes the items off is a vector."""
    module = nn.Module()
    module.tokens = nn.Parameter(torch.empty(1, 0, 8))
    assert say_kept(module) is None
    module.weight = nn.Parameter(torch.empty(0))
    assert "is empty outside its own forward" in str(say_kept(module))


SPREAD = "a weight of the Linear is spread over ranks, as tensor parallel plans have it"
REFUSED = f"(model): what stands after the blocks was not captured: {SPREAD}"


def test_a_tensor_parallel_block_runs_stock_with_the_reason(two):
    for answer in two.run("tensor_parallel"):
        assert answer["fallbacks"] == {REFUSED: 1, f"model.layers: {SPREAD}": 2}
        assert answer["errors"]["stock"] <= BOUND


@pytest.mark.slow
def test_the_tensor_parallel_plan_of_transformers_trains_as_stock_with_the_reason(two, tmp_path):
    check_tensor_parallel(two, tmp_path)


def test_four_processes_under_the_tensor_parallel_plan_of_transformers(four, tmp_path):
    check_tensor_parallel(four, tmp_path)


def check_tensor_parallel(world, folder):
    """What is spread over ranks runs stock, and trains as one process does."""
    for answer in world.run("planned_by_transformers", folder=str(folder), heads=world.size):
        assert answer["fallbacks"] == {REFUSED: 1, f"model.layers: capture failed: {SPREAD}": 2}
        assert answer["errors"]["stock"] <= BOUND
        assert answer["losses"]["before"] == pytest.approx(answer["losses"]["alone"], rel=1e-6)


@pytest.mark.slow
def test_an_engine_that_the_user_compiles_trains_as_stock(two):
    for answer in two.run("compiled_around"):
        assert answer["errors"]["stock"] <= BOUND


@pytest.mark.parametrize(
    ("original", "wraps_blocks"),
    [
        (False, False),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_the_first_fsdp_trains_as_stock_with_the_reason(original, wraps_blocks, two):
    for answer in two.run("first_fsdp", original=original, wraps_blocks=wraps_blocks):
        assert answer["errors"]["stock"] <= BOUND
        reasons = [reason for reason in answer["fallbacks"] if reason.startswith("(model)")]
        assert len(reasons) == 1
        if original:
            assert "FullyShardedDataParallel, the first FSDP, has it: use fully_shard" in reasons[0]
