"""A pattern: what to find, when it holds, what it becomes, and on what that is proven.

`search()` returns the term to find (a tuple of terms where the match has several outputs). `check(match)`
returns None, or `match.fail(reason, ...)` where the arithmetic is right but the fused op does not serve it.
`replace(match)` returns what comes instead, one `call(...)` per output; it changes nothing itself.

A pattern of your own is used by `fxopt.optimize(model, patterns=(*fxopt.patterns.ALL, MINE))`:

>>> import torch
>>> from fxopt.rewriting.terms import cast, exp, tensor
>>> def search():
...     x = tensor("x")
...     return exp(x) - 1
>>> MINE = Pattern("expm1", search, replace=lambda m: call(torch.expm1, m["x"]))
>>> print(MINE)
expm1: sub(exp(x), 1)
"""

from __future__ import annotations

import dataclasses
import functools
import keyword
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from fxopt.errors import FxoptError
from fxopt.graph.view import is_tensor
from fxopt.options import check_name
from fxopt.rewriting.failures import function_place, said_by
from fxopt.rewriting.trees import (
    Many,
    Operation,
    Target,
    Term,
    children_of,
    depth_of,
    describe,
    find_needed_ops,
    items_of,
    names_in,
    walk,
)

USE_TERMS = "use the operators and functions of fxopt.rewriting.terms"


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A "no" with its reason: the constraint that failed and the nodes it failed on; falsy.

    `progress` counts the nodes that did match before, `has_site` says that the node that was asked about is
    among them, `has_rare_op` that an op is that marks the pattern. In the order of `nearness` these decide
    which of two mismatches is the nearer.
    """

    pattern: str
    reason: str
    nodes: tuple[fx.Node, ...] = ()
    progress: int = 0
    has_rare_op: bool = False
    has_site: bool = False

    @property
    def nearness(self) -> tuple[bool, bool, int]:
        """What mismatches are compared by, the nearer one having more."""
        return self.has_site, self.has_rare_op, self.progress

    def __bool__(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class Match:
    """Where a pattern was found: its nodes in graph order, its output nodes, and what its names are bound to.

    `match["x"]` is the node or value bound to `x`, or None where the alternative that matched has no `x`.
    `kept` are the nodes that stay because something outside reads them; `exports` names the values that
    the replacement must return after its outputs. `autocast` is the autocast state that the graph itself
    switches on or off around the nodes, `(device type, dtype, enabled)`.
    """

    pattern: Pattern
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    bindings: Mapping[str, Any]
    kept: tuple[fx.Node, ...] = ()
    exports: Mapping[str, fx.Node] = dataclasses.field(default_factory=dict[str, fx.Node])
    autocast: tuple[str, torch.dtype | None, bool] | None = None

    def __getitem__(self, name: str) -> Any:
        """Return what `name` is bound to, None where nothing is.

        Raises:
            UnknownNameError: the pattern has no such name.
        """
        if name not in self.bindings:
            check_name(f"match of {self.pattern.name}", name, self.pattern.names)
        return self.bindings.get(name)

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The nodes that the matched ones read from outside, in order of use."""
        inside = set(self.nodes)
        read = (source for node in self.nodes for source in node.all_input_nodes if source not in inside)
        return tuple(dict.fromkeys(read))

    @property
    def origins(self) -> frozenset[str]:
        """The names of the stock nodes that the matched ones descend from."""
        return frozenset[str]().union(*(node.meta.get("origins", (node.name,)) for node in self.nodes))

    def example(self, name: str) -> torch.Tensor:
        """Return the example value (a fake tensor: shape, dtype, device) of the tensor bound to `name`.

        Raises:
            FxoptError: it is bound to something else, or to nothing.
        """
        node = self[name]
        if not is_tensor(node):
            raise FxoptError(
                f"match of {self.pattern.name}: example({name!r}): expected a name bound to a tensor, got {node!r}\n"
                f"read match[{name!r}], which is None where nothing is bound"
            )
        return node.meta["example_value"]

    @property
    def output(self) -> torch.Tensor:
        """The example value of the first output."""
        return self.outputs[0].meta["example_value"]

    def fail(self, reason: str, *names: str) -> Mismatch:
        """Return a mismatch for `reason`, pointing at the nodes bound to `names`, else at the output.

        Raises:
            UnknownNameError: the pattern has no such name.
        """
        nodes = tuple(node for name in names if isinstance(node := self[name], fx.Node))
        return Mismatch(self.pattern.name, reason, nodes or self.outputs, len(self.nodes), True, True)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the replacement; its arguments are nodes of the graph, values, or other calls."""

    target: Target
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def call(target: Target, *args: Any, **kwargs: Any) -> Call:
    """Return a call of `target` as part of a replacement; the rewriter inserts it, the proof runs it."""
    return Call(target, args, kwargs)


Replacement = Call | fx.Node | tuple[Call | fx.Node, ...]
Example = tuple[Callable[..., Any], tuple[Any, ...]]


def _no_examples(device: torch.device) -> Iterable[tuple[str, Example]]:
    return ()


def _no_near_misses(device: torch.device) -> Iterable[tuple[str, Example, str]]:
    return ()


def _holds(match: Match) -> Mismatch | None:
    return None


@dataclasses.dataclass(frozen=True, repr=False)
class Pattern:
    """A rewrite rule and its own proofs.

    `examples(device)` yields `(name, (function, inputs))`, stock code that must be rewritten once;
    `near_misses(device)` yields `(name, (function, inputs), reason)`, code that resembles it and must be
    left alone, with a part of the expected reason; `mutations(device)` yields broken spellings, which
    must be left alone or still be computed as they stand. `source` says where the stock forms come from.
    `backend(match)`, for an op that chooses its implementation while it runs, returns what tells which one serves
    this match, at any time that a report is made; it must hold neither tensors nor nodes. `read_out(match, outputs)`
    returns what a proof compares in place of the outputs, where these may differ and mean the same. `part_of` names
    the forms of which this one takes a part: a site that only such patterns take is told as rewritten in part.
    """

    name: str
    search: Callable[[], Term | tuple[Term, ...]]
    replace: Callable[[Match], Replacement]
    check: Callable[[Match], Mismatch | None] = _holds
    examples: Callable[[torch.device], Iterable[tuple[str, Example]]] = _no_examples
    near_misses: Callable[[torch.device], Iterable[tuple[str, Example, str]]] = _no_near_misses
    mutations: Callable[[torch.device], Iterable[tuple[str, Example]]] = _no_examples
    source: str = ""
    backend: Callable[[Match], Callable[[], str]] | None = None
    read_out: Callable[[Match, list[torch.Tensor]], list[torch.Tensor]] | None = None
    part_of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_pattern_name(self.name, "Pattern")

    def __repr__(self) -> str:
        return f"Pattern({self.name!r})"

    @functools.cached_property
    def terms(self) -> tuple[Term, ...]:
        """What `search` returns, as a tuple.

        Raises:
            FxoptError: `search` raised, or returned something that is not an operation, could be a bare
                tensor, or has a `many` where there is no list, or two in one.
        """
        try:
            found: Any = self.search()
        except Exception as error:
            place = function_place(self.search, error)
            raise FxoptError(
                f"{self.name}: {place}: expected a term, got {said_by(error)}\n{USE_TERMS}"
            ) from error
        terms = items_of(found)
        mistakes = [mistake for term in terms if (mistake := _find_mistake(term))]
        mistake = "no terms" if not terms else "".join(mistakes[:1])
        if mistake:
            raise FxoptError(f"{self.name}: {function_place(self.search)} returned {mistake}\n{USE_TERMS}")
        return terms

    @functools.cached_property
    def targets(self) -> frozenset[Target]:
        """Every op that a match may contain."""
        return frozenset(
            term.target for root in self.terms for term in walk(root) if isinstance(term, Operation)
        )

    @functools.cached_property
    def needed_ops(self) -> frozenset[Target]:
        """The ops that every match contains, as the term of the first output has them."""
        return find_needed_ops(self.terms[0])

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Every name that a match may have bound, those inside a `many` left out."""
        return tuple(sorted({name for term in self.terms for name in names_in(term)}))

    @functools.cached_property
    def depth(self) -> int:
        """The most operations on a path from an output of the pattern to a leaf."""
        return max(map(depth_of, self.terms))

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(map(describe, self.terms))}"


