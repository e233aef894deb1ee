"""One short name for each way of calling an op of torch: method, function, operator or attribute."""

from __future__ import annotations

import builtins
import functools
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.graph.torch_private import NN_FUNCTIONS

# Later ones win.
NAMESPACES = (torch.Tensor, torch.special, torch.linalg, torch, NN_FUNCTIONS, F)
OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "pos", "abs", "getitem"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "invert", "not_"),
    *("iadd", "isub", "imul", "itruediv", "ipow", "imatmul", "ifloordiv", "iand", "ior", "setitem"),
)
DUNDERS = {f"__{name.rstrip('_')}__": name.rstrip("_") for name in OPERATORS}
"""How Dynamo captures some operators under a mode that overrides torch's functions: as the tensor's own methods."""
ATTRIBUTES = {
    "T": torch.ops.aten.numpy_T,
    "mT": torch.ops.aten.mT,
    "H": torch.ops.aten.matrix_H,
    "mH": torch.ops.aten.mH,
}
"""What torch from 2.14 on captures in place of reading these attributes of a tensor."""
ALIASES = {
    "absolute": "abs",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "expit": "sigmoid",
    "greater": "gt",
    "greater_equal": "ge",
    "itruediv": "idiv",
    "less": "lt",
    "less_equal": "le",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "true_divide": "div",
    "truediv": "div",
}


def op_name(node: fx.Node) -> str:
    """Return the short name of the op that `node` calls, the same for all spellings; "" if not torch's.

    In-place forms keep their mark: "add_" for the method, "iadd" for the operator. A tensor attribute
    (`x.T`) is named "getattr", or like itself where it was captured as an op.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> op_name(graph.call_method("multiply", (x, x))), op_name(graph.call_function(operator.mul, (x, x)))
    ('mul', 'mul')
    """
    if node.op == "call_method":
        name = DUNDERS.get(str(node.target), str(node.target))
    elif node.op == "call_function":
        name = _names().get(node.target, "")
    else:
        return ""
    return ALIASES.get(name, name)


@functools.cache
def _names() -> dict[Any, str]:
    names: dict[Any, str] = {builtins.getattr: "getattr"}
    for namespace in NAMESPACES:
        for name in dir(namespace):
            if not name.startswith("__"):
                function = getattr(namespace, name, None)
                if (
                    callable(function)
                    and not isinstance(function, type)
                    and not _is_a_tensors(names, function, name)
                ):
                    names[function] = name
    methods = {getattr(torch.Tensor, dunder, None): name for dunder, name in DUNDERS.items()}
    names.update({method: name for method, name in methods.items() if callable(method)})
    names.update({op: name for name, op in ATTRIBUTES.items()})
    # Operators are named without the underscore that Python's keywords force on them.
    names.update({getattr(operator, name): name.rstrip("_") for name in OPERATORS})
    return names


def _is_a_tensors(names: Mapping[Any, str], function: Any, name: str) -> bool:
    """Return whether `function` has a name already under which tensors have it, other than by `name`: mm, not spmm."""
    return hasattr(torch.Tensor, names.get(function, "")) and not hasattr(torch.Tensor, name)
