"""The examples as a user runs them, on a tiny model: they train, write what they say, and go on when run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")

RESULTS = {
    "sft_qlora": "adapter/adapter_model.safetensors",
    "sft_lora": "merged/model.safetensors",
    "full_finetune": "trained/model.safetensors",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["full_finetune", pytest.param("sft_lora", marks=pytest.mark.exhaustive), "sft_qlora"]
)
def test_an_example_trains_and_goes_on_when_it_is_run_again(name: str, examples: Any, tmp_path: Path) -> None:
    example = examples(name)
    options = ["--tiny", "--output", str(tmp_path)]
    example.main([*options, "--steps", "3"])
    assert (tmp_path / RESULTS[name]).exists()
    example.main([*options, "--steps", "4"])
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    steps = [row["step"] for row in state["log_history"] if "loss" in row]
    assert steps == [1, 2, 3, 4]  # the first three are those that the checkpoint came with


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_optimize_is_one_line_of_an_example(name: str, examples: Any) -> None:
    text = Path(examples(name).__file__).read_text()
    assert text.count("model = fxopt.optimize(model)") == 1
    assert text.count("fxopt.optimize") == 1
