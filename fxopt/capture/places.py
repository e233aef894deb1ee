"""Where in a model, or in the code that calls it, something stands: the file and line that a reason ends with."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from fxopt.capture import torch_modules
from fxopt.graph.view import is_of_standard_library, location_in

PLACE = re.compile(r"\S+\.py:\d+")


def with_place(reason: str, place: str) -> str:
    """Return `reason` with its place, unless it tells one or none is known.

    >>> with_place("no block was called", "model.py:7")
    'no block was called; at model.py:7'
    >>> with_place("it reads rand at model.py:9", "model.py:7")
    'it reads rand at model.py:9'
    """
    return reason if not place or PLACE.search(reason) else f"{reason}; at {place}"


def caller_line() -> str:
    """Return "file:line" of the innermost call of this thread that is neither torch's nor fxopt's, "" if none is."""
    return location_in(reversed(list(_frames())))


def _frames() -> Iterator[tuple[str, int]]:
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def forward_line(module: nn.Module) -> str:
    """Return "file:line" where the forward of `module` is defined, not what wraps it; "" where it is not Python."""
    return line_of(inspect.unwrap(torch_modules.forward_of(type(module))))


def line_of(function: Any) -> str:
    """Return "file:line" where a function, a method or an object that is called is defined, "" where none is known.

    Of what Python's own library wraps, as `contextlib.contextmanager` does, it is the function inside.

    >>> line_of(len)
    ''
    """
    found = getattr(function, "__func__", getattr(function, "func", function))
    found = inspect.unwrap(found, stop=lambda each: not is_of_standard_library(_file_of(each)))
    called = inspect.getattr_static(type(found), "__call__", None)
    code = getattr(found, "__code__", None) or getattr(called, "__code__", None)
    return f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}" if code is not None else ""


def _file_of(function: Any) -> str:
    return getattr(getattr(function, "__code__", None), "co_filename", "")


def path_within(root: nn.Module, module: nn.Module) -> str:
    """Return the path of `module` from `root`, "" where it is `root` or not in it."""
    return next((path for path, inner in root.named_modules() if inner is module), "")
