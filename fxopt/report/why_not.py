"""Why a form was left as it was: per place the nearest miss, how far it came, and both graphs side by side."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable

from fxopt.errors import UnknownNameError
from fxopt.report.figures import distinct_misses, unseen_regions
from fxopt.report.records import MismatchRecord, Report, Site
from fxopt.report.text import WIDTH, place_of, printable, times, wrap
from fxopt.report.units import plural

COLUMN = (WIDTH - 5) // 2


def render_why_not(report: Report, name: str) -> str:
    """Return why sites of the form `name` were not rewritten or in part only, or why that pattern did not match.

    Raises:
        UnknownNameError: neither a pattern in use nor a form in the report.
    """
    known = sorted({*report.patterns, *(site.pattern for site in report.sites)})
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, n=len(known), cutoff=0.0)
        raise UnknownNameError(
            f"why_not: unknown name {name!r}, expected one of {', '.join(nearest) or '(no pattern is in use)'}"
        )
    sites = [site for site in report.sites if site.pattern == name]
    left = [site for site in sites if site.status != "rewritten" or site.reason]
    all_misses = [miss for miss in report.mismatches if name in (miss.anchor, miss.pattern)]
    # What the form's own pattern came to says most; captures of equal layers say the same.
    all_misses.sort(key=lambda miss: miss.pattern != name)
    misses = distinct_misses(all_misses)
    done = sum(site.count for site in sites if site.status == "rewritten")
    # A pattern of the user's own has no sites: the scans of the library do not know its form.
    made = 0 if sites else sum(rewrite.pattern == name for rewrite in report.rewrites)
    in_part = sum(site.count for site in left if site.status == "rewritten")
    rewritten = "would be rewritten" if report.stock else "rewritten"
    head = f"{done} of {sum(site.count for site in sites)} sites {rewritten}"
    head += f", {in_part} in part" if in_part else ""
    if made:
        head = f"{rewritten} {made} time{'' if made == 1 else 's'} in the captured graphs"
    elif misses and not sites:
        head = f"{rewritten} nowhere in the captured graphs"
    lines = [f"{name}: {head}"]
    if not left and not misses:
        lines += wrap(_say_nothing_left(report, is_done=bool(done or made)))
    for site in left:
        miss = (
            next((miss for miss in misses if _is_at(miss, site)), None) if site.status != "refused" else None
        )
        status = f"became only {site.op}" if site.status == "rewritten" else site.status
        lines += ["", *wrap(f"{status} {place_of(site.module, site.location)}{times(site.count)}")]
        if miss is None:
            lines += wrap(site.reason, 2)
            continue
        misses = [other for other in misses if not _is_at(other, site)]
        lines += _render_miss(miss)
    for miss in misses:
        lines += [
            "",
            *wrap(f"nearest {place_of(miss.module, miss.location)}{times(miss.count)}"),
            *_render_miss(miss),
        ]
    return printable("\n".join(lines) + "\n")


def _say_nothing_left(report: Report, is_done: bool) -> str:
    """Return what is to be said where no site was left and nothing came near; of what no capture saw, nothing is."""
    unseen = unseen_regions(report)
    if not unseen:
        return (
            "nothing was left out"
            if is_done
            else "no site of this form is in the blocks or in what follows them, and nothing came near"
        )
    found = "nothing was left out of what was captured" if is_done else "no site of this form is known"
    found += "; whether there is one in what was not captured is not known"
    reasons = dict.fromkeys(region.reason for region in report.regions if region.unseen and region.reason)
    told = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{found}: {', '.join(unseen)}{told}"


def _is_at(miss: MismatchRecord, site: Site) -> bool:
    is_inside = not miss.module or site.module == miss.module or site.module.endswith(f".{miss.module}")
    return miss.location == site.location and is_inside


def _render_miss(miss: MismatchRecord) -> list[str]:
    lines: list[str] = []
    if miss.matched:
        lines += wrap(f"{miss.pattern}: {plural(miss.matched, 'node')} matched, then:", 2)
        lines += wrap(miss.reason, 4)
    else:
        lines += wrap(f"{miss.pattern}: {miss.reason}" if miss.pattern else miss.reason, 2)
    if miss.wanted or miss.found:
        lines += _side_by_side("what the pattern wants", miss.wanted, "what the model has", miss.found)
    return lines


def _side_by_side(left_title: str, left: str, right_title: str, right: str) -> list[str]:
    rows = [(left_title, right_title), ("-" * len(left_title), "-" * len(right_title))]
    columns = [list(_fold(text.splitlines())) for text in (left, right)]
    for place in range(max(map(len, columns))):
        rows.append(tuple(column[place] if place < len(column) else "" for column in columns))  # pyright: ignore[reportArgumentType]
    return [f"  {first:<{COLUMN}} | {second}".rstrip() for first, second in rows]


def _fold(lines: Iterable[str]) -> Iterable[str]:
    for line in lines:
        yield from textwrap.wrap(
            line, COLUMN, subsequent_indent="      ", break_on_hyphens=False, replace_whitespace=False
        ) or [""]
