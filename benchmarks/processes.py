"""One process per stack: what the scripts that train are given, and how they run each stack of a list."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import stacks

RESULT = "RES"
"""How the line begins by which a process of one stack hands over what it measured."""
SHARED = ("steps", "seed", "lora", "checkpointed")


def make_parser(description: str | None, *, compared: str, steps: int) -> argparse.ArgumentParser:
    """Return a parser of what all these scripts take; `compared` are the stacks that run by default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder with weights; random ones are made if not given")
    parser.add_argument("--size", default="0.5b", help="of the weights that are made: tiny, 0.5b, 1.5b, 7b")
    parser.add_argument("--stack", choices=stacks.STACKS, help="run this one here")
    parser.add_argument("--stacks", default=compared)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", action="store_true", help="a bf16 base in place of four bits")
    parser.add_argument("--checkpointed", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--opts", type=json.loads, default={}, help="of fxopt.optimize, as JSON")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser


def run_stacks(
    module: str,
    given: argparse.Namespace,
    own: Sequence[str],
    length: int,
    measure: Callable[[stacks.Setup], dict[str, Any]],
) -> list[dict[str, Any]] | None:
    """Run `measure` here for `--stack`, and return None, else `module` for each of `--stacks`, and return what came.

    `own` names the arguments of `module` that are its own; each process is given the same.
    """
    folder = stacks.find_folder(given.model, given.size)
    if given.stack is not None:
        setup = stacks.Setup(
            folder, given.stack, not given.lora, given.checkpointed, length, given.seed, given.opts
        )
        print(RESULT + json.dumps(measure(setup)), flush=True)
        return None
    arguments = ["--model", folder, "--opts", json.dumps(given.opts)]
    for name in (*SHARED, *own):
        value = getattr(given, name)
        arguments += [f"--{name}"] * value if isinstance(value, bool) else [f"--{name}", str(value)]
    results = run_each(module, given.stacks.split(","), arguments)
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def run_each(module: str, names: list[str], arguments: list[str]) -> list[dict[str, Any]]:
    """Run `python -m module --stack NAME ...` for each of `names`, in a process each, and return what they hand over.

    One that fails is a result too: its `error` is the end of what it printed.
    """
    results: list[dict[str, Any]] = []
    for stack in names:
        command = [sys.executable, "-m", module, "--stack", stack, *arguments]
        done = subprocess.run(command, cwd=stacks.ROOT, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
        if done.returncode == 0 and lines:
            results.append(json.loads(lines[-1].removeprefix(RESULT)))
        else:
            results.append({"stack": stack, "error": (done.stdout + done.stderr)[-2000:]})
        print(json.dumps(results[-1]), flush=True)
    return results
