"""DeepSpeed's own checkpoints, with `optimize` on either side."""

from __future__ import annotations

import pytest

SAVED_AND_LOADED = pytest.mark.parametrize(
    ("saved", "loaded", "stage"),
    [
        ("before", "stock", 1),
        pytest.param("stock", "after", 2, marks=pytest.mark.exhaustive),
        pytest.param("before", "stock", 3, marks=pytest.mark.exhaustive),
        ("stock", "after", 3),
    ],
)


@pytest.mark.slow
@SAVED_AND_LOADED
def test_what_an_engine_saves_is_loaded_with_and_without_optimize(saved, loaded, stage, zero_world, tmp_path):
    wanted = zero_world.run("zero_save", folder=str(tmp_path), stage=stage, order=saved)
    for ours, theirs in zip(
        zero_world.run("zero_load", folder=str(tmp_path), stage=stage, order=loaded), wanted, strict=True
    ):
        assert ours["fallbacks"] == 0
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.slow
@SAVED_AND_LOADED
def test_four_processes_load_what_two_saved_in_deepspeeds_universal_form(
    saved, loaded, stage, zero_world, zero_four, tmp_path
):
    """Its own script makes it; what an engine saves is for as many processes as saved it, and says so."""
    case = {"folder": str(tmp_path), "stage": stage}
    wanted = zero_world.run("zero_save", **case, order=saved, universal=True)[0]["loss"]
    for answer in zero_four.run("zero_load", **case, order=loaded, universal=True):
        assert answer["fallbacks"] == 0
        assert answer["loss"] == pytest.approx(wanted, rel=1e-5)
    refused = zero_four.run("zero_load", **case, order=loaded)
    assert all("raised" in answer for answer in refused)
    assert "used a DP world size of 2 but the current world size is 4" in refused[0]["text"]
