"""One form for each op of torch that has no rule of its own: a function, its operands in order, the rest by name.

Whether a method and a function, or two functions of one name, are the same op is not assumed: both are run on tensors
without storage, and must come to the same ops of torch's with the same arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxopt.graph.arguments import Form, from_last, rank_of
from fxopt.graph.names import op_name
from fxopt.graph.purity import WRITING, is_inplace
from fxopt.graph.signatures import REQUIRED, Signature, bind_to, signatures_of
from fxopt.graph.sizes import number_of
from fxopt.graph.torch_private import (
    DispatchMode,
    schema_of,
    tree_leaves,
    tree_map_only,
    unset_fake_temporarily,
)
from fxopt.graph.view import is_tensor, value_of

log = logging.getLogger("fxopt")

HOMES = (torch, F, torch.special, torch.linalg)
"""Where the function is looked for that stands for an op; the first wins."""
DIMS = frozenset({"dim", "dim0", "dim1", "dims"})
"""Parameters that count the dims of the first argument."""


def general_form(node: fx.Node) -> Form | None:
    """Return the call of a function that is the same op as `node`; None where there is none, or it draws or writes.

    Parameters without a default stand in order, all others by name, with their defaults filled in, but for those given
    by name only whose default is None. Dims are counted from the last, a list of ints is a tuple.
    """
    name = op_name(node)
    if not name or name in WRITING or name.endswith("__") or "out" in node.kwargs or is_inplace(node):
        return None
    if not any(is_tensor(item) for item in tree_leaves((node.args[:1], node.kwargs.get("input")))):
        return None
    spelled = getattr(torch.Tensor, str(node.target), None) if node.op == "call_method" else node.target
    for function in _functions(name, node):
        # A method written in C has no schema of its own.
        for signature in signatures_of(spelled) or signatures_of(function):
            bound = bind_to(node, signature)
            for form in () if bound is None else _forms_of(function, bound, signature):
                if _is_same(node, form):
                    return form
    return None


def _functions(name: str, node: fx.Node) -> Iterator[Callable[..., Any]]:
    """Yield what may stand for `node`: functions of its name, or at last the one that it calls."""
    found = [getattr(home, name, None) for home in HOMES]
    if node.op == "call_function":
        found.append(node.target)  # pyright: ignore[reportArgumentType]
    seen = dict.fromkeys(function for function in found if callable(function))
    yield from (each for each in seen if not isinstance(each, type) and each.__module__ != "_operator")


def _forms_of(function: Callable[..., Any], bound: dict[str, Any], spelled: Signature) -> Iterator[Form]:
    """Yield the calls of `function` with the arguments `bound`, without defaults that it has no name for."""
    idle = {each.name for each in spelled if bound[each.name] is each.default}
    for signature in signatures_of(function):
        known = [each for each in signature if each.name in bound]
        missing = [each for each in signature if each.name not in bound and each.default is REQUIRED]
        unknown = set(bound) - idle - {each.name for each in signature}
        if missing or unknown or not all(each.fits(bound[each.name]) for each in known):
            continue
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for each in signature:
            value = bound.get(each.name, each.default)
            if each.name in DIMS and is_tensor(bound["x"]):
                value = _counted(value, rank_of(bound["x"]))
            if each.default is REQUIRED and not each.by_name_only:
                args.append(value)
            elif not (each.by_name_only and each.default is None and value is None) and each.name != "out":
                kwargs[each.name] = value
        yield Form(function, tuple(args), kwargs)


def _counted(dim: Any, rank: int) -> Any:
    """Return one dim or several counted from the last of `rank`; as they are where they are no plain ints."""
    counted = [from_last(item, rank) for item in (dim if isinstance(dim, list | tuple) else (dim,))]
    if None in counted:
        return dim
    return tuple(counted) if isinstance(dim, list | tuple) else counted[0]


def _is_same(node: fx.Node, form: Form) -> bool:
    """Return whether torch runs the same ops for `node` as for `form`, on tensors of their sizes."""
    stand_ins = {source: _stand_in(source, place) for place, source in enumerate(node.all_input_nodes)}
    spelled = (node.target, *fx.map_arg((node.args, dict(node.kwargs)), stand_ins.__getitem__))
    proposed = (form.target, *fx.map_arg((form.args, form.kwargs), stand_ins.__getitem__))
    return _run_same(_Question(f"{spelled} {proposed}", spelled, proposed))


@dataclasses.dataclass(frozen=True)
class _StandIn:
    """A tensor by its place among the inputs of a call, and its form."""

    place: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Question:
    """Whether two calls run the same ops; questions of the same text are one."""

    text: str
    spelled: Any = dataclasses.field(compare=False)
    proposed: Any = dataclasses.field(compare=False)


def _stand_in(source: fx.Node, place: int) -> Any:
    value = value_of(source)
    if isinstance(value, Tensor):
        return _StandIn(
            place, value.dtype, tuple(map(number_of, value.shape)), tuple(map(number_of, value.stride()))
        )
    return number_of(value) if isinstance(value, torch.SymInt) else value


@functools.lru_cache(4096)
def _run_same(question: _Question) -> bool:
    try:
        return _ops_of(*question.spelled) == _ops_of(*question.proposed)
    except Exception as error:  # no such call, or one that hangs on values: then the node stays as it is
        log.debug("%s keeps its spelling: %s: %s", question.text, type(error).__name__, error)
        return False


def _ops_of(target: Any, args: Any, kwargs: Any) -> list[str]:
    """Return what torch runs for a call on tensors without storage; none may draw, or write to an argument."""
    made: dict[_StandIn, Tensor] = {}

    def make(item: Any) -> Any:
        if isinstance(item, _StandIn) and item not in made:
            made[item] = torch.empty_strided(item.shape, item.stride, dtype=item.dtype, device="meta")
        return made[item] if isinstance(item, _StandIn) else item

    with unset_fake_temporarily(), torch.no_grad():
        args, kwargs = tree_map_only(_StandIn, make, (args, kwargs))
        call: Any = (
            getattr(args[0], target) if isinstance(target, str) else functools.partial(target, *args[:1])
        )
        with _Recorder(tuple(made[item] for item in sorted(made, key=lambda item: item.place))) as recorder:
            call(*args[1:], **kwargs)
    return recorder.lines


class _Recorder(DispatchMode):
    """Writes down the ops that run within it, tensors by number."""

    def __init__(self, given: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._given, self._known = given, list(given)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        writes = schema_of(op).is_mutable and any(each is args[0] for each in self._given)
        if writes or torch.Tag.nondeterministic_seeded in op.tags:
            raise TypeError(f"{op} draws or writes")
        parameters = schema_of(op).arguments
        given = {each.name: each.default_value for each in parameters if each.has_default_value()}
        given |= {each.name: value for each, value in zip(parameters, args, strict=False)} | (kwargs or {})
        if args and isinstance(args[0], Tensor):
            given = {name: _counted(it, args[0].dim()) if name in DIMS else it for name, it in given.items()}
        self.lines.append(f"{op}{tree_map_only(Tensor, self._number, given)}")
        result = op(*args, **(kwargs or {}))
        self._known += [item for item in tree_leaves(result) if isinstance(item, Tensor)]
        return result

    def _number(self, tensor: Tensor) -> str:
        return f"%{next(place for place, item in enumerate(self._known) if item is tensor)}"
