"""All cases, each in a process of its own with a time and a memory limit; rows are kept as they come."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import multiprocessing
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from fxopt.coverage.inputs import Case, all_cases, find_cases
from fxopt.coverage.record import Row, versions
from fxopt.coverage.render import find_main, render_json, render_page, summary_line
from fxopt.demo.models import check_model_type
from fxopt.errors import FxoptError

SECONDS = 180
"""Of processor time for one case: the slowest take half of it."""
PATIENCE = 5
"""How many times as long it may take by the clock: other work may hold the processors."""
BYTES = 6 * 2**30
"""Of memory a case may allocate."""
PRELOADED = ["torch", "transformers", "fxopt.pipeline", "torch._dynamo", "fxopt.coverage.row"]


Result = TypeVar("Result")
Work = Callable[[Case, Callable[[str], None]], Result]
"""What is done with a case in its process: it tells its stages on the way, and returns anything but text."""


@dataclasses.dataclass
class Child(Generic[Result]):
    """A running case: its process, the pipe it reports on, what it was doing last."""

    case: Case
    process: Any
    pipe: Connection
    started: float
    stage: str = "starting"
    row: Result | Row | None = None


def cover(
    names: Sequence[str] | None, *, jobs: int, out: Path, resume: bool, seconds: float = SECONDS
) -> tuple[list[str], str]:
    """Measure the cases of `names`, or all, write `out` and its page, and return what is not captured and the sum.

    Beside a `coverage.json` a `coverage-<version>.json` is of other versions: the page of the first sums it up too.

    Raises:
        UnknownNameError: no such type; the text lists the nearest.
        FxoptError: the files cannot be written.
    """
    for name in names or ():
        check_model_type("--arch", name.partition(":")[0])
    lines = out.with_suffix(".jsonl")
    cases = find_cases(tuple(names)) if names else all_cases()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = run_cases(cases, lines, jobs=jobs, resume=resume, seconds=seconds)
        out.write_text(render_json(rows))
        for document in (out, *find_main(out)):
            document.with_suffix(".md").write_text(render_page(document))
    except OSError as error:
        raise FxoptError(f"--out {out}: cannot be written: {error.strerror}\ngive another file") from error
    problems = [
        f"{row.case}: {row.status}: {row.reason}"
        for row in rows
        if row.status not in ("captured", "not built")
    ]
    return problems, summary_line(rows)


def run_cases(
    cases: Sequence[Case],
    lines: Path,
    *,
    jobs: int,
    resume: bool,
    seconds: float = SECONDS,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Return one row per case in their order, those of `lines` among them with `resume`; others go there as they come.

    `lines` holds the versions and then one row per line, so a run that was stopped goes on where it was.
    """
    done = read_lines(lines) if resume else {}
    kept = [versions(), *(dataclasses.asdict(row) for row in done.values())]
    lines.write_text("".join(json.dumps(value) + "\n" for value in kept))  # without a half line at the end
    left = [case for case in cases if str(case) not in done]
    tqdm.set_lock(
        threading.RLock()
    )  # its own is a semaphore of the system, told as leaked where the run is stopped
    bar = tqdm(total=len(cases), initial=len(cases) - len(left), unit="model", file=sys.stderr, smoothing=0.1)
    with bar, lines.open("a") as file, contextlib.closing(work_on(left, measure_case, jobs, seconds)) as rows:
        for row in rows:
            done[row.case] = row
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")
            file.flush()
            bar.set_postfix_str(f"{row.case}: {row.status}")
            bar.update()
            on_row(row)
    return [done[str(case)] for case in cases]


def read_lines(lines: Path) -> dict[str, Row]:
    """Return the rows that `lines` holds by case, none where it is missing or of other versions."""
    if not lines.exists():
        return {}
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines.read_text().splitlines()):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:  # the line being written when the run was stopped
            continue
        if number == 0:
            if value != versions():
                return {}
            continue
        rows[value["case"]] = Row(**value)
    return rows


def measure_case(case: Case, on_stage: Callable[[str], None]) -> Row:
    """Return the row of `case`."""
    from fxopt.coverage.row import measure

    return measure(case, on_stage=on_stage)


def work_on(
    cases: Sequence[Case], work: Work[Result], jobs: int, seconds: float = SECONDS
) -> Generator[Result | Row, None, None]:
    """Yield what `work` returns of each case as it ends, `jobs` processes at a time; a `Row` of one that was ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # imported once, not once per case
    queue = list(reversed(cases))
    running: list[Child[Result]] = []
    try:
        while queue or running:
            while queue and len(running) < jobs:
                running.append(start_child(context, queue.pop(), work, seconds))
            wait([child.pipe for child in running], timeout=1.0)
            for child in list(running):
                row = poll(child, seconds)
                if row is not None:
                    running.remove(child)
                    yield row
    finally:
        for child in running:
            stop(child)


def start_child(context: Any, case: Case, work: Work[Result], seconds: float) -> Child[Result]:
    """Start the process of one case."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_child, args=(case, work, theirs, seconds, BYTES), daemon=True)
    process.start()
    theirs.close()
    return Child(case, process, ours, time.monotonic())


def run_child(case: Case, work: Work[Any], pipe: Connection, seconds: float, most_bytes: int) -> None:
    """Do `work` on `case` in this process and send its stages and what it returns through `pipe`."""
    resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))
    import torch
    import transformers

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # torch logs each graph that it cannot trace; the row says why
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    pipe.send(work(case, pipe.send))


def poll(child: Child[Result], seconds: float) -> Result | Row | None:
    """Return what came of `child` if it has ended, or was ended here, else None."""
    with contextlib.suppress(EOFError, OSError):
        while child.row is None and child.pipe.poll():
            message = child.pipe.recv()
            if isinstance(message, str):
                child.stage = message
            else:
                child.row = message
    elapsed = time.monotonic() - child.started
    if child.row is None and elapsed < seconds * PATIENCE and child.process.is_alive():
        return None
    if child.row is None:
        child.row = ended_row(child, elapsed, seconds)
    stop(child)
    return child.row


def ended_row(child: Child[Any], elapsed: float, seconds: float) -> Row:
    """Return the row of a case that gave none: it took too long, or its process died."""
    case = child.case
    row = Row(str(case), case.model_type, case.task, "timed out", seconds=round(elapsed, 1))
    if child.process.is_alive():
        row.reason = f"still {child.stage} after {elapsed:.0f} s"
        return row
    child.process.join()
    code = child.process.exitcode
    if code in (-signal.SIGXCPU, -signal.SIGKILL) and elapsed >= seconds:
        row.reason = f"still {child.stage} after {seconds:.0f} s of processor time"
    else:
        row.status, row.reason = "failed", f"the process ended with code {code} while {child.stage}"
    return row


def stop(child: Child[Any]) -> None:
    """End the process of `child` and free what it holds."""
    if child.row is None or child.process.is_alive():
        child.process.join(0 if child.row is None else 5)
    if child.process.is_alive():
        child.process.kill()
    child.process.join()
    child.pipe.close()
