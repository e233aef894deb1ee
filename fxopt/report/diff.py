"""Two reports of one model compared: sites gained and lost, figures that changed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from fxopt.report.figures import layer_figures
from fxopt.report.memory import readable_budget
from fxopt.report.records import Report
from fxopt.report.text import printable, wrap
from fxopt.report.units import format_bytes

Key = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class ReportDiff:
    """What a second report has more, less and otherwise than a first; `lost` is what a CI run should fail for."""

    lost: tuple[str, ...]
    gained: tuple[str, ...]
    changed: tuple[str, ...]

    def __str__(self) -> str:
        """Return the differences as text of at most 100 columns."""
        lines: list[str] = []
        for title, sign, items in (
            ("Lost", "-", self.lost),
            ("Gained", "+", self.gained),
            ("Changed", "~", self.changed),
        ):
            if items:
                lines += [title, *(line for item in items for line in wrap(item, 2, bullet=f"{sign} "))]
        return printable("\n".join(lines or ["no difference"]) + "\n")


def diff_reports(first: Report, second: Report) -> ReportDiff:
    """Return what changed from `first` to `second`.

    Lost are sites that were rewritten and are not, regions that were captured and are not, calls that fell
    back more often, plans that are gone, and figures of a capture that are no longer known. A site is known by its
    form and its module, for lines of source move between releases.

    >>> from fxopt.report.records import Site
    >>> print(diff_reports(Report("Tiny", (Site("glu", "glu", 2, "rewritten", "mlp", "f:1"),)), Report("Tiny")))
    Lost
      - glu x 2 at mlp: was rewritten to glu, is no longer found
    <BLANKLINE>
    """
    lost: list[str] = []
    gained: list[str] = []
    changed: list[str] = []
    if first.model != second.model:
        changed.append(f"model: {first.model} -> {second.model}")
    before, after = _rewritten(first), _rewritten(second)
    for key in dict.fromkeys((*before, *after)):
        number = after[key] - before[key]
        where = f"{key[0]} x {abs(number)} at {key[1] or 'the model itself'}"
        if number < 0:
            lost.append(
                f"{where}: was rewritten to {_ops(first, key)}, is {_fate(second, key, 'no longer found')}"
            )
        elif number > 0:
            gained.append(
                f"{where}: is rewritten to {_ops(second, key)}, was {_fate(first, key, 'not found')}"
            )
        elif _ops(first, key) != _ops(second, key):
            changed.append(
                f"{key[0]} at {key[1] or 'the model itself'}: {_ops(first, key)} -> {_ops(second, key)}"
            )
    _compare_regions(first, second, lost, gained, changed)
    fallbacks = [sum(fallback.count for fallback in report.fallbacks) for report in (first, second)]
    if fallbacks[0] != fallbacks[1]:
        reasons = "; ".join(fallback.reason for fallback in second.fallbacks) or "none"
        (lost if fallbacks[1] > fallbacks[0] else gained).append(
            f"calls that fell back to stock: {fallbacks[0]} -> {fallbacks[1]} ({reasons})"
        )
    _compare_figures(first, second, lost, gained, changed)
    return ReportDiff(tuple(lost), tuple(gained), tuple(changed))


def _rewritten(report: Report) -> Counter[Key]:
    counts: Counter[Key] = Counter()
    for site in report.sites:
        if site.status == "rewritten":
            counts[site.pattern, site.module] += site.count
    for rewrite in report.elsewhere:
        counts[rewrite.pattern, rewrite.module] += rewrite.count
    return counts


def _ops(report: Report, key: Key) -> str:
    done = (*report.sites, *report.elsewhere)
    ops = (site.op for site in done if (site.pattern, site.module) == key and site.op)
    return ", ".join(dict.fromkeys(ops))


def _fate(report: Report, key: Key, missing: str) -> str:
    """Return what the sites of `key` that were not rewritten are in `report`; `missing` where it has none of it."""
    same = [site for site in report.sites if (site.pattern, site.module) == key]
    left = [site for site in same if site.status != "rewritten"]
    if left:
        return f"{left[0].status} at {left[0].location}: {left[0].reason}"
    return "there less often" if _rewritten(report)[key] else missing


def _compare_regions(
    first: Report, second: Report, lost: list[str], gained: list[str], changed: list[str]
) -> None:
    before, after = (
        {(region.kind, region.module): region for region in report.regions} for report in (first, second)
    )
    for key in dict.fromkeys((*before, *after)):
        name = f"{key[0]} {key[1] or '(whole model)'}"
        old, new = before.get(key), after.get(key)
        if old is None or new is None:
            changed.append(f"{name}: {'new' if old is None else 'no longer there'}")
        elif old.status != new.status:
            text = f"{name}: {old.status} -> {new.status}{f', {new.reason}' if new.reason else ''}"
            (lost if old.status == "captured" else gained if new.status == "captured" else changed).append(
                text
            )
        elif old.captures != new.captures:
            changed.append(f"{name}: {old.captures} captures -> {new.captures}")


def _compare_figures(
    first: Report, second: Report, lost: list[str], gained: list[str], changed: list[str]
) -> None:
    before, after = _figures(first), _figures(second)
    more_plans = len(second.plans) - len(first.plans)
    for key in dict.fromkeys((*before, *after)):
        old, new = dict(before.get(key, ())), dict(after.get(key, ()))
        is_plan = "peak" in (old or new)
        if not new:
            (lost if is_plan and more_plans < 0 else changed).append(f"{key}: no longer there")
        elif not old:
            (gained if is_plan and more_plans > 0 else changed).append(f"{key}: new")
        else:
            both = [name for name in old if name in new and old[name] != new[name]]
            if both:
                changed.append(f"{key}: {', '.join(f'{old[name]} {name} -> {new[name]}' for name in both)}")
            lost += [f"{key}: {old[name]} {name} -> not known" for name in old if name not in new]
            gained += [f"{key}: not known {name} -> {new[name]}" for name in new if name not in old]


def _figures(report: Report) -> Mapping[str, Sequence[tuple[str, str]]]:
    """Return what is compared of each capture and plan: names of figures, and their values as text."""
    found: dict[str, list[tuple[str, str]]] = {}
    for figure in layer_figures(report):
        values = found.setdefault(figure.name, [])
        values += [("ops", str(figure.ops_after)), ("written", format_bytes(figure.bytes_after))]
        if figure.kernels is not None and figure.saved is not None:
            values += [("kernels", str(figure.kernels[1])), ("saved", format_bytes(figure.saved[1]))]
    for plan in report.plans:
        values = found.setdefault(
            f"plan for {plan.device}, budget {readable_budget(plan)}, {plan.tokens} tokens", []
        )
        values += [("peak", format_bytes(plan.peak_bytes)), ("a step", f"{plan.step_ms:.1f} ms")]
    return found
