"""Layer norms in a stock graph: torch's own, and written out with a bias."""

from __future__ import annotations

from torch import fx

from fxopt.graph.anchors.norms import norm_kind
from fxopt.graph.anchors.stock import MAX_DEPTH, ROUNDING, SCALING, is_scalar, stock_name, tensors_read

MOST_STEPS = (
    7  # from a deviation to the bias: a cast, + eps, the division, a cast, the weight, a cast, + bias
)


def layer_norm_kind(node: fx.Node) -> str:
    """Return "layer_norm" if `node` is a whole layer norm, or the root of one that adds a bias, else ""."""
    if stock_name(node) == "layer_norm":
        return "layer_norm"
    # Without a bias it is a centred root-mean-square norm.
    is_norm = norm_kind(node) == "rms_norm" and _is_of_centred(node) and _leads_to_bias(node)
    return "layer_norm" if is_norm else ""


def _is_of_centred(node: fx.Node) -> bool:
    """Return whether the mean of squares under a root is that of a value less its mean."""
    for _ in range(MAX_DEPTH):
        name, operands = stock_name(node), tensors_read(node)
        if name in ("var", "std"):
            return True
        if name == "sub" and len(operands) == 2:
            return _is_mean(operands[1])
        large = [item for item in dict.fromkeys(operands) if not is_scalar(item)]
        if (
            name not in SCALING | ROUNDING | {"rsqrt", "sqrt", "pow", "square", "mean", "sum"}
            or len(large) != 1
        ):
            return False
        node = large[0]
    return False


def _is_mean(node: fx.Node) -> bool:
    while stock_name(node) in ROUNDING and tensors_read(node):
        node = tensors_read(node)[0]
    return stock_name(node) == "mean"


def _leads_to_bias(node: fx.Node) -> bool:
    """Return whether a vector is added to what `node` scales."""
    front = [node]
    for _ in range(MOST_STEPS):
        users = dict.fromkeys(user for item in front for user in item.users)
        for user in users:
            others = [item for item in tensors_read(user) if item not in front]
            if stock_name(user) == "add" and len(others) == 1 and _is_vector(others[0]):
                return True
        front = [
            user
            for user in users
            if stock_name(user) in ROUNDING | {"mul", "div", "reciprocal"}
            or (stock_name(user) == "add" and len(tensors_read(user)) == 1)
        ]
    return False


def _is_vector(node: fx.Node) -> bool:
    return node.meta["example_value"].dim() == 1 and not is_scalar(node)
