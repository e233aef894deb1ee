"""Canonical forms of activations, products, norms and losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.graph.arguments import Form, bind, is_tensor, rank_of
from fxopt.graph.arithmetic import Rule
from fxopt.graph.edit import Editor, can_bypass, num_edges


def _activation(target: Any) -> Rule:
    def rule(node: fx.Node, editor: Editor) -> Form | None:
        bound = bind(node, "x", inplace=False)
        return Form(target, (bound["x"],), {}) if bound and bound["inplace"] is False else None

    return rule


def _gelu(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", approximate="none")
    return Form(F.gelu, (bound["x"],), {"approximate": bound["approximate"]}) if bound else None


def _linear(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "weight", bias=None)
    return Form(F.linear, (bound["x"], bound["weight"], bound["bias"]), {}) if bound else None


def _matmul(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "other") or bind(node, "x", "mat2")
    if bound is None:
        return None
    a, b = bound["x"], bound["other"] if "other" in bound else bound["mat2"]
    if not (is_tensor(a) and is_tensor(b)):
        return None
    weight = _weight_of(node, a, b)
    if weight is not None:
        return Form(F.linear, (a, weight, None), {})
    return Form(torch.matmul, (a, b), {})


def _addmm(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "mat1", "mat2", beta=1, alpha=1)
    if bound is None or bound["beta"] != 1 or bound["alpha"] != 1 or rank_of(bound["x"]) != 1:
        return None
    weight = _weight_of(node, bound["mat1"], bound["mat2"])
    if weight is None or _dtype(bound["x"]) != _dtype(node):
        return None
    return Form(F.linear, (bound["mat1"], weight, bound["x"]), {})


def _weight_of(node: fx.Node, x: fx.Node, b: fx.Node) -> fx.Node | None:
    """Return w where `b` is a 2-d `w.t()` and `linear(x, w)` has the bits of `x @ b`, gradients included.

    A cast by autocast is refused, because the cast of a weight is cached and that of its transpose is not.
    """
    if b.target is not torch.transpose or rank_of(b) != 2 or rank_of(x) < 2:
        return None
    w = b.args[0]
    if not isinstance(w, fx.Node) or not _dtype(node) == _dtype(x) == _dtype(w):
        return None
    moves_alone = num_edges(b) == 1 and can_bypass(b, w)
    return w if moves_alone or not w.meta["example_value"].requires_grad else None


def _cross_entropy(node: fx.Node, editor: Editor) -> Form | None:
    defaults = {"weight": None, "size_average": None, "ignore_index": -100, "reduce": None}
    bound = bind(node, "x", "target", **defaults, reduction="mean", label_smoothing=0.0)
    if bound is None or bound["size_average"] is not None or bound["reduce"] is not None:
        return None
    kwargs = {name: bound[name] for name in ("ignore_index", "reduction", "label_smoothing")}
    return Form(F.cross_entropy, (bound["x"], bound["target"], bound["weight"]), kwargs)


def _rms_norm(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "normalized_shape", weight=None, eps=None)
    if bound is None:
        return None
    args = (bound["x"], _as_tuple(bound["normalized_shape"]), bound["weight"])
    return Form(F.rms_norm, args, {"eps": bound["eps"]})


def _layer_norm(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "normalized_shape", weight=None, bias=None, eps=1e-5, cudnn_enable=True)
    if bound is None:
        return None
    args = (bound["x"], _as_tuple(bound["normalized_shape"]), bound["weight"], bound["bias"])
    return Form(F.layer_norm, args, {"eps": bound["eps"]})


def _attention(node: fx.Node, editor: Editor) -> Form | None:
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    bound = bind(node, "query", "key", "value", **defaults)
    if bound is None:
        return None
    args = (bound["query"], bound["key"], bound["value"], bound["attn_mask"])
    kwargs = {name: bound[name] for name in ("dropout_p", "is_causal", "scale", "enable_gqa")}
    return Form(F.scaled_dot_product_attention, args, kwargs)


def _as_tuple(shape: Any) -> Any:
    return tuple(shape) if isinstance(shape, list | tuple) else shape


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["example_value"].dtype


RULES: dict[str, Rule] = {
    "silu": _activation(F.silu),
    "relu": _activation(F.relu),
    "gelu": _gelu,
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "addmm": _addmm,
    "cross_entropy": _cross_entropy,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "scaled_dot_product_attention": _attention,
}
