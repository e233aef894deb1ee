"""The strides of dims of one item, which torch's stand-ins take for others than its kernels do where they reshape.

They decide which memory format an op gives its result, and with it the order in which dropout behind it draws.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxopt.graph import vocabulary
from fxopt.graph.names import op_name
from fxopt.graph.purity import is_active_dropout
from fxopt.graph.sizes import EXAMPLE

RESHAPES = frozenset({"reshape", "view"})
RANDOM = frozenset({"alpha_dropout", "bernoulli", "bernoulli_", "rand_like", "randn_like"})


def spell_unit_dims(gm: fx.GraphModule) -> None:
    """Spell each reshape of `gm` whose stand-in has other strides than its result will: unit dims come in one by one.

    Of those steps stand-ins and kernels make the same. Nothing is done where `gm` draws no random numbers (`RANDOM`,
    active dropout), nor for sizes that change.
    """
    if not any(map(_draws, gm.graph.nodes)):
        return
    is_changed = False
    for node in list(gm.graph.nodes):
        if (node.target is vocabulary.reshape or op_name(node) in RESHAPES) and _is_misjudged(node):
            _spell(gm.graph, node)
            is_changed = True
    if is_changed:
        gm.recompile()


def _draws(node: fx.Node) -> bool:
    name = op_name(node)
    return is_active_dropout(node) if name == "dropout" else name in RANDOM


def _is_misjudged(node: fx.Node) -> bool:
    """Return whether the stand-in of a reshape has other strides than its result, and its spelling has those."""
    source: Any = node.all_input_nodes[0].meta.get(EXAMPLE)
    example: Any = node.meta.get(EXAMPLE)
    if not isinstance(source, Tensor) or not isinstance(example, Tensor) or 1 not in example.shape:
        return False
    if any(isinstance(size, torch.SymInt) for size in (*source.shape, *source.stride(), *example.shape)):
        return False
    if source.dtype != example.dtype or source.numel() != example.numel():
        return False
    form = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")
    strides = form.reshape(example.shape).stride()
    spelled = form.reshape(_without_units(example.shape))
    for dim in _unit_dims(example.shape):
        spelled = spelled.unsqueeze(dim)
    return strides != example.stride() and strides == spelled.stride()


def _without_units(shape: torch.Size) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _unit_dims(shape: torch.Size) -> tuple[int, ...]:
    """Return where the dims of one item come in, the last one first."""
    return tuple(len(_without_units(shape[:dim])) for dim in reversed(range(len(shape))) if shape[dim] == 1)


def _spell(graph: fx.Graph, node: fx.Node) -> None:
    source, shape = node.all_input_nodes[0], node.meta[EXAMPLE].shape
    with graph.inserting_before(node):
        made = _call(graph, node, torch.reshape, source, _without_units(shape))
        for dim in _unit_dims(shape):
            made = _call(graph, node, torch.unsqueeze, made, dim)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _call(graph: fx.Graph, spelled: fx.Node, function: Any, source: fx.Node, how: Any) -> fx.Node:
    made = graph.call_function(function, (source, how))
    made.meta = {**spelled.meta, EXAMPLE: function(source.meta[EXAMPLE], how)}
    return made
