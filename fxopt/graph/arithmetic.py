"""Canonical forms of pointwise ops, reductions and casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.graph import vocabulary
from fxopt.graph.arguments import Form, bind, from_last, is_number, rank_of
from fxopt.graph.edit import Editor, can_bypass, fresh_like, num_edges
from fxopt.graph.names import op_name
from fxopt.graph.view import is_tensor, value_of

Rule = Callable[[fx.Node, Editor], Form | None]
FULL_PRECISION = (torch.float32, torch.float64)
"""Dtypes that autocast leaves as they are."""


def _unary(target: Any) -> Rule:
    def rule(node: fx.Node, editor: Editor) -> Form | None:
        bound = bind(node, "x")
        return Form(target, (bound["x"],), {}) if bound and is_tensor(bound["x"]) else None

    return rule


def _operands(node: fx.Node, option: str, default: Any) -> tuple[Any, Any] | None:
    """Return the operands of a binary node, at least one a tensor, whose `option` has its default."""
    bound = bind(node, "x", "other", **{option: default})
    if bound is None or (bound[option] is not default and bound[option] != default):
        return None
    a, b = bound["x"], bound["other"]
    fits = all(is_tensor(item) or is_number(item) for item in (a, b)) and (is_tensor(a) or is_tensor(b))
    return (a, b) if fits else None


def _add(node: fx.Node, editor: Editor) -> Form | None:
    operands = _operands(node, "alpha", 1)
    if operands is None:
        return None
    a, b = _tensor_first(*operands)
    # The sum of a value and a negated one is their difference, forward and backward.
    if is_tensor(b) and b.target is torch.neg and b is not a and num_edges(b) == 1:
        (negated,) = b.args
        if _has_signs(negated) and can_bypass(b, negated) and not editor.aliases.is_mutated(negated):
            node.meta["origins"] = node.meta["origins"] | b.meta["origins"]
            return Form(torch.sub, (a, negated), {})
    return Form(torch.add, (a, b), {})


def _has_signs(item: Any) -> bool:
    """Return whether the negative of each value has its dtype: a negated integer may wrap before it is widened."""
    return is_tensor(item) and (value_of(item).is_floating_point() or value_of(item).is_complex())


def _sub(node: fx.Node, editor: Editor) -> Form | None:
    operands = _operands(node, "alpha", 1)
    return Form(torch.sub, operands, {}) if operands and is_tensor(operands[0]) else None


def _mul(node: fx.Node, editor: Editor) -> Form | None:
    operands = _operands(node, "out", None)
    if operands is None:
        return None
    a, b = _tensor_first(*operands)
    if a is b and value_of(a).dtype in FULL_PRECISION and not value_of(a).requires_grad:
        # With a gradient the two differ: x * x sends two terms into x, a power one, and under autocast
        # a power is computed in float32.
        return Form(torch.pow, (a,), {"exponent": 2})
    if isinstance(b, int | float) and b == -1 and value_of(node).dtype == value_of(a).dtype:
        return Form(torch.neg, (a,), {})
    return Form(torch.mul, (a, b), {})


def _div(node: fx.Node, editor: Editor) -> Form | None:
    operands = _operands(node, "rounding_mode", None)
    if operands is None:
        return None
    a, b = operands
    if is_tensor(a):
        return Form(torch.div, (a, b), {})
    # Tensor.__rtruediv__ is reciprocal() * number.
    if a == 1:
        return Form(torch.reciprocal, (b,), {})
    reciprocal = editor.insert_before(node, torch.reciprocal, (b,), {}, fresh_like(value_of(node)))
    return Form(torch.mul, (reciprocal, a), {})


def _ne(node: fx.Node, editor: Editor) -> Form | None:
    operands = _operands(node, "out", None)
    return operands and Form(torch.ne, _tensor_first(*operands), {})


def _compared(target: Any, mirrored: Any) -> Rule:
    """Return a rule for a comparison; one that has its number in front is the mirrored one."""

    def rule(node: fx.Node, editor: Editor) -> Form | None:
        operands = _operands(node, "out", None)
        if operands is None:
            return None
        a, b = operands
        return Form(target, (a, b), {}) if is_tensor(a) else Form(mirrored, (b, a), {})

    return rule


def _not(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x")
    is_mask = bound is not None and is_tensor(bound["x"]) and value_of(bound["x"]).dtype == torch.bool
    return Form(torch.logical_not, (bound["x"],), {}) if bound and is_mask else None


def _tensor_first(a: Any, b: Any) -> tuple[Any, Any]:
    return (a, b) if is_tensor(a) else (b, a)


def _pow(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "exponent")
    if bound is None or not is_tensor(bound["x"]) or not is_number(bound["exponent"]):
        return None
    x, exponent = bound["x"], bound["exponent"]
    if isinstance(exponent, float) and exponent.is_integer() and value_of(x).is_floating_point():
        exponent = int(exponent)
    return Form(torch.pow, (x,), {"exponent": exponent})


def _square(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x")
    return Form(torch.pow, (bound["x"],), {"exponent": 2}) if bound else None


def _clamp(*names: str) -> Rule:
    def rule(node: fx.Node, editor: Editor) -> Form | None:
        bound = bind(node, "x", **dict.fromkeys(names))
        if bound is None or not is_tensor(bound["x"]):
            return None
        limits = {"min": bound.get("min"), "max": bound.get("max")}
        given = [limit for limit in limits.values() if limit is not None]
        return Form(torch.clamp, (bound["x"],), limits) if given and all(map(is_number, given)) else None

    return rule


def _reduction(target: Any) -> Rule:
    def rule(node: fx.Node, editor: Editor) -> Form | None:
        bound = bind(node, "x", dim=None, keepdim=False, dtype=None)
        if bound is None or not is_tensor(bound["x"]) or not _is_default_dtype(bound["dtype"], bound["x"]):
            return None
        dims = _reduced(bound["dim"], bound["x"])
        if dims is None:
            is_full = bound["dim"] is None and bound["keepdim"] is False
            return Form(target, (bound["x"],), {}) if is_full else None
        return Form(target, (bound["x"],), {"dim": dims, "keepdim": bool(bound["keepdim"])})

    return rule


def _norm(node: fx.Node, editor: Editor) -> Form | None:
    """Return the root of the sum of squares over some dims, whatever torch calls that."""
    order = "ord" if "ord" in node.kwargs or op_name(node) == "vector_norm" else "p"
    bound = bind(node, "x", **{order: None}, dim=None, keepdim=False, dtype=None)
    if bound is None or not is_tensor(bound["x"]) or not _is_default_dtype(bound["dtype"], bound["x"]):
        return None
    dims = _reduced(bound["dim"], bound["x"])
    if dims is None or len(dims) != 1 or bound[order] not in (None, 2, "fro"):
        return None
    return Form(torch.linalg.vector_norm, (bound["x"],), {"dim": dims, "keepdim": bool(bound["keepdim"])})


def _max(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "dim", keepdim=False)
    if bound is None or not is_tensor(bound["x"]) or is_tensor(node):
        return None
    dim = from_last(bound["dim"], rank_of(bound["x"]))
    return (
        None
        if dim is None
        else Form(torch.max, (bound["x"],), {"dim": dim, "keepdim": bool(bound["keepdim"])})
    )


def _spread(target: Any) -> Rule:
    def rule(node: fx.Node, editor: Editor) -> Form | None:
        bound = bind(node, "x", dim=None, unbiased=True, keepdim=False, correction=None)
        if bound is None or isinstance(bound["dim"], bool):
            return None
        dims = _reduced(bound["dim"], bound["x"])
        if dims is None and bound["dim"] is not None:
            return None
        correction = int(bound["unbiased"]) if bound["correction"] is None else bound["correction"]
        kwargs = {"dim": dims, "correction": correction, "keepdim": bool(bound["keepdim"])}
        return Form(target, (bound["x"],), kwargs)

    return rule


def _logsumexp(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "dim", keepdim=False)
    dims = _reduced(bound["dim"], bound["x"]) if bound and is_tensor(bound["x"]) else None
    if bound is None or dims is None:
        return None
    return Form(torch.logsumexp, (bound["x"],), {"dim": dims, "keepdim": bool(bound["keepdim"])})


def _reduced(dim: Any, x: fx.Node) -> tuple[int, ...] | None:
    dims = (dim,) if isinstance(dim, int) else dim
    if not isinstance(dims, list | tuple) or not dims:
        return None
    counted = [from_last(item, rank_of(x)) for item in dims]
    return tuple(sorted(item for item in counted if item is not None)) if None not in counted else None


def _is_default_dtype(dtype: Any, x: fx.Node) -> bool:
    # Under autocast a reduction that names no dtype is computed in float32, so naming it must change nothing.
    return dtype is None or (dtype == value_of(x).dtype and dtype in FULL_PRECISION)


def _softmax(node: fx.Node, editor: Editor) -> Form | None:
    if node.target is torch.nn.functional.softmax:
        bound = bind(node, "x", dim=None, _stacklevel=3, dtype=None)
    else:
        bound = bind(node, "x", "dim", dtype=None)
    if bound is None or not is_tensor(bound["x"]):
        return None
    dim = from_last(bound["dim"], rank_of(bound["x"]))
    dtype = None if _is_default_dtype(bound["dtype"], bound["x"]) else bound["dtype"]
    return (
        None
        if dim is None
        else Form(torch.nn.functional.softmax, (bound["x"],), {"dim": dim, "dtype": dtype})
    )


def _masked_fill(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "mask", "value")
    if bound is None or not is_tensor(bound["x"]) or not is_tensor(bound["mask"]):
        return None
    is_known = is_tensor(bound["value"]) or is_number(bound["value"])
    return Form(torch.masked_fill, (bound["x"], bound["mask"], bound["value"]), {}) if is_known else None


def _where(node: fx.Node, editor: Editor) -> Form | None:
    if node.op == "call_method":
        bound = bind(node, "a", "condition", "b")  # x.where(condition, y)
    else:
        bound = bind(node, "condition", "x", "other")
        bound = bound and {"condition": bound["condition"], "a": bound["x"], "b": bound["other"]}
    if bound is None or not is_tensor(bound["condition"]):
        return None
    is_known = all(is_tensor(bound[name]) or is_number(bound[name]) for name in ("a", "b"))
    return Form(torch.where, (bound["condition"], bound["a"], bound["b"]), {}) if is_known else None


def _cast(node: fx.Node, editor: Editor) -> Form | None:
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node) or not is_tensor(x) or not is_tensor(node):
        return None
    asks_copy = bool(node.kwargs.get("copy")) or any(item is True for item in node.args)
    keeps_layout = node.kwargs.get("memory_format") in (None, torch.preserve_format)
    has_format = any(isinstance(item, torch.memory_format) for item in node.args)
    if asks_copy or has_format or not keeps_layout or value_of(node).device != value_of(x).device:
        return None
    return Form(vocabulary.cast, (x,), {"dtype": value_of(node).dtype})


UNARY = ("neg", "sqrt", "rsqrt", "reciprocal", "exp", "tanh", "erf", "sigmoid", "abs")
CASTS = ("to", "type", "type_as", "float", "half", "bfloat16", "double", "int", "long", "bool")

RULES: dict[str, Rule] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "ne": _ne,
    "eq": _compared(torch.eq, torch.eq),
    "lt": _compared(torch.lt, torch.gt),
    "le": _compared(torch.le, torch.ge),
    "gt": _compared(torch.gt, torch.lt),
    "ge": _compared(torch.ge, torch.le),
    "invert": _not,
    "bitwise_not": _not,
    "logical_not": _not,
    "pow": _pow,
    "square": _square,
    "mean": _reduction(torch.mean),
    "sum": _reduction(torch.sum),
    "var": _spread(torch.var),
    "std": _spread(torch.std),
    "logsumexp": _logsumexp,
    "max": _max,
    "norm": _norm,
    "vector_norm": _norm,
    "linalg_vector_norm": _norm,
    "softmax": _softmax,
    "masked_fill": _masked_fill,
    "where": _where,
    "clamp": _clamp("min", "max"),
    "clip": _clamp("min", "max"),
    "clamp_min": _clamp("min"),
    "clamp_max": _clamp("max"),
    **{name: _unary(getattr(torch, name)) for name in UNARY},
    **dict.fromkeys(CASTS, _cast),
}
