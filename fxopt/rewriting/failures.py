"""What a function of the user's did wrong, told in its own terms: where, what, and what to do about it."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx

from fxopt.graph.view import is_of_standard_library, location_in, location_of
from fxopt.rewriting.trees import items_of
from fxopt.sentences import first_sentence, sentence_of

INTO_AN_OP = "put the kernel into a torch.library.custom_op with a register_fake, and call that"
KEEP_A_TENSOR = "keep it a tensor, or leave it out of the search and take it as an argument"
CURES = (
    ("active driver", "Triton finds no GPU: set TRITON_INTERPRET=1 before Triton is imported"),
    ("data pointer", INTO_AN_OP),
    ("Tensor.item()", KEEP_A_TENSOR),
    ("`tolist()`", KEEP_A_TENSOR),
    ("data-dependent", "branch on no value of a tensor: torch.where takes both sides, torch.clamp limits"),
    ("builtin operator `print`", "leave out the print"),
    ("in-place", "write to no argument: make a new tensor"),
    ("by an inplace operation", "write to nothing that backward reads: make a new tensor"),
)
"""What torch and Triton say, in part, and what helps."""


def code_of(function: Any) -> Any:
    """Return the code object of a function, a partial's function or an object's `__call__`; None for built-ins."""
    innermost = _innermost(function)
    called: Any = _innermost(inspect.getattr_static(innermost, "__call__", None))
    return getattr(innermost, "__code__", None) or getattr(called, "__code__", None)


def _innermost(function: Any) -> Any:
    """Return what a partial calls, or what was wrapped."""
    is_partial = isinstance(function, functools.partial)
    inner: Any = function.func if is_partial else getattr(function, "__wrapped__", None)
    return _innermost(inner) if callable(inner) else function


def function_place(function: Callable[..., Any], error: BaseException | None = None) -> str:
    """Return "name (file:line)" of a function, its name alone where it has no source.

    The line is where the function begins, or the one in its file at which `error` arose; of a function of Python's own
    library, the one of the user's that called it.
    """
    code, name = code_of(function), _name_of(function)
    frames = [] if error is None else [*traceback.extract_tb(error.__traceback__), *_frames_captured(error)]
    if code is None or is_of_standard_library(code.co_filename):
        at = location_in((frame.filename, frame.lineno or 0) for frame in frames)
        return f"{name} ({at})" if at else name
    own = [frame.lineno for frame in frames if frame.filename == code.co_filename]
    return f"{name} ({Path(code.co_filename).name}:{own[-1] if own else code.co_firstlineno})"


def node_place(function: Callable[..., Any], node: fx.Node) -> str:
    """Return "name (file:line)" of a function that was captured, with the line at which it computes `node`."""
    at = location_of(node)
    return f"{_name_of(function)} ({at})" if at else function_place(function)


def _name_of(function: Any) -> str:
    innermost = _innermost(function)
    return getattr(innermost, "__name__", type(innermost).__name__)


def line_in(path: Path, error: BaseException) -> str:
    """Return ":12", the line of the Python file `path` at which `error` arose, "" where none is known."""
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((error.filename or "", error.lineno))
    lines = [line for name, line in frames if line and Path(name).resolve() == path.resolve()]
    return f":{lines[-1]}" if lines else ""


def _frames_captured(error: BaseException) -> Any:
    """Return the frames that Dynamo was in, which are on no stack of Python's."""
    return getattr(error, "real_stack", None) or ()


def said_by(error: BaseException) -> str:
    """Return the kind of an error and its first sentence; of Dynamo's the explanation, which the heading lacks."""
    explanation = str(error).partition("Explanation:")[2]
    text = (first_sentence(explanation) or sentence_of(error)).rpartition(": got ")[2]
    return f"{type(error).__name__}: {text}"


def cure_of(error: BaseException, otherwise: str) -> str:
    """Return what helps against `error`, `otherwise` where it is none that we know."""
    text = str(error)
    return next((cure for part, cure in CURES if part in text), otherwise)


class Fault(NamedTuple):
    """What is wrong with a call of a function of the user's: where, what with expected and got, and what helps."""

    where: str
    wrong: str
    cure: str


def find_fault(function: Callable[..., Any], arguments: Sequence[Any]) -> Fault | None:
    """Return why `function` does not take `arguments` and return tensors, None where it does; they stay as they are."""
    fault = _find_fault_of_number(function, arguments)
    if fault is not None:
        return fault
    try:
        with torch.no_grad():
            found: Any = function(*copies_of(arguments))
    except Exception as error:
        cure = cure_of(error, "mend the function, or give arguments that it takes")
        return Fault(function_place(function, error), f"expected it to run, got {said_by(error)}", cure)
    values = items_of(found)
    if values and all(isinstance(value, torch.Tensor) for value in values):
        return None
    wrong = f"expected a tensor or a tuple of tensors, got {kinds_of(values)}"
    return Fault(function_place(function), f"returns something else, {wrong}", "return tensors only")


def _find_fault_of_number(function: Callable[..., Any], arguments: Sequence[Any]) -> Fault | None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function written in C may have none
        return None
    try:
        signature.bind(*arguments)
    except TypeError:
        names = ", ".join(signature.parameters)
        number, got = len(signature.parameters), len(arguments)
        wrong = f"expected {number} argument{'' if number == 1 else 's'} ({names}), got {got}"
        return Fault(function_place(function), wrong, "give a value for each argument")
    return None


def copies_of(arguments: Sequence[Any]) -> list[Any]:
    """Return arguments that a function may write to."""
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]


def kinds_of(values: Sequence[Any]) -> str:
    """Return the types of `values`, as errors name what was given."""
    names = ("Tensor" if isinstance(value, torch.Tensor) else type(value).__name__ for value in values)
    return ", ".join(names) or "an empty tuple"
