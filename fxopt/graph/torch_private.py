"""Everything private of torch that reading a captured graph touches, in one place.

What capture itself touches is in the files `torch_*.py` of `fxopt/capture`. `tests/fxopt/graph/test_torch_private.py`
fails in plain words when a torch version moves one of these.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._logging import _internal as _logging_internal
from torch._subclasses import fake_tensor
from torch.jit import _builtins
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

NN_FUNCTIONS: Any = getattr(torch._C, "_nn")  # noqa: B009
"""Holds what F.linear, F.gelu and F.pad are or call; its type stub is missing."""

TORCH_LINEAR: Any = NN_FUNCTIONS.linear
"""What F.linear is, unless somebody has put another function there, as DeepSpeed does for good."""

OpOverload = torch._ops.OpOverload
OpOverloadPacket = torch._ops.OpOverloadPacket
HigherOrderOperator = torch._ops.HigherOrderOperator
REGISTERED = (OpOverload, OpOverloadPacket, HigherOrderOperator)
"""The kinds of ops that are registered with torch, by torch itself or by a library."""

GROUPED_PRODUCTS = frozenset({"grouped_mm", "_grouped_mm"})
"""The names of torch's product of rows in groups: the public one is captured as the private one that it calls."""

ENTER_AUTOCAST: Any = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST: Any = torch.amp.autocast_mode._exit_autocast
SET_GRAD = torch._C._set_grad_enabled
"""The targets of nodes that change how all later nodes run."""

ENTER_INFERENCE: Any = torch.autograd.grad_mode._enter_inference_mode
"""What begins inference mode in a captured graph."""

GET_DATA: Any = getattr(torch._C, "_autograd")._get_data_attr  # noqa: B009
"""What Dynamo makes of `.data`: the same memory, of whose writes autograd is not told."""

unset_fake_temporarily = fake_tensor.unset_fake_temporarily
"""A scope in which tensors are made as real ones, whatever capture is under way."""

FakeTensor = fake_tensor.FakeTensor
FakeTensorMode = fake_tensor.FakeTensorMode
"""A scope in which tensors have no storage, and ops compute forms alone."""
DispatchMode = TorchDispatchMode
"""A scope that sees every op that reaches torch's kernels, those of autograd's backward too."""

tree_leaves = _pytree.tree_leaves
tree_map = _pytree.tree_map
tree_map_only = _pytree.tree_map_only


def registered_name(op: object) -> str:
    """Return the name under which `op` is registered, with its library and overload; "" if it is not.

    >>> registered_name(torch.ops.aten.add.Tensor), registered_name(torch.ops.aten.add), registered_name(torch.add)
    ('aten::add.Tensor', 'aten::add', '')
    """
    if isinstance(op, OpOverload | HigherOrderOperator):
        return op.name()
    return op._qualified_op_name if isinstance(op, OpOverloadPacket) else ""


def schema_of(op: Any) -> Any:
    """Return the schema of an overload: its `name`, its `arguments`, and whether it `is_mutable`."""
    return op._schema


def expression_of(size: Any) -> Any:
    """Return the sympy expression of a size that is not fixed; asking for it makes no guard."""
    return size.node.expr


def free_sizes(tensor: Tensor, num_dims: int) -> None:
    """Make symbols of the first `num_dims` sizes of `tensor` where the next capture lets them be."""
    lazily_imported: Any = torch
    for dim in range(num_dims):
        if tensor.shape[dim] > 1:
            lazily_imported._dynamo.maybe_mark_dynamic(tensor, dim)


def conditions_on(size: Any) -> list[Any]:
    """Return what capture found to hold of `size` and all others that are not fixed, as sympy relations."""
    node: Any = getattr(size, "node", None)
    return [] if node is None else [guard.expr for guard in node.shape_env.guards]


def _substitute(expression: Any, symbols: tuple[Any, ...], *values: int) -> Any:
    return expression.subs(dict(zip(symbols, values, strict=True)))


@functools.lru_cache(maxsize=4096)
def _compiled(expression: Any) -> tuple[tuple[Any, ...], Callable[..., Any]]:
    """Return the symbols of a sympy expression, and it as a function of a number for each."""
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
    from torch.utils._sympy import functions, printers

    symbols = tuple(sorted(expression.free_symbols, key=str))
    try:
        code = f"lambda {', '.join(map(str, symbols))}: {printers.PythonPrinter().doprint(expression)}"
    except (NotImplementedError, AssertionError):  # the printer does not know all that sympy has
        return symbols, functools.partial(_substitute, expression, symbols)
    return symbols, eval(code, {**vars(functions), **SYMPY_INTERP})


