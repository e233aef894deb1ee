"""Canonical forms of activations, products, norms and losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.graph.arguments import Form, bind, from_last, rank_of
from fxopt.graph.arithmetic import Rule
from fxopt.graph.edit import Editor, can_bypass, fresh_like, num_edges
from fxopt.graph.names import op_name
from fxopt.graph.torch_private import TORCH_LINEAR
from fxopt.graph.view import dtype_of, is_tensor
from fxopt.graph.vocabulary import cast


def _activation(target: Any) -> Rule:
    def rule(node: fx.Node, editor: Editor) -> Form | None:
        bound = bind(node, "x", inplace=False)
        return Form(target, (bound["x"],), {}) if bound and bound["inplace"] is False else None

    return rule


def _gelu(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", approximate="none")
    return Form(F.gelu, (bound["x"],), {"approximate": bound["approximate"]}) if bound else None


def _glu(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", dim=-1)
    if bound is None or not is_tensor(bound["x"]):
        return None
    dim = from_last(bound["dim"], rank_of(bound["x"]))
    return None if dim is None else Form(F.glu, (bound["x"],), {"dim": dim})


def _linear(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "weight", bias=None)
    return Form(TORCH_LINEAR, (bound["x"], bound["weight"], bound["bias"]), {}) if bound else None


def _matmul(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "other") or bind(node, "x", "mat2")
    if bound is None:
        return None
    a, b = bound["x"], bound["other"] if "other" in bound else bound["mat2"]
    if not (is_tensor(a) and is_tensor(b)):
        return None
    weight = _weight_of(node, a, b)
    if weight is not None:
        return Form(TORCH_LINEAR, (a, weight, None), {})
    return Form(torch.matmul, (a, b), {})


def _addmm(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "mat1", "mat2", beta=1, alpha=1)
    if bound is None or bound["beta"] != 1 or bound["alpha"] != 1 or rank_of(bound["x"]) != 1:
        return None
    weight = _weight_of(node, bound["mat1"], bound["mat2"])
    if weight is None or dtype_of(bound["x"]) != dtype_of(node):
        return None
    return Form(TORCH_LINEAR, (bound["mat1"], weight, bound["x"]), {})


def _weight_of(node: fx.Node, x: fx.Node, b: fx.Node) -> fx.Node | None:
    """Return w where `b` is a 2-d `w.t()` and `linear(x, w)` has the bits of `x @ b`, gradients included.

    A cast by autocast is refused, because the cast of a weight is cached and that of its transpose is not.
    """
    if b.target is not torch.transpose or rank_of(b) != 2 or rank_of(x) < 2:
        return None
    w = b.args[0]
    if not isinstance(w, fx.Node) or not dtype_of(node) == dtype_of(x) == dtype_of(w):
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


def _nll_loss(node: fx.Node, editor: Editor) -> Form | None:
    """Return the cross entropy where the input is a log-softmax over the last dim that nothing else reads."""
    defaults = {"weight": None, "size_average": None, "ignore_index": -100, "reduce": None}
    bound = bind(node, "x", "target", **defaults, reduction="mean")
    if bound is None or bound["size_average"] is not None or bound["reduce"] is not None:
        return None
    log_softmax = bound["x"]
    x = _logits_of(log_softmax) if is_tensor(log_softmax) and rank_of(log_softmax) == 2 else None
    if x is None or num_edges(log_softmax) != 1:
        return None
    node.meta["origins"] = node.meta["origins"] | log_softmax.meta["origins"]
    if dtype_of(x) != dtype_of(log_softmax):
        like = fresh_like(log_softmax.meta["example_value"])
        x = editor.insert_before(log_softmax, cast, (x,), {"dtype": dtype_of(log_softmax)}, like)
    kwargs = {"ignore_index": bound["ignore_index"], "reduction": bound["reduction"], "label_smoothing": 0.0}
    return Form(F.cross_entropy, (x, bound["target"], bound["weight"]), kwargs)


def _logits_of(node: fx.Node) -> fx.Node | None:
    """Return what `node` is the log-softmax of, over its last dim."""
    if op_name(node) != "log_softmax":
        return None
    if node.target is F.log_softmax:
        bound = bind(node, "x", dim=None, _stacklevel=3, dtype=None)
    else:
        bound = bind(node, "x", "dim", dtype=None)
    is_last = bound is not None and is_tensor(bound["x"]) and from_last(bound["dim"], rank_of(node)) == -1
    return bound["x"] if bound is not None and is_last else None


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


def _sort(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", dim=-1, descending=False, stable=False)
    if bound is None or not is_tensor(bound["x"]) or rank_of(bound["x"]) == 0:
        return None
    dim = from_last(bound["dim"], rank_of(bound["x"]))
    kwargs = {"dim": dim, "descending": bound["descending"], "stable": bool(bound["stable"])}
    return None if dim is None else Form(torch.sort, (bound["x"],), kwargs)


def _cumsum(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "dim", dtype=None)
    if bound is None or not is_tensor(bound["x"]) or rank_of(bound["x"]) == 0:
        return None
    dim = from_last(bound["dim"], rank_of(bound["x"]))
    return None if dim is None else Form(torch.cumsum, (bound["x"],), {"dim": dim, "dtype": bound["dtype"]})


def _topk(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "k", dim=-1, largest=True, sorted=True)
    if bound is None or bound["largest"] is not True or not is_tensor(bound["x"]):
        return None
    dim = from_last(bound["dim"], rank_of(bound["x"]))
    kwargs = {"k": bound["k"], "dim": dim, "sorted": bound["sorted"]}
    return None if dim is None else Form(torch.topk, (bound["x"],), kwargs)


def _gather(node: fx.Node, editor: Editor) -> Form | None:
    bound = bind(node, "x", "dim", "index", sparse_grad=False)
    if bound is None or bound["sparse_grad"] is not False or not is_tensor(bound["x"]):
        return None
    dim = from_last(bound["dim"], rank_of(bound["x"]))
    kwargs = {"dim": dim, "index": bound["index"]}
    return None if dim is None else Form(torch.gather, (bound["x"],), kwargs)


def _as_tuple(shape: Any) -> Any:
    return tuple(shape) if isinstance(shape, list | tuple) else shape


RULES: dict[str, Rule] = {
    "silu": _activation(F.silu),
    "relu": _activation(F.relu),
    "gelu": _gelu,
    "glu": _glu,
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "addmm": _addmm,
    "cross_entropy": _cross_entropy,
    "nll_loss": _nll_loss,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "scaled_dot_product_attention": _attention,
    "sort": _sort,
    "cumsum": _cumsum,
    "topk": _topk,
    "gather": _gather,
}
