"""How a pattern's examples become canonical graphs, and are run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

with contextlib.suppress(ImportError):
    import bitsandbytes  # its ops are what some examples are spelled in  # noqa: F401
from torch import fx

from fxopt.graph.canonicalize import canonicalize
from fxopt.graph.verify import note_placeholders

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


MOST_EPS, MOST_EPS_FLOAT32 = 4, 16
"""By how many eps of a graph's coarsest dtype rewritten and stock values may differ, as a ratio of norms.

Measured on a CPU over all examples, mutations and tiny models: 1.9 in bf16 (392 values) and 0.4 in fp16, where the
rewritten graph rounds less often; 4.0 in fp32 (47 values), where both sum the same terms in another order.
"""


def relative_error(value: torch.Tensor, stock: torch.Tensor) -> float:
    norm = torch.linalg.vector_norm(stock.double())
    return (torch.linalg.vector_norm(value.double() - stock.double()) / (norm or 1)).item()


class Captured:
    """One function as Dynamo captures it: the graph, and the values of its placeholders."""

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Any],
        kwargs: dict[str, Any],
        dynamic: bool | None,
    ) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.inputs: list[Any] = []
        torch._dynamo.reset()
        compiled: Any = torch.compile(function, backend=self._remember, fullgraph=True, dynamic=dynamic)
        compiled(*inputs, **kwargs)
        (self.stock,) = self.graphs

    def _remember(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)

        def run(*args: Any) -> Any:
            self.inputs = list(args)
            return gm.forward(*args)

        return run

    def canonical(self) -> fx.GraphModule:
        """Return a canonical copy of the graph."""
        gm = fx.GraphModule(self.stock, copy_graph(self.stock.graph))
        note_placeholders(gm)
        canonicalize(gm)
        return gm

    def check_equal(self, gm: fx.GraphModule) -> None:
        """Check that `gm` equals the stock graph, up to a few roundings, in all outputs and all gradients."""
        values = [node.meta.get("example_value") for node in self.stock.graph.nodes]
        floats = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
        eps = max(torch.finfo(value.dtype).eps for value in floats)
        (outputs, gradients), (new_outputs, new_gradients) = self.run(self.stock), self.run(gm)
        for stock, new in zip((*outputs, *gradients), (*new_outputs, *new_gradients), strict=True):
            assert new.dtype == stock.dtype
            assert new.shape == stock.shape
            error = relative_error(new, stock)
            most = MOST_EPS_FLOAT32 if eps <= torch.finfo(torch.float32).eps else MOST_EPS
            assert error <= most * eps, f"{error / eps:.2f} eps, expected at most {most}"

    def run(self, gm: fx.GraphModule) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the float outputs of `gm` and the gradients of its inputs, under a fixed gradient."""
        leaves = [
            value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
            for value in self.inputs
        ]
        outputs = [out for out in gm(*leaves) if isinstance(out, torch.Tensor) and out.is_floating_point()]
        wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        roots = [out for out in outputs if out.requires_grad]
        torch.manual_seed(1)
        seeds = [torch.randn(out.shape, device=out.device).to(out.dtype) for out in roots]
        gradients = torch.autograd.grad(roots, wanted, seeds, allow_unused=True) if wanted and roots else ()
        found = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=True)]
        return [out.detach() for out in outputs], found


def copy_graph(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    for new, old in zip(copied.nodes, graph.nodes, strict=True):
        new.meta = copy.copy(old.meta)
        new.name = old.name
    return copied


@pytest.fixture
def capture() -> Callable[..., Captured]:
    def run(
        function: Callable[..., Any], inputs: Sequence[Any], *, dynamic: bool | None = False, **kwargs: Any
    ) -> Captured:
        return Captured(function, inputs, kwargs, dynamic)

    return run