def evaluate(expression: Any, numbers: Mapping[Any, int]) -> Any:
    """Return what an expression or relation of sizes is with a number for each of its symbols.

    It runs as Python, as Dynamo's guards do: substitution simplifies whatever divides anew, for seconds where sizes
    are products of quotients.

    Raises:
        ZeroDivisionError: it is undefined there.
    """
    symbols, run = _compiled(expression)
    values = [numbers[symbol] for symbol in symbols]
    try:
        return run(*values)
    except NameError:  # infinities are printed by names that Python does not know
        return _substitute(expression, symbols, *values)


def numbers_at_capture(size: Any) -> Mapping[Any, Any]:
    """Return the number that each symbol had at capture, of all sizes that were captured with this symbolic one."""
    return size.node.shape_env.backed_var_to_val


def are_logs_asked_for() -> bool:
    """Return whether the user asked torch for logs of its own, with `TORCH_LOGS` or `torch._logging.set_logs`."""
    state: Any = _logging_internal._get_log_state()
    return bool(state.log_qname_to_level or state.artifact_names)


@contextlib.contextmanager
def quiet(logger_name: str) -> Generator[None]:
    """Keep one of torch's loggers silent in this thread; where the user asked torch for logs, they are left whole."""
    if are_logs_asked_for():
        yield
        return
    logger, own = logging.getLogger(logger_name), threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != own

    logger.addFilter(is_of_others)
    try:
        yield
    finally:
        logger.removeFilter(is_of_others)


def quiet_fakes() -> contextlib.AbstractContextManager[None]:
    """Keep torch from logging, in this thread, a traceback for what does not run on tensors without storage.

    An error or a report tells it.
    """
    return quiet(fake_tensor.__name__)


def leaving_no_symbols(fake_mode: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a scope whose sizes that hang on values are thrown away: a capture that waits for them would fail."""
    shape_env: Any = getattr(fake_mode, "shape_env", None)
    return contextlib.nullcontext() if shape_env is None else shape_env.ignore_fresh_unbacked_symbols()


def hint_of(size: Any) -> int | None:
    """Return the value that a size had at capture, or None; asking for it makes no guard."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    node: Any = size.node
    return int(node.hint) if node.has_hint() else None


def float_seen(number: torch.SymFloat) -> float | None:
    """Return the value that a float had at capture, None where it hangs on a tensor's; asking for it makes no guard."""
    node: Any = number.node
    return float(node.hint) if node.has_hint() else None


def size_seen(size: int | torch.SymInt) -> int:
    """Return the number that a size had in the call that is being captured.

    Raises:
        ValueError: it hangs on the values of a tensor.
    """
    number = hint_of(size)
    if number is None:
        raise ValueError(f"the size {size} hangs on the values of a tensor")
    return number


def constant_of(number: Any) -> int | float | None:
    """Return a symbolic number as a constant where it can be no other, else None; no guard is made."""
    node = number.node
    return node.maybe_as_int() if isinstance(number, torch.SymInt) else node.maybe_as_float()


def part_known(size: torch.SymInt, number: int) -> tuple[Any, int]:
    """Return the expression in `size` that is known, and its value, where the whole is known to be `number`."""
    factor, part = size.node.expr.as_coeff_Mul()
    return (part, int(number / factor)) if number % factor == 0 else (size.node.expr, number)


def known_as(size: torch.SymInt, known: Mapping[Any, int]) -> int | None:
    """Return `size` as a number where the expressions that are `known` make it one, else None; no guard is made."""
    expression = size.node.expr.xreplace(dict(known))
    return int(expression) if isinstance(expression, int) or expression.is_number else None


def storage_key(value: Tensor) -> int:
    """Return what identifies the storage of `value`, stand-ins included.

    Raises:
        NotImplementedError, RuntimeError: it has none.
    """
    return value.untyped_storage()._cdata


def schemas_of(function: Any) -> tuple[Any, ...]:
    """Return the schemas of the functions of torch's own that `function`, one written in C, calls, each by its types.

    >>> [str(schema).partition(" ->")[0] for schema in schemas_of(torch.sinh)][:1]
    ['aten::sinh(Tensor self)']
    """
    name = _builtins._find_builtin(function)
    return tuple(torch._C._jit_get_schemas_for_operator(name)) if name else ()
