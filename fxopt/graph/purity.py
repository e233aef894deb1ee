"""Which nodes may be dropped or merged: only what is known to be without effect, memory and chance."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.graph import vocabulary
from fxopt.graph.names import op_name
from fxopt.graph.storage import UNKNOWN, keys_of
from fxopt.graph.torch_private import (
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    GET_DATA,
    SET_GRAD,
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    schema_of,
)

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
        *(
            "T",
            "mT",
            "H",
            "mH",
            "narrow",
            "select",
            "roll",
            "cat",
            "stack",
            "chunk",
            "split",
            "unbind",
            "flip",
            "pad",
        ),
        *("repeat_interleave", "broadcast_to", "tile", "clone", "detach", "tril", "triu", "diagonal"),
        *("view_as_complex", "view_as_real", "real", "imag"),
        # reductions and products
        *("mean", "sum", "var", "std", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all"),
        *("norm", "vector_norm", "linalg_vector_norm", "prod", "cumsum", "cumprod", "logsumexp", "softmax"),
        *("log_softmax", "topk", "sort", "argsort", "gather", "scatter", "index_select", "take_along_dim"),
        *("one_hot", "diff", "numel", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "outer"),
        *("conv1d", "conv2d", "conv3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d"),
        *("adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate", "masked_scatter", "cross_entropy"),
        *("nll_loss", "rms_norm", "layer_norm", "normalize", "group_norm"),
        *("cosine_similarity", "mse_loss", "item"),
        # factories
        *("arange", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros"),
        *(
            "new_ones",
            "new_full",
            "scalar_tensor",
            "tensor",
            "eye",
            "linspace",
            "polar",
            "size",
            "dim",
            "finfo",
        ),
    }
)
PURE_OVERLOADS = frozenset(
    {torch.ops.aten.sym_size.int, torch.ops.aten.sym_stride.int, torch.ops.aten.sym_numel.default}
)
"""How Dynamo reads sizes that are not fixed."""
TENSOR_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "shape", "dtype", "device", "ndim", "is_cuda"})
WRITING = frozenset({"batch_norm", "instance_norm", "embedding", "embedding_bag", "rrelu"})
"""Ops that may write to an argument though their name does not say so."""
NORMS_OF_BATCHES = frozenset({torch.nn.functional.batch_norm, torch.nn.functional.instance_norm})
"""They write to their running statistics alone."""
WRITING_WIDELY = ("_fused_", "_amp_")
"""How the names of in-place ops begin that write into more than their first argument."""
RANDOM = frozenset({"scaled_dot_product_attention"})
"""Canonical ops that draw random numbers if an argument says so."""
CANONICAL = frozenset(op.target for op in vocabulary.OPS)
INPLACE_OPERATORS = frozenset({"iadd", "isub", "imul", "idiv", "ipow", "imatmul", "ifloordiv", "iand", "ior"})
MODE_SWITCHES = frozenset({ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD})
"""Nodes that change how all later nodes run."""

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
    if node.target in PURE_OVERLOADS:
        return True
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
    if not name:
        return False
    flag = _argument(node, _inplace_position(node.target), "inplace", False)
    return isinstance(flag, fx.Node) or bool(flag)


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

    What a rewrite put into the graph writes to nothing: its proof has seen its inputs unchanged.
    Torch's own functions write only where their name ends in "_", where asked by `inplace` or `out`, and in
    a few exceptions; custom ops say so in their schema; higher-order ops write where their bodies do.
    """
    if node.op not in ("call_function", "call_method") or node.target in MODE_SWITCHES or is_pure(node):
        return ()
    if "rewritten_by" in node.meta or node.target is GET_DATA:
        return ()
    if node.target in NORMS_OF_BATCHES:
        written = (_argument(node, 1, "running_mean"), _argument(node, 2, "running_var"))
        return _nodes_in(written)
    name = op_name(node)
    if is_inplace(node):
        if name.startswith(WRITING_WIDELY) or not (node.args or "input" in node.kwargs):
            return tuple(node.all_input_nodes)
        return _nodes_in(node.args[0] if node.args else node.kwargs["input"])
    is_functional = (
        bool(name) and name not in WRITING and "out" not in node.kwargs and not name.endswith("__")
    )
    if is_functional or _says_it_writes_nothing(node):
        return ()
    return _written_in_body(node) or tuple(node.all_input_nodes)


def _says_it_writes_nothing(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, OpOverload):
        return not schema_of(target).is_mutable
    if isinstance(target, OpOverloadPacket):
        return not any(schema_of(getattr(target, name)).is_mutable for name in target.overloads())
    if isinstance(target, HigherOrderOperator):
        owner = node.graph.owning_module
        held = [getattr(owner, str(i.target), None) for i in node.all_input_nodes if i.op == "get_attr"]
        bodies = [body for body in held if isinstance(body, fx.GraphModule)]
        return bool(bodies) and not any(_writes_to_its_inputs(body.graph) for body in bodies)
    return False


def _written_in_body(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the operands that the one body of a higher-order op writes to; none where that is not known."""
    first = node.args[0] if isinstance(node.target, HigherOrderOperator) and node.args else None
    if not isinstance(first, fx.Node) or first.op != "get_attr":
        return ()
    body, given = getattr(node.graph.owning_module, str(first.target), None), node.args[1:]
    inputs = body.graph.find_nodes(op="placeholder") if isinstance(body, fx.GraphModule) else []
    if not isinstance(body, fx.GraphModule) or len(inputs) != len(given):
        return ()
    keys = [keys_of(written) for inner in body.graph.nodes for written in mutated_inputs(inner)]
    if not all(keys) or UNKNOWN in frozenset[int]().union(*keys):
        return ()
    written = frozenset[int]().union(*keys)
    pairs = zip(given, inputs, strict=True)
    return _nodes_in([outer for outer, inner in pairs if not written.isdisjoint(keys_of(inner))])


def _writes_to_its_inputs(body: fx.Graph) -> bool:
    """Return whether the body of a higher-order op may write to more than what it computed itself."""
    own: set[int] = set()
    given: set[int] = {UNKNOWN}
    for node in body.nodes:
        (given if node.op in ("placeholder", "get_attr") else own).update(keys_of(node))
        for written in mutated_inputs(node):
            keys = keys_of(written)
            if not keys or not given.isdisjoint(keys) or not keys <= own:
                return True
    return False


def _is_inplace_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _nodes_in(item: Any) -> tuple[fx.Node, ...]:
    found: list[fx.Node] = []
    fx.map_arg(item, lambda node: found.append(node) or node)
    return tuple(found)


@functools.cache
def _inplace_position(target: Any) -> int | None:
    """Return where the flag stands in the signature of `target` that makes it write into its input.

    Methods and functions written in C, which have no signature, have no such flag either: their in-place
    forms have names of their own.
    """
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _argument(node: fx.Node, position: int | None, name: str, default: Any = None) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if position is not None and len(node.args) > position else default
