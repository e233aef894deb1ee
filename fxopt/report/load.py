"""Reports read back from JSON, as `Report.to_json` writes it."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxopt.errors import FxoptError
from fxopt.report.records import NOT_FINITE, SCHEMA, Report

WRITE_ANEW = "write it anew with fxopt report --json"


def load_report(path: str | Path) -> Report:
    """Return the report that the JSON file at `path` holds.

    Raises:
        FxoptError: no such file, not a report, or one of another schema.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some shells write a mark in front
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise FxoptError(
            f"{path}: cannot be read: {error}\ngive a file written by fxopt report --json"
        ) from error
    return parse_report(text, str(path))


def parse_report(text: str, subject: str = "report") -> Report:
    """Return the report that `text` holds; `subject` is what an error names. Fields that are not known are skipped.

    >>> parse_report(Report("Tiny").to_json()).model
    'Tiny'
    """
    try:
        values: Any = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f" at line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        raise FxoptError(f"{subject}: not JSON{where}\ngive a file written by fxopt report --json") from error
    fields = typing.cast("dict[str, Any]", values) if isinstance(values, dict) else {}
    schema = fields.get("schema")
    if type(schema) is not int or schema != SCHEMA:  # true equals 1
        got = "no report" if schema is None else repr(schema)
        raise FxoptError(
            f"{subject}: expected a report of schema {SCHEMA}, got {got}\n{WRITE_ANEW} of this version"
        )
    try:
        return _build(Report, fields, "")
    except _UnfitError as error:
        raise FxoptError(f"{subject}: not a whole report: {error}\n{WRITE_ANEW}") from error


class _UnfitError(Exception):
    """A value is not of the form that its record has."""


def _build(kind: Any, value: Any, place: str) -> Any:
    """Return `value` as `kind`, a record, a tuple, or a plain type, each part checked; `place` is where it stands."""
    if dataclasses.is_dataclass(kind):
        return _build_record(kind, value, place)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _build(inner, value, place)
    if origin is typing.Literal:
        return value if value in arguments else _fail(place, f"one of {', '.join(arguments)}", value)
    if origin is tuple:
        if not isinstance(value, list):
            return _fail(place, "a list", value)
        items = typing.cast("list[Any]", value)
        kinds = arguments[:1] * len(items) if arguments[-1] is ... else arguments
        if len(kinds) != len(items):
            return _fail(place, f"{len(kinds)} items", value)
        return tuple(
            _build(each, item, f"{place}[{number}]")
            for number, (each, item) in enumerate(zip(kinds, items, strict=True))
        )
    expected = origin or kind
    if expected is float and isinstance(value, str) and value in NOT_FINITE:
        return float(value)
    accepted = (int, float) if expected is float else expected
    is_number_for_truth = isinstance(value, bool) and expected is not bool
    return value if isinstance(value, accepted) and not is_number_for_truth else _fail(place, expected, value)


def _build_record(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, Mapping):
        return _fail(place or "report", "an object", value)
    hints, made = _hints_of(kind), dict[str, Any]()
    for field in dataclasses.fields(kind):
        inner = f"{place}.{field.name}".lstrip(".")
        if field.name in value:
            made[field.name] = found = _build(hints[field.name], value[field.name], inner)
            if isinstance(found, int | float) and found < 0:  # counts, sizes and times
                _fail(inner, "0 or more", found)
        elif field.repr and not field.metadata.get("came_later"):  # what is not shown is not written either
            raise _UnfitError(f"{inner} is missing")
    return kind(**made)


@functools.cache
def _hints_of(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fail(place: str, expected: Any, got: Any) -> Any:
    name = expected.__name__ if isinstance(expected, type) else expected
    shown = repr(got)[:40] if isinstance(got, str | int | float | None) else f"a {type(got).__name__}"
    raise _UnfitError(f"{place} is {shown}, expected {name}")
