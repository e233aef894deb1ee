"""Which nodes may be dropped or merged: only what is known to be without effect, memory and chance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxopt.graph import vocabulary
from fxopt.graph.names import op_name

PURE = frozenset(
    {
        # pointwise
        *("add", "sub", "mul", "div", "neg", "pow", "sqrt", "rsqrt", "reciprocal", "exp", "expm1", "exp2"),
        *("log", "log1p", "log2", "tanh", "erf", "sigmoid", "abs", "sign", "square", "cos", "sin", "floor"),
        *("ceil", "round", "relu", "silu", "gelu", "softplus", "elu", "mish", "hardswish", "leaky_relu"),
        *("logsigmoid", "relu6", "clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "where"),
        *("masked_fill", "lerp", "addcmul", "addcdiv", "fmod", "remainder", "floor_divide", "floordiv"),
        *("mod", "rsub", "atan2", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "invert", "not"),
        *("pos", "logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not"),
        *("isnan", "isinf"),
        # dtype and layout
        *("to", "float", "half", "bfloat16", "double", "int", "long", "bool", "type", "type_as"),
        *("contiguous", "view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "expand"),
        *("expand_as", "repeat", "transpose", "permute", "t", "unsqueeze", "squeeze", "movedim", "getitem"),
        *("narrow", "select", "roll", "cat", "stack", "chunk", "split", "unbind", "flip", "pad"),
        *("repeat_interleave", "broadcast_to", "tile", "clone", "detach", "tril", "triu", "diagonal"),
        *("view_as_complex", "view_as_real", "real", "imag"),
        # reductions and products
        *("mean", "sum", "var", "std", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all"),
        *("norm", "vector_norm", "linalg_vector_norm", "prod", "cumsum", "cumprod", "logsumexp", "softmax"),
        *("log_softmax", "topk", "sort", "argsort", "gather", "index_select", "take_along_dim", "one_hot"),
        *("diff", "numel", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "outer"),
        *("conv1d", "cross_entropy", "nll_loss", "rms_norm", "layer_norm", "normalize", "group_norm"),
        *("cosine_similarity", "mse_loss"),
        # factories
        *("arange", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros"),
        *("new_ones", "new_full", "scalar_tensor", "eye", "linspace", "polar", "size", "dim", "finfo"),
    }
)
TENSOR_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "shape", "dtype", "device", "ndim", "is_cuda"})
WRITING = frozenset({"batch_norm", "instance_norm", "embedding", "embedding_bag", "rrelu"})
"""Ops that may write to an argument though their name does not say so."""
RANDOM = frozenset({"scaled_dot_product_attention"})
"""Canonical ops that draw random numbers if an argument says so."""
CANONICAL = frozenset(op.target for op in vocabulary.OPS)
INPLACE_OPERATORS = frozenset({"iadd", "isub", "imul", "idiv", "ipow", "imatmul", "ifloordiv", "iand", "ior"})
MODE_SWITCHES = frozenset(
    {
        torch.amp.autocast_mode._enter_autocast,
        torch.amp.autocast_mode._exit_autocast,
        torch._C._set_grad_enabled,
    }
)
"""Nodes that change how all later nodes run."""

# Where the flag stands that makes an op write into its input.
INPLACE_POSITION = {"relu": 1, "silu": 1, "elu": 2, "leaky_relu": 2, "hardswish": 1, "relu6": 1, "mish": 1}
INPLACE_POSITION |= {"dropout": 3}
MAX_NORM_POSITION = 3
DROPOUT_POSITION = 4


def is_pure(node: fx.Node) -> bool:
    """Return whether `node` only computes a value from its arguments, always the same one.

    A pure node may be removed when nothing reads it, and merged with an equal one. What is not known to
    be pure counts as impure: in-place ops, random ops, mode switches, custom and higher-order ops.
    """
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method") or "out" in node.kwargs or is_inplace(node):
        return False
    name = op_name(node)
    if node.op == "call_function" and node.target in CANONICAL and name not in RANDOM:
        return True
    match name:
        case "dropout":
            return not is_active_dropout(node)
        case "embedding":
            return _argument(node, MAX_NORM_POSITION, "max_norm") is None
        case "scaled_dot_product_attention":
            return _argument(node, DROPOUT_POSITION, "dropout_p", 0.0) == 0.0
        case "getattr":
            return len(node.args) == 2 and node.args[1] in TENSOR_ATTRIBUTES
        case _:
            return name in PURE


def is_inplace(node: fx.Node) -> bool:
    """Return whether `node` is known to write into its first argument."""
    name = op_name(node)
    if name == "setitem" or _is_inplace_name(name):
        return True
    if name in INPLACE_OPERATORS:
        first = node.args[0]
        return not isinstance(first, fx.Node) or isinstance(first.meta.get("example_value"), Tensor)
    position = INPLACE_POSITION.get(name)
    return position is not None and _argument(node, position, "inplace", False) is not False


def is_active_dropout(node: fx.Node) -> bool:
    """Return whether a dropout node draws random numbers: its p is not 0 and it is training.

    `torch.dropout` takes both without default; the functional form defaults to 0.5 and True.
    """
    p, training = (
        _argument(node, 1, "p", 0.5),
        _argument(node, 2, "training", _argument(node, 2, "train", True)),
    )
    return p != 0 and training is not False


def mutated_inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the nodes whose storage `node` may write to; all its inputs where that is not known.

    Torch's own functions write only where their name ends in "_", where asked by `inplace` or `out`, and in
    a few exceptions; custom ops say so in their schema; higher-order ops write where their bodies do.
    """
    if node.op not in ("call_function", "call_method") or node.target in MODE_SWITCHES or is_pure(node):
        return ()
    if is_inplace(node):
        first = node.args[0] if node.args else node.kwargs.get("input")
        return (first,) if isinstance(first, fx.Node) else ()
    name = op_name(node)
    is_functional = (
        bool(name) and name not in WRITING and "out" not in node.kwargs and not name.endswith("__")
    )
    if is_functional or _says_it_writes_nothing(node):
        return ()
    return tuple(node.all_input_nodes)


def _says_it_writes_nothing(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        return not any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if isinstance(target, torch._ops.HigherOrderOperator):
        owner = node.graph.owning_module
        held = [getattr(owner, str(i.target), None) for i in node.all_input_nodes if i.op == "get_attr"]
        bodies = [body for body in held if isinstance(body, fx.GraphModule)]
        return bool(bodies) and not any(mutated_inputs(item) for body in bodies for item in body.graph.nodes)
    return False


def _is_inplace_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default
