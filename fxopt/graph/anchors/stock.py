"""How the search for sites reads a stock graph: ops by short name in any spelling, and what they read.

Only that search uses it. The canonicalizer knows the same spellings on its own, so that a gap of the one
is not a gap of the other.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxopt.graph.torch_private import NN_FUNCTIONS, REGISTERED, expression_of, registered_name

NAMESPACES = (torch, torch.Tensor, torch.special, torch.linalg, NN_FUNCTIONS, F)
RENAMED = {
    **dict.fromkeys(("truediv", "true_divide", "divide", "idiv", "itruediv"), "div"),
    **dict.fromkeys(("multiply", "imul"), "mul"),
    **dict.fromkeys(("subtract", "isub"), "sub"),
    "iadd": "add",
    "ipow": "pow",
    "expit": "sigmoid",
    "concat": "cat",
    "concatenate": "cat",
    **dict.fromkeys(("linalg_vector_norm", "vector_norm", "linalg_norm"), "norm"),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "einsum", "imatmul"), "matmul"),
    **dict.fromkeys(("clip", "clamp_min", "clamp_max", "maximum", "minimum"), "clamp"),
    **dict.fromkeys(("numpy_T", "mT", "matrix_H", "mH"), "transpose"),
    **dict.fromkeys(("float", "half", "bfloat16", "double", "int", "long", "type", "type_as"), "to"),
}
SCALING = frozenset({"add", "sub", "mul", "div", "neg"})
ROUNDING = frozenset({"to", "clone", "contiguous", "clamp", "dropout", "alpha_dropout", "detach"})
MOVING = frozenset(
    {
        *("getitem", "chunk", "split", "unbind", "view", "reshape", "flatten", "unflatten", "view_as"),
        *("squeeze", "unsqueeze", "transpose", "permute", "t", "getattr", "narrow", "select"),
        *("index_select", "movedim", "swapaxes", "reshape_as", "split_with_sizes", "tensor_split", "slice"),
        *("expand", "index_add", "gather", "masked_fill"),
    }
)
RESHAPING = frozenset(
    {
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "view_as",
        "squeeze",
        "unsqueeze",
        "transpose",
        "permute",
        "t",
    }
)
ACTIVATIONS = frozenset(
    {
        *("silu", "gelu", "relu", "sigmoid", "tanh", "erf", "relu6", "elu", "mish", "softplus"),
        *("leaky_relu", "hardswish", "hardsigmoid", "celu", "selu", "logsigmoid", "glu"),
    }
)
POINTWISE = frozenset({"pow", "square", "abs", "sqrt", "reciprocal", *SCALING, *ROUNDING, *ACTIVATIONS})
PRODUCTS = frozenset({"linear", "matmul", "grouped_mm", "scaled_mm", "autograd_function_apply", "bilinear"})
LOSSES = frozenset({"cross_entropy", "nll_loss"})
MAX_DEPTH = 64
MAX_CHAIN = 5
"""Casts, moves and the like that may stand between two ops that belong together."""


def stock_name(node: Any) -> str:
    """Return a name for the op of `node` without the marks of operator, method and in-place form."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    if node.op == "call_method":
        name = str(node.target)
    else:
        name = str(getattr(node.target, "__name__", "") or registered_name(node.target))
        if not _is_torch(node.target, name):
            return ""
    name = name.strip("_")
    return RENAMED.get(name, name)


def _is_torch(target: Any, name: str) -> bool:
    if getattr(operator, name, None) is target or name == "getattr":
        return True
    registered = registered_name(target)
    if "::" in registered:
        return registered.partition("::")[0] in ("aten", "prims")  # any other namespace is a library's own
    if any(getattr(namespace, name, None) is target for namespace in NAMESPACES):
        return True
    module = str(getattr(target, "__module__", ""))
    return module == "torch" or module.startswith("torch.") or isinstance(target, REGISTERED)


