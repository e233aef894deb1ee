"""What a term is made of: a tree of named leaves, operations and alternatives; and a term as text."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

Target = Callable[..., Any]
EscapePolicy = Literal["refuse", "keep", "export"]


class Term:
    """Anything a pattern is made of; arithmetic on terms builds larger ones."""

    def __add__(self, other: Any) -> Term:
        return operation(torch.add, self, other)

    def __radd__(self, other: Any) -> Term:
        return operation(torch.add, self, other)

    def __sub__(self, other: Any) -> Term:
        return operation(torch.sub, self, other)

    def __rsub__(self, other: Any) -> Term:
        return operation(torch.sub, other, self)

    def __mul__(self, other: Any) -> Term:
        return operation(torch.mul, self, other)

    def __rmul__(self, other: Any) -> Term:
        return operation(torch.mul, self, other)

    def __truediv__(self, other: Any) -> Term:
        return operation(torch.div, self, other)

    def __rtruediv__(self, other: Any) -> Term:
        return operation(torch.div, other, self)

    def __pow__(self, exponent: Any) -> Term:
        return operation(torch.pow, self, exponent=exponent)

    def __neg__(self) -> Term:
        return operation(torch.neg, self)

    def __getitem__(self, index: Any) -> Term:
        return operation(operator.getitem, self, index=index)

    def __str__(self) -> str:
        return describe(self)

    @functools.cached_property
    def heads(self) -> frozenset[Target]:
        """The ops that the topmost node of a match may call; empty where it may be any value."""
        match self:
            case Operation():
                return frozenset({self.target})
            case Escaping() | Named() | Also():
                return self.term.heads
            case Either():
                heads = [option.heads for _, option in self.options]
                return frozenset[Target]().union(*heads) if all(heads) else frozenset()
            case _:
                return frozenset()


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor(Term):
    """A named tensor; `shape` names its dims, `*` standing for any number of leading ones."""

    name: str
    shape: tuple[str, ...] | None = None
    dtypes: frozenset[torch.dtype] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Number(Term):
    """A named Python number (not a bool, not a tensor)."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Attribute(Term):
    """A named attribute of an op; binds whatever the node has there."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Operation(Term):
    """One node calling `target`; an attribute may stand by name or in its place after `args`."""

    target: Target
    args: tuple[Any, ...]
    attributes: tuple[tuple[str, Any], ...] = ()
    condition: Callable[[torch.fx.Node], bool] | None = None
    expected: str = ""

    @functools.cached_property
    def heads_of_args(self) -> tuple[frozenset[Target], ...]:
        """The `heads` of each argument, empty where it may be anything."""
        return tuple(arg.heads if isinstance(arg, Term) else frozenset[Target]() for arg in self.args)


@dataclasses.dataclass(frozen=True, eq=False)
class Either(Term):
    """Alternatives in order of preference; a `name` binds the value beside the one that matched."""

    options: tuple[tuple[Any, Term], ...]
    name: str = ""

    def options_of(self, node: torch.fx.Node) -> tuple[tuple[Any, Term], ...]:
        """Return the alternatives that the op which `node` calls leaves open."""
        target: Any = node.target
        if target not in self._by_target:
            self._by_target[target] = tuple(
                (tag, option) for tag, option in self.options if not option.heads or target in option.heads
            )
        return self._by_target[target]

    @functools.cached_property
    def _by_target(self) -> dict[Target, tuple[tuple[Any, Term], ...]]:
        return {}


@dataclasses.dataclass(frozen=True, eq=False)
class Escaping(Term):
    """A value that may be read from outside the match, and what then happens to it."""

    term: Term
    policy: EscapePolicy
    name: str = ""
    cheap: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Named(Term):
    """A term whose node is bound to a name as well."""

    name: str
    term: Term


@dataclasses.dataclass(frozen=True, eq=False)
class Also(Term):
    """A further output of the pattern, taken where it is found."""

    term: Term


@dataclasses.dataclass(frozen=True, eq=False)
class Many(Term):
    """One or more items of a list of arguments, each matching `term`; binds a tuple of their own bindings."""

    name: str
    term: Term
    at_least: int = 1


def operation(target: Target, *args: Any, **attributes: Any) -> Operation:
    """Return a term for one call of `target`: operands in order, then its attributes by name."""
    return Operation(target, args, tuple(attributes.items()))


def describe(term: Any) -> str:
    """Return a term as text, on one line."""
    match term:
        case Tensor() | Number() | Attribute():
            return term.name
        case Operation():
            attributes = [_describe_attribute(*pair) for pair in term.attributes if _is_shown(*pair)]
            return f"{name_of(term.target)}({', '.join([*map(describe, term.args), *attributes])})"
        case Either(options=((True, built), (False, _))):
            return f"maybe {describe(built)}"
        case Either():
            return f"({' | '.join(describe(option) for _, option in term.options)})"
        case Escaping() | Named():
            return describe(term.term)
        case Also():
            return f"maybe also {describe(term.term)}"
        case Many():
            return f"{describe(term.term)}, ..."
        case tuple():
            return f"[{', '.join(map(describe, items_of(term)))}]"
        case _:
            return str(term)


def _is_shown(name: str, value: Any) -> bool:
    return value is not ... and value is not None and name != "keepdim"


def _describe_attribute(name: str, value: Any) -> str:
    return f"{name}={value}" if name == "dim" else describe(value)


def items_of(value: Any) -> tuple[Any, ...]:
    """Return the items of a list or tuple; of anything else, the value as the only item."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def name_of(target: Any) -> str:
    """Return the short name of a callable, as mismatches print it."""
    return getattr(target, "__name__", str(target)).strip("_")


