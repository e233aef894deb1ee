"""DistributedDataParallel and FSDP2: optimized before or after, against stock under the same engine and one process."""

from __future__ import annotations

import math
from typing import Any

import pytest

BOUND = 5e-6
"""Of a gradient's relative error in fp32, as a ratio of norms: the largest measured is 9.9e-7 on a CPU, on four bits.

A GPU multiplies fp32 in fp32 here too: torch's default, and what the kernels ask for or leave to torch.
"""
SITES = {"rms_norm": 5, "rope": 4, "attention": 2, "glu": 2, "linear_cross_entropy": 1}
"""Of a llama of two layers: the same as in one process."""
ADAPTED = {**SITES, "lora_linear": 6}
slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive


def check(answers: list[dict[str, Any]], sites: dict[str, int]) -> None:
    """Check that all ranks have stock's gradients, every site, and no fallback."""
    for answer in answers:
        assert answer["fallbacks"] == {}
        assert answer["sites"] == sites
        assert all(error <= BOUND for error in answer["errors"].values()), answer["errors"]


@pytest.mark.parametrize(
    ("engine", "order", "options"),
    [("ddp", "after", {}), ("fsdp2", "before", {"carved": True})],
    ids=["ddp-after", "fsdp2 carved-before"],
)
def test_gradients_equal_stock_and_one_process(engine, options, order, two):
    """Each engine and each order once; `test_combinations.py` has all of them."""
    check(two.run("step", engine=engine, order=order, options=options), SITES)


@slow
def test_a_head_tied_to_the_embedding_is_served(two):
    tied = {"tie_word_embeddings": True}
    check(two.run("step", engine="fsdp2", order="before", options={"carved": True}, overrides=tied), SITES)


@exhaustive  # as "fsdp2, carved, four bits" of `test_combinations.py`
def test_adapters_on_a_base_in_four_bits(two):
    """FSDP2 shards codes that are stored as of a floating dtype; gathered, they are tensors of no class of their own.

    bitsandbytes' blocks are of 64 codes, and its CPU code wants them to end with a row.
    """
    pytest.importorskip("bitsandbytes")
    overrides = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "storage": "float32"}
    answers = two.run("step", engine="fsdp2", order="before", lora=True, overrides=overrides)
    check(answers, {**ADAPTED, "dequantize_4bit": 14})


@exhaustive  # as "fsdp2, offloaded, lora" of `test_combinations.py`
def test_parameters_that_wait_on_the_host(two):
    options = {"carved": True, "offloaded": True}
    check(two.run("step", engine="fsdp2", order="before", options=options), SITES)


@pytest.mark.parametrize(
    ("engine", "arch"),
    [
        pytest.param("fsdp2", "gemma2", marks=slow),
        *(pytest.param("ddp", arch, marks=exhaustive) for arch in ("qwen3", "gemma2", "olmo2")),
        *(pytest.param("fsdp2", arch, marks=exhaustive) for arch in ("qwen3", "olmo2")),
    ],
)
def test_other_architectures(engine, arch, two):
    for answer in two.run("step", engine=engine, order="before", arch=arch):
        assert answer["fallbacks"] == {}
        assert answer["sites"]["linear_cross_entropy"] == 1
        assert not [name for name in answer["sites"] if " " in name]
        assert all(error <= BOUND for error in answer["errors"].values()), answer["errors"]


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "lora"), [("ddp", False), ("fsdp2", True)])
def test_four_processes(engine, lora, four):
    """Fast where there are four GPUs; `test_combinations.py` has all of them, on a CPU too."""
    check(four.run("step", engine=engine, order="before", lora=lora), ADAPTED if lora else SITES)


@pytest.mark.gpu
def test_shards_in_replicas(four):
    """Two replicas of the model, each in two shards: gradients are reduced within one and between both."""
    options = {"carved": True, "hybrid": True}
    check(four.run("step", engine="fsdp2", order="before", options=options), SITES)


@slow
def test_accumulated_gradients_are_reduced_once(two):
    check(two.run("accumulate", engine="ddp", order="before"), SITES)


@slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_rank_with_ignored_labels_alone_adds_nothing(engine, two):
    for rank, answer in enumerate(two.run("ignored", engine=engine, counted=True)):
        assert answer["fallbacks"] == {}
        assert answer["distance"] <= BOUND
        assert (answer["losses"]["before"] == 0.0) == (rank == 1)


