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
RANDOM = frozenset({"bernoulli", "rand_like", "randn_like"})


def say_unit_strides(gm: fx.GraphModule) -> None:
    """Put behind each reshape of `gm` whose result will have other strides than its example a view that says which.

    Nothing is done where no random numbers are drawn, nor for sizes that change. The view changes nothing when it runs.
    """
    if not any(map(_draws, gm.graph.nodes)):
        return
    is_changed = False
    for node in list(gm.graph.nodes):
        is_reshape = node.target is vocabulary.reshape or op_name(node) in RESHAPES
        strides = _strides_seen(node) if is_reshape else None
        if strides is None:
            continue
        example = node.meta[EXAMPLE]
        readers = tuple(node.users)
        with gm.graph.inserting_after(node):
            said = gm.graph.call_function(torch.as_strided, (node, tuple(example.shape), strides))
        said.meta = {**node.meta, EXAMPLE: example.as_strided(example.shape, strides)}
        for reader in readers:
            reader.replace_input_with(node, said)
        is_changed = True
    if is_changed:
        gm.recompile()


def _draws(node: fx.Node) -> bool:
    name = op_name(node)
    return is_active_dropout(node) if name == "dropout" else name in RANDOM


def _strides_seen(node: fx.Node) -> tuple[int, ...] | None:
    """Return the strides that torch's kernels give the result of a reshape where its example has others, else None."""
    source: Any = node.all_input_nodes[0].meta.get(EXAMPLE)
    example: Any = node.meta.get(EXAMPLE)
    if not isinstance(source, Tensor) or not isinstance(example, Tensor) or 1 not in example.shape:
        return None
    if any(isinstance(size, torch.SymInt) for size in (*source.shape, *source.stride(), *example.shape)):
        return None
    form = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")
    strides = form.reshape(example.shape).stride()
    return None if strides == example.stride() else strides