def _find_mistake(root: Any) -> str:
    """Return what is wrong with one of the terms that a search returned, "" if nothing is."""
    if not isinstance(root, Term):
        return f"{root!r}, expected a term, got {type(root).__name__}"
    if not root.heads:
        return f"{describe(root)!r}, expected a term whose every alternative is an operation"
    for term in walk(root):
        values = [*term.args, *(value for _, value in term.attributes)] if isinstance(term, Operation) else []
        lists = [items_of(value) for value in values if isinstance(value, list | tuple)]
        if any(sum(isinstance(item, Many) for item in items) > 1 for items in lists):
            return f"{describe(term)!r}, expected at most one many(...) in a list of arguments, got several"
        alone = (child for child in children_of(term) if isinstance(child, Many))
        if any(not any(child in items for items in lists) for child in alone):
            return f"{describe(term)!r}, expected many(...) in a list of arguments, as in cat(many(...))"
    return ""


def check_pattern_name(name: object, subject: str, nameless: str = "none") -> None:
    """Check what reports and `disable` are to call a pattern; `nameless` is what was got where `name` is None.

    Raises:
        FxoptError: `name` is no identifier.
    """
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        got = nameless if name is None else repr(name)
        raise FxoptError(
            f"{subject}: expected a name that is an identifier, got {got}\ngive name='my_pattern'"
        )
