"""Nodes that return what they are given: found and removed where neither values nor gradients can tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.graph import vocabulary
from fxopt.graph.aliases import Aliases
from fxopt.graph.arguments import is_contiguous, same_shape, same_size
from fxopt.graph.edit import Editor, can_bypass, num_edges
from fxopt.graph.names import op_name
from fxopt.graph.purity import is_active_dropout, is_inplace
from fxopt.graph.view import is_tensor, value_of

WIDER = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
"""Dtypes that hold each value of the key exactly."""


def remove_returned_inputs(editor: Editor) -> None:
    """Remove what returns its very input: casts to the same dtype, `contiguous` on contiguous, idle dropout.

    Torch returns the same object for these, so readers cannot tell, and no gradient passes through them.
    """
    for node in editor.graph.nodes:
        x = node.args[0] if node.args else None
        if isinstance(x, fx.Node) and is_tensor(x) and is_tensor(node) and _returns_input(node, x):
            editor.replace(node, x)


def _returns_input(node: fx.Node, x: fx.Node) -> bool:
    value = value_of(x)
    if node.target is vocabulary.cast:
        return value.dtype == value_of(node).dtype
    if node.target is vocabulary.contiguous:
        return is_contiguous(value)
    return op_name(node) == "dropout" and not is_inplace(node) and not is_active_dropout(node)


def remove_identities(editor: Editor) -> None:
    """Remove copies and views of a value as it is, casts there and back, and join reshapes of reshapes."""
    aliases = editor.aliases
    for node in editor.graph.nodes:
        x = node.args[0] if node.args else None
        if not isinstance(x, fx.Node) or not is_tensor(x) or not is_tensor(node):
            continue
        if aliases.is_mutated(node) or aliases.is_mutated(x):
            continue
        x = _join_reshapes(node, x, editor)
        source = _find_copied(node, x, aliases) or _find_viewed(node, x)
        if source is not None and not aliases.is_mutated(source) and can_bypass(node, source):
            editor.replace(node, source)
            _drop_unread(x, source, editor)


def _find_copied(node: fx.Node, x: fx.Node, aliases: Aliases) -> fx.Node | None:
    """Return the value of which `node` is an exact copy in memory of its own.

    All must be private: with the copy gone, a write to the one would be seen in the other.
    """
    source = None
    if (_is_neutral(node, x) or _is_clone(node, x)) and _like(node, x):
        source = x
    elif node.target is vocabulary.cast and x.target is vocabulary.cast and num_edges(x) == 1:
        inner = x.args[0]
        assert isinstance(inner, fx.Node)
        if value_of(x).dtype in WIDER.get(value_of(inner).dtype, ()) and _like(node, inner):
            source = inner
    return source if source is not None and aliases.is_private(node, x, source) else None


def _is_clone(node: fx.Node, x: fx.Node) -> bool:
    return op_name(node) == "clone" and len(node.args) == 1 and not node.kwargs and _same_strides(node, x)


def _is_neutral(node: fx.Node, x: fx.Node) -> bool:
    """Return whether `node` multiplies or divides by one or adds zero (not to floats: -0.0 + 0 is 0.0)."""
    if node.op != "call_function" or len(node.args) != 2 or not isinstance(node.args[1], int | float):
        return False
    number = node.args[1]
    if node.target in (torch.mul, torch.div):
        return number == 1
    if node.target is torch.sub:
        return number == 0 and str(number)[0] != "-"
    return node.target is torch.add and number == 0 and not value_of(x).dtype.is_floating_point


def _find_viewed(node: fx.Node, x: fx.Node) -> fx.Node | None:
    """Return the value of which `node` is a view that changes nothing; not for what the graph returns."""
    if any(user.op == "output" for user in node.users):
        return None
    source = x
    if node.target is torch.transpose and x.target is torch.transpose and node.kwargs == x.kwargs:
        inner = x.args[0]
        assert isinstance(inner, fx.Node)
        return inner if num_edges(x) == 1 else None
    is_view = node.target is vocabulary.reshape or _is_everything(node)
    return source if is_view and _like(node, x) and _same_strides(node, x) else None


def _is_everything(node: fx.Node) -> bool:
    index: Any = node.args[1] if len(node.args) == 2 else None
    return node.op == "call_function" and op_name(node) == "getitem" and index == (...,)


def _join_reshapes(node: fx.Node, x: fx.Node, editor: Editor) -> fx.Node:
    """Let a reshape of a reshape that nothing else reads read the original; return what it reads now."""
    if node.target is not vocabulary.reshape or x.target is not vocabulary.reshape or num_edges(x) != 1:
        return x
    source = x.args[0]
    assert isinstance(source, fx.Node)
    if not can_bypass(x, source):
        return x
    editor.replace(x, source)
    return source


def _drop_unread(node: fx.Node, kept: fx.Node, editor: Editor) -> None:
    if node is not kept and not node.users:
        editor.replace(node, kept)


def _like(node: fx.Node, x: fx.Node) -> bool:
    a, b = value_of(node), value_of(x)
    return a.dtype == b.dtype and a.device == b.device and same_shape(a, b)


def _same_strides(node: fx.Node, x: fx.Node) -> bool:
    return all(map(same_size, value_of(node).stride(), value_of(x).stride()))
