"""What a pattern would match over the model types of the coverage run."""

from __future__ import annotations

import dataclasses
import functools
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from fxopt.authoring.files import load_patterns
from fxopt.coverage.compare import one_line
from fxopt.coverage.inputs import Case, all_cases, find_cases
from fxopt.coverage.record import Row
from fxopt.coverage.row import build
from fxopt.coverage.run import work_on
from fxopt.demo.models import check_model_type
from fxopt.errors import UnknownNameError
from fxopt.options import Options
from fxopt.pipeline import make_transform
from fxopt.probing import report_on_small_inputs

MOST_REASON = 160


@dataclasses.dataclass(frozen=True)
class Found:
    """What the patterns of a file met in one case: by name how often each is rewritten, and where first."""

    case: str
    counts: dict[str, int]
    places: dict[str, str]


def find_reach(path: Path, names: Sequence[str], jobs: int = 1) -> Iterator[str]:
    """Yield one line per model type of `names` and pattern of the file `path`: how often it is rewritten there; last, a
    line per pattern.

    "all" in `names` stands for every type of the coverage run; those without a rewrite are then counted only. Each is a
    tiny model that runs one forward pass, in a process of its own with a limit of time and of memory; those that
    cannot be built or run, or that do not end, are told with the reason.

    Raises:
        UnknownNameError: transformers has no such type, or it no such task; the text lists what there is.
    """
    if not names:
        yield "not tried on any model: --over llama, or --over all (a quarter of an hour), says where each is found"
        return
    check_names(names)
    is_all = "all" in names
    cases = all_cases() if is_all else find_cases(tuple(names))
    types = {case.model_type for case in cases}
    patterns = [pattern.name for pattern in load_patterns(path)]
    total: Counter[str] = Counter()
    untried = 0
    with tqdm(total=len(cases), unit="model", file=sys.stderr, smoothing=0.1) as bar:
        for found in work_on(cases, functools.partial(count_rewrites, path), jobs):
            bar.set_postfix_str(found.case)
            bar.update()
            if isinstance(found, Row):
                untried += 1
                yield f"{found.case}: not tried: {textwrap.shorten(found.reason, MOST_REASON, placeholder=' ...')}"
                continue
            for name in patterns:
                number = found.counts.get(name, 0)
                total[name] += bool(number)
                if number or not is_all:
                    where = f" ({found.places[name]})" if found.places.get(name) else ""
                    yield f"{found.case}: {name} x {number}{where}"
    for name in patterns:
        left = f"; {untried} not tried" if untried else ""
        yield f"{name}: found in {total[name]} of {len(cases)} models, of {len(types)} types{left}"


def check_names(names: Sequence[str]) -> None:
    """Check that each of `names` is "all", or a model type that transformers has, with a task that it has.

    Raises:
        UnknownNameError: it is not; the text lists what there is.
    """
    for name in names:
        if name != "all":
            _check_known(name)


def _check_known(name: str) -> None:
    model_type, _, task = name.partition(":")
    check_model_type("--over", model_type)
    tasks = [case.task for case in all_cases() if case.model_type == model_type]
    if task and task not in tasks:
        raise UnknownNameError(
            f"--over: unknown task {task!r} of {model_type}, expected {' or '.join(tasks) or 'none: it has no case'}"
        )


def count_rewrites(path: Path, case: Case, on_stage: Callable[[str], None]) -> Found | Row:
    """Return what the patterns of the file `path` meet in the tiny model of `case`; a row where it cannot be run."""
    row = Row(str(case), case.model_type, case.task, "not built")
    try:
        on_stage("building")
        model, batch = build(case, row)
        on_stage("matching")
        options = Options(load_patterns(path))
        report = report_on_small_inputs(model, options, make_transform(options), batch)
    except Exception as error:  # whatever a model of 255 raises, the others are tried
        row.reason = one_line(error)
        return row
    counts: Counter[str] = Counter()
    for graph in report.graphs:
        for rewrite in graph.rewrites:
            counts[rewrite.pattern] += graph.layers
    places = {rewrite.pattern: rewrite.location for rewrite in reversed(report.rewrites)}
    return Found(str(case), dict(counts), places)
