"""Launches find what was compiled for arguments like theirs; run where Triton is not interpreted, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent / "launch_without_gpu.py"


def test_variants_are_compiled_once_and_a_rehearsal_only_compiles(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, PROGRAM], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    first, second = [3, 1, 1, 0, 0, 48, 0.5, 16, "a"], [3, 1, 1, 0, 0, 32, 0.5, 16, "a"]
    assert found["once"] == [1, [first, second]]  # all arguments, then constants in the kernel's own order
    assert found["variants"] == 6  # an odd count, a count of 1, a pointer off 16 bytes, a dtype, a constant
    assert found["counted"] == 2  # counts that fit 32 bits, and those that do not
    assert found["while rehearsing"] == [True, 1, 1]  # one missing; the other thread's launch ran
    assert found["finished"] == [True]  # who waits for it finds no thread that compiles
    assert found["after"] == [False, 6]
    assert found["then"] == [0, 7, 2]  # the launch took what had been compiled ahead
