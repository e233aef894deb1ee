"""Which inputs a captured graph writes to."""

from __future__ import annotations

import operator

from torch import fx

VIEWS = frozenset(
    {"view", "reshape", "transpose", "t", "permute", "unsqueeze", "squeeze", "expand", "narrow", "detach"}
)
"""Methods and functions whose result may share memory with their first argument."""


def find_mutated_inputs(gm: fx.GraphModule) -> tuple[fx.Node, ...]:
    """Return the placeholders that some node of `gm` may write to, through views or directly."""
    roots: dict[fx.Node, fx.Node] = {node: node for node in gm.graph.nodes if node.op == "placeholder"}
    mutated: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if node.op not in ("call_method", "call_function") or first not in roots:
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if _writes(node, name):
            mutated.setdefault(roots[first])
        if name in VIEWS or _writes(node, name) or node.target is operator.getitem:
            roots[node] = roots[first]
    return tuple(mutated)


def _writes(node: fx.Node, name: str) -> bool:
    if name == "setitem" or name in ("iadd", "isub", "imul", "itruediv", "ior", "iand", "ixor"):
        return True
    return name.endswith("_") and not name.endswith("__") and not name.startswith("_")
