"""What a function of the user's did wrong, told in its own terms: where, what, and what to do about it."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

INTO_AN_OP = "put the kernel into a torch.library.custom_op with a register_fake, and call that"
CURES = (
    ("active driver", "Triton finds no GPU: set TRITON_INTERPRET=1 before Triton is imported"),
    ("data pointer", INTO_AN_OP),
    ("data-dependent", "branch on no value of a tensor: torch.where takes both sides, torch.clamp limits"),
    ("builtin operator `print`", "leave out the print"),
    ("in-place", "write to no argument: make a new tensor"),
)
"""What torch and Triton say, in part, and what helps."""
MOST_CHARACTERS = 200


def code_of(function: Any) -> Any:
    """Return the code object of a function, a partial's function or an object's `__call__`; None for built-ins."""
    innermost = _innermost(function)
    called: Any = inspect.getattr_static(innermost, "__call__", None)
    return getattr(innermost, "__code__", None) or getattr(called, "__code__", None)


def _innermost(function: Any) -> Any:
    """Return what a partial calls, or what was wrapped."""
    is_partial = isinstance(function, functools.partial)
    inner: Any = function.func if is_partial else getattr(function, "__wrapped__", None)
    return _innermost(inner) if callable(inner) else function


def function_place(function: Callable[..., Any], error: BaseException | None = None) -> str:
    """Return "name (file:line)" of a function, its name alone where it has no source.

    The line is where the function begins, or the one in its file at which `error` arose.
    """
    code, innermost = code_of(function), _innermost(function)
    name = getattr(innermost, "__name__", type(innermost).__name__)
    if code is None:
        return name
    frames = [] if error is None else [*traceback.extract_tb(error.__traceback__), *_frames_captured(error)]
    own = [frame.lineno for frame in frames if frame.filename == code.co_filename]
    return f"{name} ({Path(code.co_filename).name}:{own[-1] if own else code.co_firstlineno})"


def _frames_captured(error: BaseException) -> Any:
    """Return the frames that Dynamo was in, which are on no stack of Python's."""
    return getattr(error, "real_stack", None) or ()


def said_by(error: BaseException) -> str:
    """Return the kind of an error and its first line; of Dynamo's the explanation, which the heading lacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    explained = (line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: "))
    text = next(explained, lines[0] if lines else "").rpartition(": got ")[2]
    return f"{type(error).__name__}: {text[:MOST_CHARACTERS]}"


def cure_of(error: BaseException, otherwise: str) -> str:
    """Return what helps against `error`, `otherwise` where it is none that we know."""
    text = str(error)
    return next((cure for part, cure in CURES if part in text), otherwise)
