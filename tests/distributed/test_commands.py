"""The commands and the table of docs/distributed.md."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "distributed.md").read_text()
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone"],
    "accelerate launch": ["accelerate.commands.launch"],
}
COMMANDS = re.findall(rf"`((?:{'|'.join(LAUNCHERS)}) .+?)`", PAGE)


def mark_command(command: str) -> Any:
    """Return the mark of a command: torchrun's are exhaustive, since accelerate's starts the `Trainer` too."""
    if "deepspeed" in command:
        return pytest.mark.deepspeed
    return pytest.mark.exhaustive if command.startswith("torchrun") else ()


@pytest.fixture
def projection(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return benchmarks/projection.py, which is no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.projection")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [pytest.param(each, marks=mark_command(each)) for each in COMMANDS],
)
def test_a_command_of_the_page_runs_and_falls_back_nowhere(command):
    if "deepspeed" in command:
        pytest.importorskip("deepspeed", reason="DeepSpeed is at hand for `make test-deepspeed` alone")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    launcher = next(name for name in LAUNCHERS if command.startswith(name))
    run = [sys.executable, "-m", *LAUNCHERS[launcher], *command.removeprefix(launcher).split()]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "14 of 14 sites rewritten, 0 fallbacks" in done.stdout


def test_the_projection_of_the_page_is_what_the_script_computes(projection):
    assert projection.render_table() in PAGE
    assert all(f"- {line}\n" in PAGE for line in projection.ASSUMPTIONS)


def test_the_projected_shapes_have_the_parameters_of_their_models(projection):
    sizes = {shape.name: shape.parameters for shape in (projection.MEASURED, *projection.SHAPES)}
    assert sizes == {"Llama-3.2-1B": 1_235_814_400, "Llama-3.1-8B": 8_030_261_248, "70B": 70_553_706_496}


def test_one_gpu_of_the_measured_shape_is_projected_as_measured(projection):
    row = projection.project(projection.MEASURED, "fxopt", 1)
    assert row.step_ms == pytest.approx(projection.read_measured("fxopt")[0] * 1e3)
    assert (row.exposed_ms, row.recomputed) == (0.0, False)


def test_a_projection_writes_table_and_plot(projection, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["projection", str(tmp_path)])
    projection.main()
    assert {path.name for path in tmp_path.iterdir()} == {"projection.md", "projection.csv", "projection.png"}
    assert len((tmp_path / "projection.csv").read_text().splitlines()) == 1 + 2 * 2 * 11
