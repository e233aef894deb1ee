"""Reports read back from JSON, as `Report.to_json` writes it."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from fxopt.errors import FxoptError
from fxopt.report.records import SCHEMA, Report


def load_report(path: str | Path) -> Report:
    """Return the report that the JSON file at `path` holds.

    Raises:
        FxoptError: no such file, not a report, or one of another schema.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FxoptError(
            f"{path}: cannot be read: {error}\ngive a file written by fxopt report --json"
        ) from error
    return parse_report(text, str(path))


def parse_report(text: str, subject: str = "report") -> Report:
    """Return the report that `text` holds; `subject` is what an error names.

    >>> parse_report(Report("Tiny").to_json()).model
    'Tiny'
    """
    try:
        values: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise FxoptError(
            f"{subject}: not JSON at line {error.lineno}: {error.msg}\ngive a file written by fxopt report --json"
        ) from error
    fields = typing.cast("dict[str, Any]", values) if isinstance(values, dict) else {}
    schema = fields.pop("schema", None)
    if schema != SCHEMA:
        raise FxoptError(
            f"{subject}: expected a report of schema {SCHEMA}, got {'no report' if schema is None else schema}\n"
            "write it anew with fxopt report --json of this version"
        )
    try:
        return _build(Report, fields)
    except (TypeError, KeyError, AttributeError) as error:
        raise FxoptError(
            f"{subject}: not a whole report: {error}\nwrite it anew with fxopt report --json"
        ) from error


def _build(kind: Any, value: Any) -> Any:
    """Return `value` as `kind`: a record, a tuple of records, or the value itself."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields: dict[str, Any] = value
        made: Any = kind
        return made(**{name: _build(hints[name], inner) for name, inner in fields.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple(_build(arguments[0], item) for item in value)
    if origin is types.UnionType:
        return None if value is None else _build(arguments[0], value)
    return value