@slow
def test_a_mean_over_no_labels_is_what_stock_makes_of_it(two):
    """transformers divides by no labels: the loss is NaN, and its gradients are zeros."""
    for rank, answer in enumerate(two.run("ignored", engine="ddp", counted=False)):
        assert answer["fallbacks"] == {}
        assert {math.isnan(loss) for loss in answer["losses"].values()} == {rank == 1}
        assert answer["nan"] == [0, 0]
        assert answer["distance"] <= BOUND


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        pytest.param("fsdp2", {}, id="fsdp2", marks=exhaustive),
        pytest.param("fsdp2", {"carved": True}, id="fsdp2 carved"),
        pytest.param("ddp", {"find_unused_parameters": True}, id="ddp unused", marks=exhaustive),
        pytest.param("ddp", {"static_graph": True}, id="ddp static", marks=slow),
    ],
)
def test_logits_under_an_engine_are_lazy_and_carry_gradients(engine, options, two):
    """Also where DDP passes outputs through a function of its own, as a static graph needs it in the first step."""
    for answer in two.run("logits", engine=engine, options=options):
        assert answer["lazy"]
        assert answer["same"]
        assert answer["errors"]["stock"] <= BOUND


CARVED = {"carved": True}
FREED = {"carved": True, "reshard_after_forward": True}


@pytest.mark.parametrize(
    ("engine", "options", "place"),
    [
        pytest.param("ddp", {}, "inside", marks=slow),
        ("fsdp2", CARVED, "block"),
        pytest.param("ddp", {"static_graph": True}, "inside", marks=slow),
        pytest.param("ddp", {"static_graph": True}, "off", marks=exhaustive),
        pytest.param("ddp", {"find_unused_parameters": True}, "inside", marks=exhaustive),
        pytest.param("ddp", {"find_unused_parameters": True}, "off", marks=slow),
        pytest.param("fsdp2", {}, "inside", marks=slow),
        *(pytest.param("fsdp2", {}, place, marks=exhaustive) for place in ("block", "off")),
        pytest.param("fsdp2", CARVED, "head", marks=slow),
        *(pytest.param("fsdp2", CARVED, place, marks=exhaustive) for place in ("inside", "off")),
        pytest.param("fsdp2", FREED, "off", marks=slow),
        *(pytest.param("fsdp2", FREED, place, marks=exhaustive) for place in ("block", "head")),
    ],
)
def test_one_rank_that_falls_back_later_neither_hangs_nor_diverges(engine, options, place, two):
    """Collectives stand outside of what is compiled: their order is the engine's, whatever a rank runs between."""
    answers = two.run("one_falls_back", engine=engine, options=options, place=place)
    assert [bool(answer["fallbacks"]) for answer in answers] == [False, True]
    cause = "Dynamo is switched off" if place == "off" else "a hook sits on"
    assert all(cause in reason for reason in answers[1]["fallbacks"])
    assert all(answer["errors"]["stock"] <= BOUND for answer in answers)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        pytest.param("before", "stock", marks=exhaustive),
        pytest.param("stock", "after", marks=exhaustive),
        pytest.param("before", "after", marks=slow),
    ],
)
def test_a_checkpoint_is_loaded_with_and_without_optimize(saved, loaded, two, tmp_path):
    wanted = two.run("save", folder=str(tmp_path), order=saved)[0]["loss"]
    assert two.run("load", folder=str(tmp_path), order=loaded)[0]["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("saved", "loaded"), [("before", "stock"), pytest.param("stock", "after", marks=exhaustive)]
)
def test_a_checkpoint_of_two_processes_is_loaded_by_four(saved, loaded, two, four, tmp_path):
    wanted = two.run("save", folder=str(tmp_path), order=saved)[0]["loss"]
    assert four.run("load", folder=str(tmp_path), order=loaded)[0]["loss"] == pytest.approx(wanted, rel=1e-5)


@slow
@pytest.mark.parametrize(
    ("saved", "loaded"), [pytest.param("before", "stock", marks=exhaustive), ("stock", "after")]
)
def test_a_checkpoint_of_adapters_by_four_processes_is_loaded_by_two(saved, loaded, two, four, tmp_path):
    wanted = four.run("save", folder=str(tmp_path), order=saved, lora=True)[0]["loss"]
    found = two.run("load", folder=str(tmp_path), order=loaded, lora=True)[0]["loss"]
    assert found == pytest.approx(wanted, rel=1e-5)
