"""What `fxopt/capture/deepspeed_private.py` takes for granted of DeepSpeed: it fails where a version moved it."""

from __future__ import annotations

import pytest

STAGES = pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.exhaustive), 3])


@pytest.mark.slow
@STAGES
def test_the_private_parts_of_deepspeed_are_where_fxopt_looks(stage, zero_world):
    for answer in zero_world.run("deepspeed_privates", stage=stage):
        moved = [name for name, is_so in answer.items() if not is_so]
        assert moved == [], f"DeepSpeed moved what deepspeed_privates() reads as {moved}"


@pytest.mark.slow
@STAGES
def test_a_name_that_moved_is_in_the_report_and_the_model_trains(stage, zero_world):
    for answer in zero_world.run("deepspeed_moved", stage=stage):
        assert answer["fallbacks"] == {}
        assert answer["plans"] == 1
        (note,) = [note for note in answer["notes"] if "DeepSpeed" in note]
        assert note.startswith(
            "plans count parameters as they lie, not what their engine makes of them: DeepSpeed "
        )
        assert "has no bucket_moved, expected as in" in note
