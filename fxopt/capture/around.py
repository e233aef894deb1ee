"""Which modules stand around a model's blocks, before them and after."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import fx, nn

from fxopt.capture.modules import modules_by_path, walk
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
    named = modules_by_path(model)
    before, after = _modules_called(named, trunk), _modules_called(named, tail.graph.graph.nodes)
    return frozenset(before) - frozenset(after)


def _modules_called(named: dict[str, nn.Module], nodes: Iterable[fx.Node]) -> tuple[nn.Module, ...]:
    """Return the modules that compute `nodes`, first called first, by whichever of their names they were called.

    A placeholder stands where it was first read.
    """
    computed = (node for node in nodes if node.op != "placeholder")
    paths = dict.fromkeys(path for node in computed for path in modules_of(node))
    return tuple(dict.fromkeys(named[path] for path in paths if path in named))


def find_tail_modules(
    model: nn.Module, blocks: frozenset[nn.Module], tail: fx.GraphModule
) -> tuple[nn.Module, ...]:
    """Return the modules whose calls the tail holds, in their order, `model` itself and its blocks left out."""
    around = walk(model, but=blocks)
    called = _modules_called(modules_by_path(model), tail.graph.nodes)
    return tuple(module for module in called if module in around and module is not model)
