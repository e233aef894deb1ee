"""What Dynamo passes over around backbones: functions that it could not capture, and then runs as they are for good.

It remembers them by their code, for all models in the process that run it, and tells of each once. So they are kept in
this module, for the process as well.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from fxopt.capture import torch_modules
from fxopt.capture.reasons import RESUMED, reason_of_frame

Code = tuple[str, int, str]
"""File, first line and name of a function; of what Dynamo makes of the rest of one, the line and name of that."""
Forward = tuple[str, range, str]
"""File, lines and name of a forward."""
_reasons: dict[Code, str] = {}
_met: dict[frozenset[Forward], set[Code]] = {}
"""By the forwards around a backbone: what was passed over in calls of these. It may be any function that they call."""


def forwards_of(modules: Iterable[nn.Module]) -> frozenset[Forward]:
    """Return the forwards that the classes of `modules` have, their own or inherited ones."""
    found = (inspect.unwrap(torch_modules.forward_of(kind)) for kind in {type(module) for module in modules})
    codes: Iterator[types.CodeType] = (each.__code__ for each in found if hasattr(each, "__code__"))
    return frozenset((code.co_filename, _lines_of(code), code.co_name) for code in codes)


def note_passed_over(frames: Iterable[Any], forwards: frozenset[Forward]) -> None:
    """Note `frames`, of `torch_dynamo.frames_passed_over`, that were met in a call of `forwards`."""
    for frame in frames:
        code = frame.co_filename, frame.co_firstlineno, frame.co_name
        _reasons[code] = reason_of_frame(frame)
        _met.setdefault(forwards, set()).add(code)


def find_passed_over(forwards: frozenset[Forward]) -> set[str]:
    """Return which functions are passed over in calls of `forwards`, and why: of these or what was met there."""
    own = {code for code in list(_reasons) if any(_is_of(code, forward) for forward in forwards)}
    return {_reasons[code] for code in own | _met.get(forwards, set())}


def _is_of(code: Code, forward: Forward) -> bool:
    file, line, name = code
    return file == forward[0] and line in forward[1] and RESUMED.sub(r"\1", name) == forward[2]


def _lines_of(code: types.CodeType) -> range:
    lines = [line for _, _, line in code.co_lines() if line is not None]
    return range(code.co_firstlineno, max(lines, default=code.co_firstlineno) + 1)
