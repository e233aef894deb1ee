"""Graphs built by hand, with the example values that a capture would have left on their nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree


class Builder:
    """A graph under construction; `finish` returns it as a module."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> fx.Node:
        """Return a placeholder with a fake tensor as its example value."""
        node = self.graph.placeholder(name)
        with self.mode:
            is_float = dtype.is_floating_point
            value = torch.empty(shape, dtype=dtype, requires_grad=grad and is_float)
        node.meta["example_value"] = value
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Return a call whose example value is what `target` makes of those of its arguments."""
        node = self.graph.call_function(target, args, kwargs)
        values = pytree.tree_map_only(fx.Node, lambda n: n.meta.get("example_value"), (args, kwargs))
        with self.mode:
            node.meta["example_value"] = target(*values[0], **values[1])
        node.meta["origins"] = frozenset({node.name})
        return node

    def switch(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Return a node that changes how later nodes run; it is not run."""
        return self.graph.call_function(target, args)

    def norm(self, x: fx.Node, w: fx.Node, eps: float = 1e-6) -> fx.Node:
        """Return an RMS norm, op by op."""
        mean = self.call(torch.mean, self.call(torch.pow, x, exponent=2), dim=(-1,), keepdim=True)
        root = self.call(torch.rsqrt, self.call(torch.add, mean, eps))
        return self.call(torch.mul, w, self.call(torch.mul, x, root))

    def finish(self, *outputs: fx.Node) -> fx.GraphModule:
        """Return the module that computes `outputs`."""
        self.graph.output(outputs)
        self.graph.lint()
        return fx.GraphModule({}, self.graph)


@pytest.fixture
def builder() -> Builder:
    return Builder()
