"""Carry a choice out: tags that torch's own partitioners obey, on every forward value that backward needs."""

from __future__ import annotations

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fxopt.remat.joint import Joint
from fxopt.remat.menu import Choice

TAG = "recompute"
REGION = "ac_graph_id"
"""Torch reads the number of a checkpointed region there: one region, so that nothing is saved between two."""
OFFLOAD = "offload"
"""Where the meta of a saved value says that it waits in the host's memory; capture reads it in the forward graph."""


def apply_choice(graph: fx.Graph, joint: Joint, choice: Choice) -> None:
    """Tag the nodes of `graph`: what `choice` saves, on the device or the host, and what it computes again.

    A node that stands for a saved one is not computed at all: backward reads that other one.
    """
    for place, node in enumerate(joint.forward):
        node.meta.pop(TAG, None)
        node.meta.pop(REGION, None)
        node.meta.pop(OFFLOAD, None)
        if place in choice.offloaded:
            node.meta[OFFLOAD] = True
        first = joint.dag.values[place].stands_for
        if first is not None and first in choice.saved:
            node.replace_all_uses_with(joint.forward[first])
        elif place in choice.saved and node.op == "call_function":
            node.meta[TAG] = CheckpointPolicy.MUST_SAVE
        elif place in choice.recomputed:
            node.meta[TAG] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta[REGION] = 0
    graph.eliminate_dead_code()
