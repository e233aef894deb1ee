"""What a pattern would match over the model types of the coverage run."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from fxopt.coverage.inputs import all_cases, find_cases
from fxopt.coverage.record import Row
from fxopt.coverage.row import NotBuilt, build
from fxopt.options import Options
from fxopt.pipeline import make_transform
from fxopt.probing import report_on_small_inputs
from fxopt.rewriting.pattern import Pattern


def find_reach(patterns: Sequence[Pattern], names: Sequence[str]) -> Iterator[str]:
    """Yield one line per model type of `names` and pattern: how often it is rewritten there; last, a line per pattern.

    "all" in `names` stands for every type of the coverage run; those without a rewrite are then counted only. Each is a
    tiny model that runs one forward pass; those that cannot be built or run are told with the reason.
    """
    if not names:
        yield "not tried on any model: --over llama, or --over all (some minutes), says where each is found"
        return
    cases = all_cases() if "all" in names else find_cases(tuple(names))
    total: Counter[str] = Counter()
    untried = 0
    for case in tqdm(cases, unit="model", file=sys.stderr, disable=len(cases) < 3):
        try:
            model, batch = build(case, Row(str(case), case.model_type, case.task, "failed"))
            options = Options(tuple(patterns))
            report = report_on_small_inputs(model, options, make_transform(options), batch)
        except (NotBuilt, Exception) as error:
            untried += 1
            yield f"{case}: not tried: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
            continue
        layers = Counter[str]()
        for graph in report.graphs:
            layers.update({rewrite.pattern: 0 for rewrite in graph.rewrites})
            for rewrite in graph.rewrites:
                layers[rewrite.pattern] += graph.layers
        for pattern in patterns:
            total[pattern.name] += bool(layers[pattern.name])
            where = next((r.location for r in report.rewrites if r.pattern == pattern.name), "")
            number = layers[pattern.name]
            if number or "all" not in names:
                yield f"{case}: {pattern.name} x {number}{f' ({where})' if where else ''}"
    for pattern in patterns:
        left = f"; {untried} not tried" if untried else ""
        yield f"{pattern.name}: found in {total[pattern.name]} of {len(cases)} model types{left}"
