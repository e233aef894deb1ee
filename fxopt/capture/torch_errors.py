"""What is private of how captures fail: the errors, and what they wrap.

`tests/fxopt/capture/test_torch_errors.py` fails in plain words when a torch version moves one of these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._dynamo import exc as dynamo_exc
from torch._subclasses import fake_tensor
from torch.fx.experimental import symbolic_shapes

from fxopt.errors import FxoptError, VerifyError

P = ParamSpec("P")
R = TypeVar("R")


class CaptureFailed(Exception):
    """Dynamo let an error through that was raised while it captured; it is the cause, and the text says which."""


CAPTURE_ERRORS: tuple[type[Exception], ...] = (
    CaptureFailed,
    dynamo_exc.TorchDynamoException,
    dynamo_exc.FailOnRecompileLimitHit,
    symbolic_shapes.GuardOnDataDependentSymNode,
    symbolic_shapes.PendingUnbackedSymbolNotFound,
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
)
"""What Dynamo raises when it cannot capture, or lets through of the stand-in tensors it traces with; never an error of
the user's own code at run time."""

FOUND = "innermost_user_frame_summary"
"""What Dynamo adds to every error that a capture ends with."""

HANDLED_BY_DYNAMO: tuple[type[Exception], ...] = (
    dynamo_exc.TorchDynamoException,
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
)
"""What Dynamo takes from what it gave a graph to for a word to itself: it begins again, or breaks the graph there."""


def telling_captures(compiled: Callable[P, R]) -> Callable[P, R]:
    """Return `compiled`, which Dynamo captures, so that it raises one of CAPTURE_ERRORS wherever that fails.

    Dynamo lets some errors through as they are (an IndexError of its own guards, say), with what it found of the
    model's stack.
    """

    @functools.wraps(compiled)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return compiled(*args, **kwargs)
        except CAPTURE_ERRORS:
            raise
        except Exception as error:
            if not hasattr(error, FOUND):
                raise
            raise CaptureFailed(f"{type(error).__name__}: {error}") from error

    return run


def root_cause(error: BaseException) -> BaseException:
    """Return the innermost error that `error` wraps or was raised for."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    return error


def telling(error: BaseException) -> BaseException:
    """Return the error that says why: at the limit of captures Dynamo raises another one from it."""
    return error.__cause__ if is_of_limit(error) and error.__cause__ is not None else error


def cause_to_raise(error: BaseException) -> BaseException | None:
    """Return the mistake of the user or of a pass that `error` wraps, or None: Dynamo could not capture."""
    cause = root_cause(error)
    return cause if isinstance(cause, FxoptError | VerifyError) else None


def is_of_backend(error: BaseException) -> bool:
    """Return whether `error` says that what Dynamo gave a captured graph to has failed."""
    return isinstance(error, dynamo_exc.BackendCompilerFailed)


def is_of_limit(error: BaseException) -> bool:
    """Return whether `error` says that a frame has as many captures as it may."""
    return isinstance(error, dynamo_exc.FailOnRecompileLimitHit)


def hangs_on_values(error: BaseException) -> bool:
    """Return whether `error` says that something could not be compiled since its sizes hang on values."""
    return isinstance(root_cause(error), symbolic_shapes.GuardOnDataDependentSymNode)
