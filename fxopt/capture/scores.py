"""Whether a model returns the scores of a vocabulary and no loss: whoever trains it computes that outside."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx, nn

from fxopt.graph.names import op_name


def find_outside_loss(tail: fx.GraphModule, model: nn.Module) -> str:
    """Return a note where `tail` returns scores of as many classes as a table of `model` has rows, and no loss, or "".

    Scores come from one projection to that many values. A loss is one number that carries gradients.
    """
    output = next(iter(reversed(tail.graph.nodes)))
    returned = [node for node in output.all_input_nodes if _carries_gradients(node)]
    rows = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    if any(_shape(node) == () for node in returned):
        return ""
    scores = [node for node in returned if _has_classes(node, rows) and _is_projected(node, rows)]
    if not scores:
        return ""
    return (
        f"training calls return scores of {_shape(scores[0])[-1]} classes and no loss: it is computed outside, "
        "and all scores are built at every step; a loss that the model computes, from labels it is given, needs none"
    )


def _carries_gradients(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["example_value"].shape)


def _has_classes(node: fx.Node, rows: Collection[int]) -> bool:
    """Return whether the last size of a value is one of `rows`; a size that changes is none."""
    last = (_shape(node) or (0,))[-1]
    return type(last) is int and last in rows


def _is_projected(node: fx.Node, rows: Collection[int]) -> bool:
    """Return whether a linear layer of as many classes as one of `rows` is among what `node` is computed from."""
    queue, seen = [node], {node}
    while queue:
        current = queue.pop()
        if op_name(current) == "linear" and _has_classes(current, rows):
            return True
        queue += [source for source in current.all_input_nodes if source not in seen]
        seen.update(current.all_input_nodes)
    return False