def tensors_read(node: fx.Node) -> list[fx.Node]:
    """Return the tensor nodes that `node` reads, repeated ones repeated."""
    found: list[fx.Node] = []

    def visit(item: fx.Node) -> fx.Node:
        if isinstance(item.meta.get("example_value"), Tensor):
            found.append(item)
        return item

    fx.map_arg((node.args, node.kwargs), visit)
    return found


def dims_reduced(node: fx.Node) -> tuple[int, ...]:
    """Return the dims that a mean, sum, variance, deviation or norm reduces; () where it tells none."""
    name = stock_name(node)
    place = 2 if name in ("norm", "normalize") else 1
    usual = 1 if name == "normalize" else None
    dim = node.kwargs.get(
        "dim", node.kwargs.get("axis", node.args[place] if len(node.args) > place else usual)
    )
    given = dim if isinstance(dim, list | tuple) else (dim,)
    return tuple(item for item in given if isinstance(item, int) and not isinstance(item, bool))


def number_of(item: Any) -> float | None:
    """Return `item`, or the value of a node, as a number; None if it is none that is fixed."""
    if isinstance(item, fx.Node):
        item = item.meta.get("example_value")
    return float(item) if isinstance(item, int | float) else None


def is_scalar(node: fx.Node) -> bool:
    """Return whether a tensor node holds one item and no dims that matter."""
    value = node.meta["example_value"]
    return value.dim() == 0 or (value.dim() == 1 and value.shape[0] == 1)


def is_given(node: fx.Node) -> bool:
    """Return whether a value was given to the graph, as weights are, through moves and casts."""
    for _ in range(MAX_DEPTH):
        if node.op in ("placeholder", "get_attr"):
            return True
        operands = tensors_read(node)
        if stock_name(node) not in MOVING | ROUNDING or not operands:
            return False
        node = operands[0]
    return False


def is_projection(node: fx.Node) -> bool:
    """Return whether `node` multiplies by a weight; a product of computed values (attention) does not."""
    if stock_name(node) == "matmul":
        return any(is_given(item) for item in tensors_read(node))
    return stock_name(node) in PRODUCTS or _is_foreign_product(node)


def _is_foreign_product(node: fx.Node) -> bool:
    """Return whether `node` is an op from outside torch that reads two tensors of two dims or more."""
    if node.op != "call_function" or stock_name(node):
        return False
    matrices = [item for item in tensors_read(node) if item.meta["example_value"].dim() >= 2]
    return len(matrices) >= 2


def dividend_and_divisor(node: fx.Node) -> tuple[Any, Any]:
    """Return what `node` divides and by what, None twice where it is no division."""
    if stock_name(node) != "div":
        return None, None
    dividend = node.args[0] if node.args else node.kwargs.get("input")
    return dividend, node.args[1] if len(node.args) > 1 else node.kwargs.get("other")


def users_through(node: fx.Node, names: frozenset[str]) -> list[fx.Node]:
    """Return the users of `node`, and those behind a few of `names` that read nothing else."""
    found: list[fx.Node] = []
    front = [node]
    for _ in range(MAX_CHAIN):
        users = [user for item in front for user in item.users]
        found.extend(users)
        front = [user for user in users if stock_name(user) in names and len(tensors_read(user)) == 1]
    return found


def is_weight(node: fx.Node) -> bool:
    """Return whether `node` is a parameter, trained or frozen, in any dtype."""
    weight = unrounded(node)
    value = weight.meta["example_value"]
    return isinstance(value, nn.Parameter) and not is_scalar(weight) and value.dim() <= 2


def unrounded(node: fx.Node) -> fx.Node:
    """Return what `node` is before casts."""
    while stock_name(node) in ROUNDING and tensors_read(node):
        node = tensors_read(node)[0]
    return node


def are_equal(a: Any, b: Any) -> bool:
    """Return whether two sizes are known to be equal."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return expression_of(a) == expression_of(b)
    return isinstance(a, int) and isinstance(b, int) and a == b
