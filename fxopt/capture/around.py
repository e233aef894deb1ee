"""Which modules stand around a model's blocks, before them and after."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import fx, nn

from fxopt.capture.modules import walk
from fxopt.capture.tail import Tail
from fxopt.graph.view import modules_of


def find_around(model: nn.Module, blocks: frozenset[nn.Module]) -> tuple[nn.Module, ...]:
    """Return the modules below `model` that hold blocks somewhere inside and are none themselves."""
    return tuple(
        module
        for module in walk(model, but=blocks)
        if module is not model and not blocks.isdisjoint(walk(module))
    )


def find_trunk_modules(model: nn.Module, tail: Tail) -> frozenset[nn.Module]:
    """Return the modules whose calls the captured model holds before its last block, and `tail` does not."""
    captured = tail.calls[-1].graph.nodes
    trunk = itertools.takewhile(lambda node: node is not tail.calls[-1], captured)
    named = {path: module for module, path in walk(model).items()}
    paths = _modules_called(trunk) - _modules_called(tail.graph.graph.nodes)
    return frozenset(named[path] for path in paths if path in named)


def _modules_called(nodes: Iterable[fx.Node]) -> set[str]:
    """Return the paths of the modules that compute `nodes`; a placeholder stands where it was first read."""
    return {path for node in nodes if node.op != "placeholder" for path in modules_of(node)}


def find_tail_modules(
    model: nn.Module, blocks: frozenset[nn.Module], tail: fx.GraphModule
) -> tuple[nn.Module, ...]:
    """Return the modules whose calls the tail holds, in their order, `model` itself and its blocks left out."""
    named = {path: module for module, path in walk(model, but=blocks).items() if path}
    called = (node for node in tail.graph.nodes if node.op != "placeholder")
    paths = dict.fromkeys(path for node in called for path in modules_of(node))
    return tuple(named[path] for path in paths if path in named)
