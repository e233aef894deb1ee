"""The arguments of any function or method of torch by name, as its signature or its schemas have them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxopt.graph.arguments import KEYWORDS, is_integer, is_number
from fxopt.graph.torch_private import schemas_of
from fxopt.graph.view import is_tensor

REQUIRED: Any = inspect.Parameter.empty
ALIASES = {**KEYWORDS, "a": "x", "x1": "x", "x2": "other", "keepdims": "keepdim"}
"""The names by which torch takes an argument beside the one of its schema; that of the first tensor is x."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter: its name, its type as a schema writes it ("" where none does), its default, how it is given."""

    name: str
    type: str
    default: Any
    by_name_only: bool

    def fits(self, value: Any) -> bool:
        """Return whether `value`, an argument of a node, is of this type."""
        kind = self.type
        if kind.startswith("Optional["):
            if value is None:
                return True
            kind = kind.removeprefix("Optional[").removesuffix("]")
        if value is self.default:
            return True
        if kind.startswith("List["):
            inner = dataclasses.replace(
                self, type=kind.removeprefix("List[").removesuffix("]"), default=REQUIRED
            )
            is_list = isinstance(value, list | tuple)
            return all(map(inner.fits, value)) if is_list else inner.type == "int" and is_integer(value)
        return TYPES[kind](value) if kind in TYPES else not kind

    def settled(self, value: Any) -> Any:
        """Return `value` as a canonical call has it: a list as a tuple, one number for a list of one as such."""
        is_list = self.type.removeprefix("Optional[").startswith("List[")
        return (
            tuple(value) if isinstance(value, list) else (value,) if is_list and is_integer(value) else value
        )


TYPES: Mapping[str, Callable[[Any], bool]] = {
    "Tensor": is_tensor,
    "number": is_number,
    "float": is_number,
    "int": is_integer,
    "SymInt": is_integer,
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "ScalarType": lambda value: isinstance(value, torch.dtype),
    "Device": lambda value: isinstance(value, torch.device | str),
    "Layout": lambda value: isinstance(value, torch.layout),
    "MemoryFormat": lambda value: isinstance(value, torch.memory_format),
}
Signature = tuple[Parameter, ...]
MOST_KNOWN = 4096
"""Functions whose signatures are kept: a user's own ones are not kept alive for ever."""


@functools.lru_cache(MOST_KNOWN)
def signatures_of(function: Callable[..., Any]) -> tuple[Signature, ...]:
    """Return the signatures of `function`, one for each overload that writes to none of its arguments.

    >>> [parameter.name for parameter in signatures_of(torch.amax)[0]]
    ['x', 'dim', 'keepdim']
    """
    schemas = schemas_of(function)
    if schemas:
        return tuple(_from_schema(schema) for schema in schemas if not schema.is_mutable)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    if any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters):
        return ()
    return (
        _named(Parameter(each.name, "", each.default, each.kind is each.KEYWORD_ONLY) for each in parameters),
    )


def _from_schema(schema: Any) -> Signature:
    return _named(
        Parameter(
            each.name,
            str(each.real_type),
            _as_tuple(each.default_value) if each.has_default_value() else REQUIRED,
            each.kwarg_only,
        )
        for each in schema.arguments
    )


def _named(parameters: Any) -> Signature:
    return tuple(
        dataclasses.replace(each, name="x" if place == 0 else KEYWORDS.get(each.name, each.name))
        for place, each in enumerate(parameters)
    )


def bind_to(node: fx.Node, signature: Signature) -> dict[str, Any] | None:
    """Return the arguments of `node` by name, defaults filled in; None where they do not fit `signature`."""
    by_place = [each for each in signature if not each.by_name_only]
    args = node.args
    if len(by_place) == 2 and len(args) > 2 and by_place[1].type == "List[int]":
        args = (args[0], args[1:])  # x.flip(0, 1)
    if len(args) > len(by_place):
        return None
    given = {each.name: value for each, value in zip(by_place, args, strict=False)}
    names = {each.name for each in signature}
    for keyword, value in node.kwargs.items():
        name = keyword if keyword in names else ALIASES.get(keyword, keyword)
        if name not in names or name in given:
            return None
        given[name] = value
    bound: dict[str, Any] = {}
    for each in signature:
        value = given.get(each.name, each.default)
        if value is REQUIRED or not each.fits(value):
            return None
        bound[each.name] = each.settled(value)
    return bound


@functools.lru_cache(MOST_KNOWN)
def default_of(target: Callable[..., Any], name: str) -> tuple[Any, ...]:
    """Return the values that `target` takes for the argument `name` where it is not given, one for each overload.

    >>> default_of(torch.topk, "largest"), default_of(torch.topk, "k")
    ((True,), ())
    """
    named = (each for signature in signatures_of(target) for each in signature if each.name == name)
    return tuple(dict.fromkeys(each.default for each in named if each.default is not REQUIRED))


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