def children_of(term: Term) -> Iterator[Term]:
    """Yield the terms directly inside `term`."""
    match term:
        case Operation():
            values = (*term.args, *(value for _, value in term.attributes))
            for value in values:
                yield from (item for item in items_of(value) if isinstance(item, Term))
        case Either():
            yield from (option for _, option in term.options)
        case _:
            inner = getattr(term, "term", None)
            if inner is not None:
                yield inner


def walk(term: Term) -> Iterator[Term]:
    """Yield `term` and every term inside it, each once."""
    seen: set[int] = set()
    queue = [term]
    while queue:
        current = queue.pop()
        if id(current) not in seen:
            seen.add(id(current))
            yield current
            queue.extend(children_of(current))


def depth_of(term: Term) -> int:
    """Return the most operations on a path from `term` to a leaf."""
    return _depth(term, {})


def _depth(term: Term, known: dict[int, int]) -> int:
    if id(term) not in known:
        deepest = max((_depth(child, known) for child in children_of(term)), default=0)
        known[id(term)] = deepest + isinstance(term, Operation)
    return known[id(term)]


def find_needed_ops(term: Term) -> frozenset[Target]:
    """Return the ops that every match contains."""
    return _needed_ops(term, {})


def _needed_ops(term: Term, known: dict[int, frozenset[Target]]) -> frozenset[Target]:
    if id(term) not in known:
        below = [_needed_ops(child, known) for child in children_of(term)]
        needed = frozenset({term.target}) if isinstance(term, Operation) else frozenset[Target]()
        if isinstance(term, Either):
            needed = frozenset[Target].intersection(*below) if below else needed
        elif not isinstance(term, Many) or term.at_least:
            needed = needed.union(*below)
        known[id(term)] = needed
    return known[id(term)]


def names_in(term: Term) -> Iterator[str]:
    """Yield the names that `term` binds in a match; the items of a `many` bind theirs in tuples of their own."""
    queue, seen = [term], {id(term)}
    while queue:
        current = queue.pop()
        name = getattr(current, "name", "")
        if name:
            yield name
        if not isinstance(current, Many):
            inner = [child for child in children_of(current) if id(child) not in seen]
            seen.update(map(id, inner))
            queue += inner
