"""How a rewritten graph differs from the stock one: both run forward and backward on the same inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

MOST_EPS, MOST_EPS_FLOAT32 = 4, 16
"""By how many epsilons of a graph's coarsest dtype rewritten and stock values may differ, as a ratio of norms: what
the library's own patterns are held to, where 1.9 in bfloat16 and 4.0 in float32 were measured at most."""


def run_both_ways(gm: fx.GraphModule, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the outputs of `gm` and the gradients of its inputs, under fixed gradients of the outputs."""
    leaves = [value.detach().clone().requires_grad_(value.requires_grad) for value in values]
    found = fx.Interpreter(gm).run(*leaves)
    outputs = [
        out
        for out in (found if isinstance(found, tuple | list) else (found,))
        if isinstance(out, torch.Tensor)
    ]
    roots = [out for out in outputs if out.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in roots]
    gradients = torch.autograd.grad(roots, wanted, seeds, allow_unused=True) if roots and wanted else ()
    filled = [
        torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=bool(gradients))
    ]
    return [*(out.detach() for out in outputs), *filled]


def find_difference(stock: fx.GraphModule, gm: fx.GraphModule, values: Sequence[torch.Tensor]) -> str:
    """Return how `gm` differs from `stock` on these inputs, "" where it does not."""
    examples = (node.meta.get("example_value") for node in stock.graph.nodes)
    floats = (v for v in examples if isinstance(v, torch.Tensor) and v.is_floating_point())
    eps = max((torch.finfo(value.dtype).eps for value in floats), default=0.0)
    allowed = eps * (MOST_EPS_FLOAT32 if eps <= torch.finfo(torch.float32).eps else MOST_EPS)
    before, after = run_both_ways(stock, values), run_both_ways(gm, values)
    if len(before) != len(after):
        return f"expected {len(before)} values, got {len(after)}"
    for place, (old, new) in enumerate(zip(before, after, strict=True)):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            return f"value {place}: expected {old.dtype}{list(old.shape)}, got {new.dtype}{list(new.shape)}"
        if not old.is_floating_point():
            if not torch.equal(old, new):
                return f"value {place} differs"
            continue
        wide, other = old.double().nan_to_num(), new.double().nan_to_num()
        error = ((wide - other).norm() / wide.norm().clamp_min(1e-30)).item()
        if not error <= allowed:
            return f"value {place} is off by {error:.1e}, expected at most {allowed:.1e}"
    return ""
