"""A graph as a Python function that a person can read and run."""

from __future__ import annotations

import builtins
import importlib
import keyword
import math
import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.graph.snapshot import readable_names, type_text
from fxopt.graph.torch_private import HigherOrderOperator, registered_name
from fxopt.graph.view import INLINED, location_of, module_of, value_of

INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
    operator.matmul: "@",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.eq: "==",
    operator.ne: "!=",
    operator.and_: "&",
    operator.or_: "|",
}
NAMESPACES = ((torch, "torch"), (F, "F"), (torch.special, "torch.special"), (torch.linalg, "torch.linalg"))


def to_python(gm: fx.GraphModule, name: str = "block") -> str:
    """Return `gm` as source text that defines the function `name`, with each value's shape and source line.

    The text runs as it stands: it imports what it calls. Tensors that the graph holds itself are keyword arguments.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> x.meta["example_value"] = torch.ones(2, 3)
    >>> y = graph.call_function(torch.neg, (x,))
    >>> y.meta["example_value"] = torch.ones(2, 3)
    >>> _ = graph.output((y,))
    >>> print(to_python(fx.GraphModule({}, graph)))
    import torch
    <BLANKLINE>
    <BLANKLINE>
    def block(
        x,  # f32[2, 3]
    ):
        neg = torch.neg(x)  # f32[2, 3]
        return (neg,)
    <BLANKLINE>
    """
    parts = (part for part in gm.modules() if isinstance(part, fx.GraphModule))
    called = (node.target for part in parts for node in part.graph.nodes if node.op == "call_function")
    # What is imported by its bare name must not be hidden by a value of that name.
    bare = (target for target in called if not _find_namespace(target))
    writer = _Writer(frozenset(getattr(target, "__name__", "") for target in bare))
    body = "\n".join(writer.function(gm, name, ""))
    return "\n".join(["import torch", *sorted(writer.imports - {"import torch"})]) + f"\n\n\n{body}\n"


