"""From a rewritten graph to something that runs: Inductor on a GPU, node by node elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.capture import torch_lowering
from fxopt.capture.mutation import find_mutated_inputs
from fxopt.capture.planning import Mark
from fxopt.kernels import launch

Lowering = Callable[..., Callable[..., Any]]
"""Takes a graph and its example inputs, and by `mark` what tags the joint graph; returns what runs it."""


def choose_lowering(name: str, gm: fx.GraphModule) -> tuple[Lowering, str]:
    """Return the lowering called `name` for `gm`, and why it is another one, or "".

    "auto" is Inductor where the tensors are on a usable GPU, else node by node.
    """
    if name == "auto":
        name = "inductor" if is_on_gpu(gm) and launch.is_available() else "plain"
    if name == "plain":
        return torch_lowering.plain_backend, ""
    mutated = find_mutated_inputs(gm)
    if mutated:
        return torch_lowering.plain_backend, (
            f"a graph that writes to its input {mutated[0].name} runs node by node: Inductor's partitioner "
            "may recompute from the written value"
        )
    return torch_lowering.inductor_backend, ""


def name_of(lowering: Lowering) -> str:
    """Return what the options call a lowering that `choose_lowering` returned."""
    return "inductor" if lowering is torch_lowering.inductor_backend else "plain"


def has_fixed_sizes(example_inputs: list[Any]) -> bool:
    """Return whether a graph with these inputs serves one shape only."""
    return not any(isinstance(value, torch.SymInt) for value in example_inputs)


def is_on_gpu(gm: fx.GraphModule) -> bool:
    """Return whether a tensor that `gm` reads lies on a CUDA device."""
    return find_gpu(gm) is not None


def find_gpu(gm: fx.GraphModule) -> torch.device | None:
    """Return the CUDA device of a tensor that `gm` reads, or None."""
    values = (node.meta.get("example_value") for node in gm.graph.nodes if node.op == "placeholder")
    devices = (value.device for value in values if isinstance(value, torch.Tensor))
    return next((device for device in devices if device.type == "cuda"), None)


def run_uncompiled(
    gm: fx.GraphModule, example_inputs: list[Any], mark: Mark | None = None
) -> Callable[..., Any]:
    """Return `gm` as it is, for a single look at what the passes made of it."""
    return gm.forward
