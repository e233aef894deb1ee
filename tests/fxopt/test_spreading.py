"""What an engine adds to a step, of an engine as DeepSpeed's ZeRO-1 and ZeRO-2 have it, without DeepSpeed.

`tests/distributed/test_plans.py` compares with what DeepSpeed itself allocates, where it is installed.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.capture.deepspeed_private import STAGES_1_AND_2
from fxopt.remat.step import Beside
from fxopt.spreading import find_sharded

FLOAT = 4
ALL = 10 * 4 + 2 * 20 + 10 * 4
"""Items of `Model`: a table, two blocks of 16 and 4, a head."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 10, bias=False)


@pytest.fixture
def engine_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that has a model trained by such an engine, on the first of two ranks."""
    source = types.ModuleType(STAGES_1_AND_2)
    source.DeepSpeedZeroOptimizer = type("DeepSpeedZeroOptimizer", (), {})
    monkeypatch.setitem(sys.modules, STAGES_1_AND_2, source)

    def make(model: nn.Module, **settings: Any) -> Any:
        self = source.DeepSpeedZeroOptimizer()
        parameters = list(model.parameters())
        offsets = [sum(p.numel() for p in parameters[:number]) for number in range(len(parameters))]
        flat = torch.zeros(sum(p.numel() for p in parameters))
        known: dict[str, Any] = {
            "cpu_offload": False,
            "dtype": torch.float32,
            "gradient_accumulation_dtype": torch.float32,
            "reduce_bucket_size": 1000,
            "ipg_buckets": {torch.float32: None},
            "contiguous_gradients": True,
            "partition_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": True,
            "gradient_accumulation_steps": 1,
            "round_robin_bit16_groups": [parameters],
            "round_robin_bit16_offsets": [offsets],
            "partition_size": [flat.numel() // 2],
            "bit16_groups_flat": [flat],
            "single_partition_of_fp32_groups": [flat[: flat.numel() // 2].clone()],
        }
        vars(self).update(known | settings)
        for parameter in parameters:
            parameter._hp_mapping = None
            parameter.register_post_accumulate_grad_hook(lambda _: self)
        return self

    return make


PATHS = ("blocks.0", "blocks.1")


def test_zero_2_reduces_all_at_once_where_the_bucket_holds_it(engine_of: Any) -> None:
    model = Model()
    engine_of(model)
    sharded = find_sharded(model, PATHS)
    bucket, copy, kept = (items * FLOAT for items in (1000, ALL, 60))
    assert sharded.held_bytes == (ALL + ALL // 2) * FLOAT
    assert sharded.trained_bytes == ALL // 2 * FLOAT
    assert sharded.update_bytes == kept + ALL // 2 * FLOAT, "those kept, and one flat part of them"
    assert sharded.spread.tail == Beside(reduced_bytes=bucket, holds_gradients=True)
    assert sharded.spread.blocks == (Beside(backward=bucket, holds_gradients=True),) * 2
    assert sharded.spread.reduced_bytes == bucket + copy


def test_zero_2_keeps_its_part_from_the_first_full_bucket_on(engine_of: Any) -> None:
    """Of 50 items: the head and a bias are reduced when the second block's weight comes, 36 when the table does."""
    model = Model()
    engine_of(model, reduce_bucket_size=50)
    spread = find_sharded(model, PATHS).spread
    bucket, kept = 50 * FLOAT, 60 * FLOAT
    assert spread.tail == Beside(reduced_bytes=bucket, holds_gradients=True)
    assert spread.blocks[1] == Beside(backward=bucket, reduced_bytes=kept, holds_gradients=True)
    assert spread.blocks[0] == Beside(backward=bucket + kept, holds_gradients=True)
    assert spread.reduced_bytes == bucket + kept + (40 + 36) * FLOAT, (
        "the table's gradient, and a copy for two ranks"
    )


def test_zero_1_reduces_at_the_end(engine_of: Any) -> None:
    """What went to a bucket is no longer beside it."""
    model = Model()
    engine_of(model, partition_gradients=False, reduce_bucket_size=50)
    spread = find_sharded(model, PATHS).spread
    bucket, kept, table = 50 * FLOAT, 60 * FLOAT, 40 * FLOAT
    assert spread.tail == Beside(reduced_bytes=bucket)
    assert spread.blocks == (Beside(backward=bucket),) * 2
    assert spread.reduced_bytes == table + bucket + kept - 40 * FLOAT


def test_a_second_bucket_and_sums_of_micro_batches_are_counted(engine_of: Any) -> None:
    once, twice = Model(), Model()
    engine_of(once)
    engine_of(twice, overlap_comm=True, gradient_accumulation_steps=2)
    ours, more = find_sharded(once, PATHS), find_sharded(twice, PATHS)
    assert more.spread.blocks[0].backward == 2 * ours.spread.blocks[0].backward
    assert more.held_bytes == ours.held_bytes + 60 * FLOAT
    assert more.update_bytes == ours.update_bytes - 60 * FLOAT, "they are there already"


def test_a_name_that_moved_is_told(engine_of: Any) -> None:
    model = Model()
    engine = engine_of(model)
    del engine.overlap_comm
    sharded = find_sharded(model, PATHS)
    assert sharded.uncounted == (
        "plans count parameters as they lie, not what their engine makes of them: DeepSpeed of an unknown version: "
        "DeepSpeedZeroOptimizer has no overlap_comm, expected as in 0.19.8; install deepspeed==0.19.8, or report this "
        "version"
    )
    assert sharded.tensors == frozenset()


def test_an_engine_that_no_hook_leads_to_is_told(engine_of: Any) -> None:
    model = Model()
    for parameter in model.parameters():
        parameter._hp_mapping = None
    assert "no hook on a parameter leads to the engine" in find_sharded(model, PATHS).uncounted
