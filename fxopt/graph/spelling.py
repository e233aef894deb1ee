"""One spelling for each op: a stock node that a rule knows becomes the canonical call of the same thing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxopt.graph import arithmetic, einsum, factories, functions, layout
from fxopt.graph.any_op import general_form
from fxopt.graph.arithmetic import Rule
from fxopt.graph.edit import Editor
from fxopt.graph.names import op_name
from fxopt.graph.torch_private import constant_of

RULES: dict[str, Rule] = {
    **arithmetic.RULES,
    **layout.RULES,
    **functions.RULES,
    **factories.RULES,
    **einsum.RULES,
}
CONSTANT = (bool, int, float)


def fold_constants(graph: fx.Graph) -> None:
    """Write numbers that Dynamo has fixed (a size, a specialized `item()`) where nodes stood for them."""
    for node in graph.nodes:
        if op_name(node) and any(_is_constant(source) for source in node.all_input_nodes):
            node.args = fx.map_arg(node.args, _constant_of)
            node.kwargs = fx.map_arg(node.kwargs, _constant_of)


def spell_out_sizes(editor: Editor) -> None:
    """Write sizes one by one where an op reads the whole shape of a tensor: a tuple, where some of it are symbolic."""
    for node in editor.graph.nodes:
        read = [source for source in node.all_input_nodes if _is_shape(source)]
        if not read or not _computes_tensors(node):
            continue
        sizes: dict[fx.Node, Any] = {
            source: layout.spell_sizes(node, source.meta["example_value"], editor) for source in read
        }
        node.args = fx.map_arg(node.args, lambda source, sizes=sizes: sizes.get(source, source))
        node.kwargs = fx.map_arg(node.kwargs, lambda source, sizes=sizes: sizes.get(source, source))


def _is_shape(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, tuple) and all(type(size) in (int, torch.SymInt) for size in value)  # pyright: ignore


def unify_spelling(editor: Editor) -> None:
    """Rewrite each node whose spelling is known to its canonical form, in place; its name stays."""
    for node in editor.graph.nodes:
        if node.op not in ("call_function", "call_method") or not _computes_tensors(node):
            continue
        rule = RULES.get(op_name(node))
        form = (rule and rule(node, editor)) or general_form(node)
        if form is None:
            continue
        node.op, node.target = "call_function", form.target
        node.args, node.kwargs = form.args, form.kwargs


def _computes_tensors(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Tensor) for item in value)
    )


def _is_constant(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and _number_of(node) is not None


def _constant_of(node: fx.Node) -> Any:
    return _number_of(node) if _is_constant(node) else node


def _number_of(node: fx.Node) -> bool | int | float | None:
    value = node.meta.get("example_value")
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return constant_of(value)
    return value if isinstance(value, CONSTANT) else None
