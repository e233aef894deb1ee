"""The kernels of a joint graph, compiled side by side while Inductor is still at work on what is around them.

Proofs run few rows, real calls many: an op may take another form for these, with kernels that nothing has compiled
yet. Each op of ours is run once, on memory of the sizes it will get, with its launches left out.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx

from fxopt.capture.joint_codes import is_ours
from fxopt.graph.sizes import make_seen, num_bytes_of
from fxopt.graph.torch_private import unset_fake_temporarily
from fxopt.kernels.launcher import compiled_ahead

log = logging.getLogger("fxopt")
MOST_BYTES = 4 * 2**30
"""Of an op's inputs; what has more (long contexts, stacks of experts) compiles at its first call."""


def compile_kernels(graph: fx.Graph) -> int:
    """Start compiling what the ops of ours in `graph` will launch on their GPU; return how many ops were run."""
    num_run = 0
    for node in graph.nodes:
        device = _device_of(node) if is_ours(node) else None
        if device is None or _num_bytes(node) > MOST_BYTES:
            continue
        try:
            with compiled_ahead(device) as is_needed:
                if not is_needed:
                    return num_run
                _run(node, device)
                num_run += 1
        except Exception as error:  # the first call will meet it again, and raise it where it can be seen
            log.debug("%s was not compiled ahead: %s: %s", node.target, type(error).__name__, error)
    return num_run


def _run(node: fx.Node, device: torch.device) -> None:
    target: Any = node.target
    with unset_fake_temporarily(), torch.no_grad(), torch.random.fork_rng([device.index or 0]):
        target(*fx.map_arg(node.args, _made), **fx.map_arg(node.kwargs, _made))


def _num_bytes(node: fx.Node) -> int:
    values = (item.meta.get("val") for item in node.all_input_nodes)
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    return sum(map(num_bytes_of, tensors))


def _device_of(node: fx.Node) -> torch.device | None:
    values = (item.meta.get("val") for item in node.all_input_nodes)
    return next((value.device for value in values if isinstance(value, torch.Tensor)), None)


def _made(node: fx.Node) -> Any:
    """Return a value of the form that `node` will have; whole numbers, which may be indices, are zero."""

    def make(value: torch.Tensor, sizes: list[int], strides: list[int]) -> torch.Tensor:
        made = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        return made if made.is_floating_point() else made.zero_()

    return make_seen(node.meta["val"], make)
