"""Run the test suite under several versions of torch and transformers, each in a venv of its own.

    python tests/matrix.py [--folder DIR] [--only TORCH] [PYTEST_ARGUMENTS ...]

Each row makes DIR/torch-X-transformers-Y once, installs this checkout into it, and runs the suite there; a table of
what came out follows. The exit status is 1 where a row failed. Logs lie beside the venvs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITE = ("-n", "auto", "--dist", "loadgroup", "-m", "not slow and not gpu")
SUMMARY = re.compile(r"\d+ (?:passed|failed|errors?|skipped)\b")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Versions that have to work together, as pip takes them; "" is the newest that the package allows."""

    torch: str
    transformers: str
    numpy: str = ""

    @property
    def name(self) -> str:
        """Return what the venv and the row of the table are called."""
        return f"torch-{self.torch}-transformers-{self.transformers or 'newest'}"

    def requirements(self) -> list[str]:
        """Return what pip is asked for besides this checkout."""
        versions = {"torch": self.torch, "transformers": self.transformers, "numpy": self.numpy}
        return [f"{package}=={version}" if version else package for package, version in versions.items()]


PAIRS = (
    Pair("2.11.*", "5.17.*", numpy="2.3.*"),
    Pair("2.11.*", "", numpy="2.3.*"),
    Pair("2.13.*", "5.17.*"),
    Pair("2.13.*", ""),
    Pair("2.14.*", ""),
)
"""The oldest and the newest of both, and the version that `make setup` pins.

The interpreter of torch 2.11's Triton, 3.6, runs kernels on a CPU with a NumPy before 2.4 only.
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one row: what was counted, or why there was nothing to count."""

    pair: Pair
    passed: bool
    text: str
    minutes: float


def run_pair(pair: Pair, folder: Path, pytest_arguments: list[str], say: Callable[[str], None]) -> Outcome:
    """Make the venv of `pair` where it is missing, run the suite in it, and return what came out."""
    start = time.monotonic()
    place = folder / pair.name.replace("*", "x")
    log = folder / f"{place.name}.log"
    python = place / "bin" / "python"
    steps: list[tuple[str, list[str]]] = []
    if not python.exists():
        steps.append(("making the venv", [sys.executable, "-m", "venv", str(place)]))
    install = [str(python), "-m", "pip", "install", "-q", *pair.requirements(), "-e", f"{ROOT}[dev]"]
    steps.append(("installing", install))
    # Its own command and not `python -m`, which would make this folder's kernels/ importable as `kernels`.
    steps.append(("testing", [str(place / "bin" / "pytest"), *SUITE, *pytest_arguments]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    output = ""
    with log.open("w") as file:
        for what, command in steps:
            say(f"{pair.name}: {what} (log: {log})")
            file.flush()
            before = file.tell()
            status = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
            output = log.read_text(errors="replace")[before:]
            if status:
                break
        else:
            what = ""
    minutes = (time.monotonic() - start) / 60
    counted = ", ".join(SUMMARY.findall(output.strip().rpartition("\n")[2]))
    text = counted or (f"failed while {what}" if what else "no summary of pytest in the log")
    return Outcome(pair, not what and bool(counted), text, minutes)


def render_table(outcomes: list[Outcome]) -> str:
    """Return one line per outcome."""
    width = max(len(outcome.pair.name) for outcome in outcomes)
    lines = [
        f"{'ok' if each.passed else 'FAILED':7}{each.pair.name:{width}}  {each.minutes:5.1f} min  {each.text}"
        for each in outcomes
    ]
    return "\n".join(lines)


def main() -> int:
    """Run all rows, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "matrix", help="where venvs and logs lie"
    )
    parser.add_argument("--only", default="", help="run the rows of this torch alone, e.g. 2.14")
    options, pytest_arguments = parser.parse_known_args()
    pairs = [pair for pair in PAIRS if pair.torch.startswith(options.only)]
    if not pairs:
        known = ", ".join(sorted({pair.torch for pair in PAIRS}))
        parser.error(f"--only: no row has torch {options.only}, expected the beginning of one of {known}")
    options.folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for place, pair in enumerate(pairs, 1):

        def say(text: str, place: int = place) -> None:
            print(f"[{place}/{len(pairs)}] {text}", flush=True)

        outcomes.append(run_pair(pair, options.folder.resolve(), pytest_arguments, say))
        say(render_table(outcomes[-1:]))
    print(render_table(outcomes))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
