"""The sites of a stock graph: every known form, found by its arithmetic before anything is rewritten.

Nothing here is shared with the canonicalizer or the matcher: what they miss must show as a site that nobody
took. Each spelling is therefore known here once more, by name only.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from fxopt.graph.anchors.activations import activation_kind
from fxopt.graph.anchors.adapters import adapter_kind, four_bit_kind
from fxopt.graph.anchors.attention import attention_kind
from fxopt.graph.anchors.experts import experts_kind
from fxopt.graph.anchors.gates import Gates
from fxopt.graph.anchors.layer_norms import layer_norm_kind
from fxopt.graph.anchors.losses import loss_form, loss_kind
from fxopt.graph.anchors.norms import norm_kind
from fxopt.graph.anchors.rotations import rope_kind
from fxopt.graph.anchors.routers import route_kind
from fxopt.graph.view import find_subgraphs, location_of, module_of


@dataclasses.dataclass(frozen=True)
class Anchor:
    """One site: `node` is its stock name, "body/name" in the body of a higher-order op.

    `form` says how it is spelt where the op of `node` alone does not tell.
    """

    kind: str
    node: str
    module: str
    location: str
    form: str = ""


KINDS = frozenset(
    {
        "rms_norm",
        "layer_norm",
        "rope",
        "attention",
        "glu",
        "activation",
        "cross_entropy",
        "linear_cross_entropy",
        "lora_linear",
        "dequantize_4bit",
        "experts",
        "route",
    }
)
"""Every kind of site that the search knows."""


def find_anchors(gm: fx.GraphModule) -> tuple[Anchor, ...]:
    """Return every site of the stock graph `gm` and of the bodies of its higher-order ops, in graph order.

    Kinds are "rms_norm" (a reciprocal root of a mean of squares), "layer_norm" (that of a value less its mean,
    with a bias after it, or torch's own), "rope" (a tensor whose items are turned in pairs), "attention"
    (torch's own, alone or with its projections, or the softmax of a product of two values that weighs a third),
    "glu" (an activation times another value, both from linear projections), "activation" (one between two
    projections, without a gate),
    "lora_linear" (a product of low rank added to a projection), "dequantize_4bit" (a product with a weight in four
    bits), "experts" (a sum of rows multiplied by matrices from a stack), "route" (the choice of which), and
    "cross_entropy", "linear_cross_entropy" where its logits come straight from one linear layer.
    """
    anchors: list[Anchor] = []
    for prefix, part in find_subgraphs(gm):
        gates = Gates()
        for node in part.graph.nodes:
            kind = (
                layer_norm_kind(node)
                or norm_kind(node)
                or loss_kind(node)
                or attention_kind(node)
                or gates.kind(node)
                or activation_kind(node, gates)
                or rope_kind(node)
                or adapter_kind(node)
                or four_bit_kind(node)
                or experts_kind(node)
                or route_kind(node)
            )
            if kind:
                name = f"{prefix}{node.name}"
                anchors.append(Anchor(kind, name, module_of(node), location_of(node), loss_form(node)))
    return tuple(anchors)