class _Writer:
    """Writes functions and remembers what they import."""

    def __init__(self, called: frozenset[str]) -> None:
        self.imports: set[str] = {"import torch"}
        self._called = called

    def function(self, gm: fx.GraphModule, name: str, indent: str) -> Iterator[str]:
        """Yield the lines that define `gm` as a function called `name`."""
        names = _identifiers(gm.graph, self._called)
        inner = f"{indent}    "
        yield f"{indent}def {name}("
        for node in gm.graph.find_nodes(op="placeholder"):
            yield f"{inner}{names[node]},{_comment(type_text(value_of(node)))}"
        held = [
            node
            for node in gm.graph.find_nodes(op="get_attr")
            if not isinstance(getattr(gm, str(node.target), None), fx.GraphModule)
        ]
        if held:
            yield f"{inner}*,"
            yield from (f"{inner}{names[node]},  # held by the graph" for node in held)
        yield f"{indent}):"
        module = ""
        for node in gm.graph.nodes:
            if node.op == "placeholder" or node in held:
                continue
            if node.op == "output":
                yield f"{inner}return {self._text(node.args[0], names)}"
                continue
            if node.op == "get_attr":
                yield from self.function(getattr(gm, str(node.target)), names[node], inner)
                continue
            if module_of(node) != module:
                module = module_of(node)
                yield f"{inner}# {module or 'the region itself'}"
            kind = type_text(value_of(node))
            where = ", ".join(filter(None, (kind, location_of(node))))
            yield f"{inner}{names[node]} = {self._call(node, names)}{_comment(where)}"

    def _call(self, node: fx.Node, names: dict[fx.Node, str]) -> str:
        args = [self._text(item, names) for item in node.args]
        kwargs = [f"{key}={self._text(item, names)}" for key, item in node.kwargs.items()]
        if node.op == "call_method":
            return f"{args[0]}.{node.target}({', '.join((*args[1:], *kwargs))})"
        target: Any = node.target
        if target is operator.getitem:
            return f"{args[0]}[{self._index(node.args[1], names)}]"
        if target in INFIX and len(args) == 2:
            return f"{args[0]} {INFIX[target]} {args[1]}"
        if target is builtins.getattr and isinstance(node.args[1], str):
            return f"{args[0]}.{node.args[1]}"
        if getattr(target, "_name", "") in INLINED and _is_body(node, node.args[0] if node.args else None):
            return f"{args[0]}({', '.join(args[1:])})"
        return f"{self._callee(target)}({', '.join((*args, *kwargs))})"

    def _callee(self, target: Any) -> str:
        """Return what `target` is called by, and remember the import it needs."""
        if isinstance(target, HigherOrderOperator):
            return f"torch.ops.higher_order.{registered_name(target)}"
        if registered_name(target):
            return f"torch.ops.{registered_name(target).replace('::', '.')}"
        name = getattr(target, "__name__", "")
        prefix = _find_namespace(target)
        if prefix == "F":
            self.imports.add("import torch.nn.functional as F")
        if prefix:
            return f"{prefix}.{name}"
        module, path = getattr(target, "__module__", "") or "", getattr(target, "__qualname__", name)
        if target.__class__ is type(len) and hasattr(operator, name):
            module, path = "operator", name
        if not _is_found(module, path, target):
            return f"torch.{name}" if hasattr(torch, name) else f"not_importable({name or str(target)!r})"
        first = path.partition(".")[0]
        self.imports.add(f"from {module} import {first}")
        return path

    def _text(self, item: Any, names: dict[fx.Node, str]) -> str:
        """Return an argument as source text."""
        match item:
            case fx.Node():
                return names[item]
            case tuple():
                inner = ", ".join(self._text(part, names) for part in item)
                return f"({inner},)" if len(item) == 1 else f"({inner})"
            case list():
                return f"[{', '.join(self._text(part, names) for part in item)}]"
            case dict():
                pairs = (f"{key!r}: {self._text(value, names)}" for key, value in item.items())
                return f"{{{', '.join(pairs)}}}"
            case slice():
                parts = (self._text(part, names) for part in (item.start, item.stop, item.step))
                return f"slice({', '.join(parts)})"
            case float() if not math.isfinite(item):
                return f'float("{item}")'
            case torch.device():
                return f'torch.device("{item}")'
            case _ if item is ...:
                return "..."
            case _:
                return repr(item)

    def _index(self, index: Any, names: dict[fx.Node, str]) -> str:
        if isinstance(index, tuple) and index:
            inner = ", ".join(self._index(part, names) for part in index)
            return f"{inner}," if len(index) == 1 else inner
        if isinstance(index, slice):
            ends = ["" if end is None else self._text(end, names) for end in (index.start, index.stop)]
            return ":".join(ends) + ("" if index.step is None else f":{self._text(index.step, names)}")
        return self._text(index, names)


def _identifiers(graph: fx.Graph, called: frozenset[str]) -> dict[fx.Node, str]:
    """Return a Python name for each node, close to how the model calls it, and none that is `called`."""
    names: dict[fx.Node, str] = {}
    taken = {"torch", "F", *called}
    for node, readable in readable_names(graph).items():
        name = re.sub(r"\W", "_", readable).lstrip("_") or node.name
        if name[0].isdigit() or keyword.iskeyword(name):
            name = f"v_{name}"
        while name in taken:
            name += "_"
        taken.add(name)
        names[node] = name
    return names


def _find_namespace(target: Any) -> str:
    """Return by what prefix torch's own function `target` is called, "" for what is none."""
    name = getattr(target, "__name__", "")
    return next((prefix for space, prefix in NAMESPACES if name and getattr(space, name, None) is target), "")


def _is_body(caller: fx.Node, item: Any) -> bool:
    return isinstance(item, fx.Node) and item.op == "get_attr" and caller in item.users


def _is_found(module: str, path: str, target: Any) -> bool:
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError):
        return False
    return found is target


def _comment(text: str) -> str:
    return f"  # {text}" if text else ""
