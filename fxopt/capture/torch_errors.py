"""What is private of how captures fail: the errors, and what they wrap.

`tests/fxopt/capture/test_torch_errors.py` fails in plain words when a torch version moves one of these.
"""

from __future__ import annotations

from torch._dynamo import exc as dynamo_exc
from torch._subclasses import fake_tensor
from torch.fx.experimental import symbolic_shapes

from fxopt.errors import FxoptError, VerifyError

CAPTURE_ERRORS: tuple[type[Exception], ...] = (
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

HANDLED_BY_DYNAMO: tuple[type[Exception], ...] = (
    dynamo_exc.TorchDynamoException,
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
)
"""What Dynamo takes from what it gave a graph to for a word to itself: it begins again, or breaks the graph there."""


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
