"""The captured graph brought to its canonical form, with the same bits forward and backward."""

from __future__ import annotations

import torch
from torch import fx

from fxopt.graph.aliases import Aliases
from fxopt.graph.cse import merge_equal_nodes
from fxopt.graph.edit import Editor, note_modes
from fxopt.graph.equal_sizes import equate_sizes
from fxopt.graph.grouped import name_grouped_products
from fxopt.graph.identities import remove_identities, remove_returned_inputs
from fxopt.graph.idle_grads import remove_idle_detaches, remove_idle_grad_switches
from fxopt.graph.inplace import make_pure
from fxopt.graph.purity import is_pure
from fxopt.graph.quantized import unfold_quantized_products
from fxopt.graph.sizes import settle_sizes
from fxopt.graph.spelling import fold_constants, spell_out_sizes, unify_spelling
from fxopt.graph.switches import remove_idle_switches
from fxopt.graph.view import find_subgraphs


def canonicalize(gm: fx.GraphModule) -> None:
    """Rewrite `gm`, and the bodies of its higher-order ops, in place to the ops of `vocabulary`.

    Outputs and gradients keep every bit; of a product with a four-bit weight those of the decoded weight, with which
    a library's own kernels for few tokens sum in another order, and of an einsum those of the product of matrices that
    it is. Nodes whose spelling is not known, and impure ones, stay as they are. A node keeps its stock name, and
    `meta["origins"]` names the stock nodes it stands for.

    >>> import operator, torch
    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> x.meta["example_value"] = torch.ones(2)
    >>> y = graph.call_function(operator.add, (1, x))
    >>> y.meta["example_value"] = torch.ones(2)
    >>> _ = graph.output(y)
    >>> canonicalize(fx.GraphModule({}, graph))
    >>> y.target is torch.add, y.args
    (True, (x, 1))
    """
    # Dynamo guards the mode that a capture begins in, and calls its backend in that mode.
    entered_in = torch.is_grad_enabled()
    for prefix, part in find_subgraphs(gm):
        _canonicalize_graph(part, prefix)
        remove_idle_switches(part.graph, None if prefix else entered_in)
        part.recompile()


def _canonicalize_graph(gm: fx.GraphModule, prefix: str) -> None:
    graph = gm.graph
    settle_sizes(graph, equate_sizes(graph))
    fold_constants(graph)
    note_modes(graph)
    make_pure(graph)
    remove_idle_grad_switches(graph)
    editor = Editor(graph, Aliases(graph), prefix)
    unfold_quantized_products(gm, editor)
    name_grouped_products(editor)
    spell_out_sizes(editor)
    unify_spelling(editor)
    remove_idle_detaches(editor)
    remove_returned_inputs(editor)
    remove_identities(editor)
    merge_equal_nodes(editor)
    editor.finish()
    _erase_unread(graph)


def _erase_unread(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if not node.users and node.op != "get_attr" and is_pure(node):
            graph.erase_node(node)
