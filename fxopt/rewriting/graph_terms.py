"""A canonical graph as the terms that find it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.errors import FxoptError
from fxopt.graph import vocabulary
from fxopt.graph.view import results_of
from fxopt.rewriting.failures import function_place, node_place
from fxopt.rewriting.own_sizes import Sizes
from fxopt.rewriting.terms import downcast, maybe, number, tensor, upcast
from fxopt.rewriting.trees import Term, items_of, operation

FREE = frozenset({"shape", "normalized_shape"})
"""Attributes and operands that hold sizes: a pattern fits any."""
MADE = frozenset({vocabulary.constant, vocabulary.filled})
"""Ops that make a tensor, in the dtype and on the device of the model's, whatever those of the example are."""


class GraphTerms:
    """Turns a canonical graph into terms; a node that is read twice is one term."""

    def __init__(
        self,
        gm: fx.GraphModule,
        names: Sequence[str],
        marks: dict[float, str],
        sizes: Sizes,
        search: Callable[..., Any],
        name: str,
    ) -> None:
        self._gm, self._marks, self._search, self._name = gm, marks, search, name
        self._subject = f"{name}: {function_place(search)}"
        self._sizes = {node: sizes[at] for at, node in enumerate(gm.graph.nodes) if at in sizes}
        holes = gm.graph.find_nodes(op="placeholder")
        self._terms: dict[fx.Node, Term] = {
            node: tensor(name) for node, name in zip(holes, names, strict=True)
        }
        self._found: set[str] = set()

    def terms(self) -> tuple[Term, ...]:
        """Return one term per output.

        Raises:
            FxoptError: an output is an input, an op is one that patterns cannot see, a number was computed with.
        """
        outputs = tuple(self._value(result) for result in results_of(self._gm))
        for output in outputs:
            if not isinstance(output, Term) or not output.heads:
                raise FxoptError(
                    f"{self._subject}: returns something that no op computes, expected results of ops only\n"
                    "return what is computed"
                )
        for name in self._marks.values():
            if name not in self._found:
                raise FxoptError(
                    f"{self._subject}: computes with the number {name} before an op reads it, "
                    "expected it as it stands\n"
                    f"write the number that the op reads as an argument, or {name} as an int to fix it"
                )
        return outputs

    def _value(self, item: Any) -> Any:
        match item:
            case fx.Node():
                if item not in self._terms:
                    self._terms[item] = self._operation(item)
                return self._terms[item]
            case tuple() | list():
                return tuple(map(self._value, items_of(item)))
            case float() if item in self._marks:
                self._found.add(self._marks[item])
                return number(self._marks[item])
            case _:
                return item

    def _operation(self, node: fx.Node) -> Term:
        if node.op != "call_function":
            raise self._unseen(node)
        target: Any = node.target
        if target is vocabulary.cast:
            return _optional_cast(node, self._value(node.args[0]))
        operands = vocabulary.BY_TARGET[target].operands if target in vocabulary.BY_TARGET else ()
        names = (*operands, *[""] * len(node.args))
        sizes = self._sizes.get(node, {})
        args = tuple(
            ... if name in FREE else number(sizes[place]) if place in sizes else self._value(item)
            for place, (name, item) in enumerate(zip(names, node.args, strict=False))
        )
        free = FREE | {"dtype", "device"} if target in MADE else FREE
        attributes = {key: ... if key in free else self._value(value) for key, value in node.kwargs.items()}
        return operation(target, *args, **attributes)

    def _unseen(self, node: fx.Node) -> FxoptError:
        """Return the error of an op that patterns cannot see: one with graphs of its own, or a method alone."""
        place, what = f"{self._name}: {node_place(self._search, node)}", f"the method {node.target}"
        cure = "leave it out of the search, and take what it returns as an argument"
        if node.op == "get_attr":
            what = " or ".join(user.name for user in node.users)
            cure = "write the arithmetic itself, without an autograd.Function, a checkpoint or a torch.cond around it"
        return FxoptError(
            f"{place}: has no canonical form, expected an op that torch has as a function, got {what}\n{cure}"
        )


def _optional_cast(node: fx.Node, inner: Term) -> Term:
    """Return a term for a cast that models of other dtypes do without, or for one that changes the kind of value."""
    source: Any = node.args[0]
    before: torch.dtype = source.meta["example_value"].dtype
    after: torch.dtype = node.meta["example_value"].dtype
    if not (before.is_floating_point and after.is_floating_point):
        return operation(vocabulary.cast, inner, dtype=after)
    is_wider = torch.promote_types(before, after) == after
    return maybe(upcast if is_wider else downcast, inner)
