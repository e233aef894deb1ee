"""What a pattern wanted and what the model has around the place where it failed, as two small texts."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import fx

from fxopt.graph.snapshot import line_of, readable_names
from fxopt.rewriting.pattern import Mismatch, Pattern
from fxopt.rewriting.trees import Either, Many, Operation, Term, children_of, describe, items_of, name_of

MOST_LINES = 24
DEPTH = 5
"""How many levels of readers and of operands around a failed node are shown."""


def render_wanted(pattern: Pattern, near: Iterable[fx.Node] = ()) -> str:
    """Return the terms of `pattern`, one operation a line in the order of data flow.

    Of alternatives the one is shown whose ops are most among those of the nodes `near`, the first of equals.

    >>> from fxopt.rewriting.pattern import call
    >>> from fxopt.rewriting.terms import exp, tensor
    >>> print(render_wanted(Pattern("p", lambda: exp(tensor("x")) - 1, lambda m: m["x"])))
    exp1 = exp(x)
    sub1 = sub(exp1, 1)
    """
    writer = _TermWriter(frozenset(node.target for node in near))
    for term in pattern.terms:
        writer.visit(term)
    left_out = len(writer.lines) - MOST_LINES
    more = [f"... {left_out} more"] if left_out > 0 else []
    return "\n".join([*writer.lines[:MOST_LINES], *more])


class _TermWriter:
    """Writes terms as lines, each operation once."""

    def __init__(self, present: frozenset[Any]) -> None:
        self.lines: list[str] = []
        self._present = present
        self._names: dict[int, str] = {}
        self._counts: dict[str, int] = {}
        self._known: dict[int, frozenset[Any]] = {}

    def visit(self, term: Any) -> str:
        """Return what `term` is called, its own lines and those of its operands written."""
        match term:
            case Operation():
                return self._visit_operation(term)
            case Either():
                return self.visit(min((option for _, option in term.options), key=self._strangeness))
            case Many():
                return f"{self.visit(term.term)}, ..."
            case list() | tuple():
                return f"[{', '.join(map(self.visit, items_of(term)))}]"
            case Term():
                inner = list(children_of(term))
                return self.visit(inner[0]) if inner else describe(term)
            case _:
                return str(term)

    def _visit_operation(self, term: Operation) -> str:
        if id(term) not in self._names:
            args = [self.visit(item) for item in term.args]
            args += [f"{name}={self.visit(value)}" for name, value in term.attributes if value is not ...]
            op = name_of(term.target)
            self._counts[op] = self._counts.get(op, 0) + 1
            self._names[id(term)] = f"{op}{self._counts[op]}"
            self.lines.append(f"{self._names[id(term)]} = {op}({', '.join(args)})")
        return self._names[id(term)]

    def _strangeness(self, option: Term) -> int:
        """Return twice how many ops of `option` are not near, less how many are."""
        targets = self._targets(option)
        return 2 * len(targets - self._present) - len(targets & self._present)

    def _targets(self, term: Any) -> frozenset[Any]:
        """Return the ops of `term`, of alternatives those of the one that is shown."""
        if id(term) not in self._known:
            inner = list(children_of(term))
            if isinstance(term, Either):
                inner = [min(inner, key=self._strangeness)]
            own = {term.target} if isinstance(term, Operation) else set[Any]()
            self._known[id(term)] = frozenset(own).union(*map(self._targets, inner))
        return self._known[id(term)]


def render_found(near: Iterable[fx.Node], failed: Collection[fx.Node]) -> str:
    """Return the nodes `near` a place in their order, those that `failed` to match marked with ">"."""
    nodes = list(near)
    if not nodes:
        return ""
    names = readable_names(nodes[0].graph)
    lines = [f"{'>' if node in failed else ' '} {line_of(node, names)}" for node in nodes]
    return "\n".join(lines[:MOST_LINES])


def find_near(mismatch: Mismatch) -> list[fx.Node]:
    """Return the nodes that `mismatch` names and those around them, in graph order."""
    centre = [node for node in mismatch.nodes if node.op != "output"]
    if not centre:
        return []
    near = _around(centre)
    shown = (
        node for node in centre[0].graph.nodes if node.op not in ("placeholder", "get_attr") or node in centre
    )
    return [node for node in shown if node in near]


def _around(centre: Iterable[fx.Node]) -> set[fx.Node]:
    """Return `centre`, what reads its nodes some levels up, and the operands of all these some levels down."""
    found: dict[fx.Node, None] = dict.fromkeys(centre)
    level = list(found)
    for _ in range(DEPTH):
        level = [user for node in level for user in node.users if user not in found]
        if len(found) + len(level) > MOST_LINES // 2:
            break
        found.update(dict.fromkeys(level))
    level = list(found)
    for _ in range(DEPTH):
        level = [source for node in level for source in node.all_input_nodes if source not in found]
        if len(found) + len(level) > MOST_LINES:
            break
        found.update(dict.fromkeys(level))
    return set(found)
