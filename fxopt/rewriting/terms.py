"""The language in which a pattern says what it looks for: terms that read like the arithmetic they match.

A term is a tree. `tensor`, `number` and `attribute` are its named leaves and bind what they meet; a name
used twice must meet the same value. An operation is written as arithmetic (`x * w`, `x ** 2`) or with the
functions below, one per op of the canonical graph; `operation` builds any other. `either`, `choice` and
`maybe` are alternatives, tried in order with real backtracking. A term used in two places matches one
node, or two nodes that compute the same from the same values. Sums and products match in both orders.

>>> x, w, eps = tensor("x", "* H"), tensor("w", "H"), number("eps")
>>> print(x * rsqrt(mean(x ** 2) + eps) * w)
mul(mul(x, rsqrt(add(mean(pow(x, 2)), eps))), w)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.graph import vocabulary
from fxopt.graph.torch_private import TORCH_LINEAR
from fxopt.rewriting.trees import (
    Also,
    Attribute,
    Either,
    Escaping,
    Many,
    Named,
    Number,
    Operation,
    Tensor,
    Term,
    operation,
)


def tensor(name: str, shape: str | None = None, *dtypes: torch.dtype) -> Tensor:
    """Return a named tensor whose dims are unified by name over the whole pattern.

    >>> tensor("w", "V H").shape, tensor("scalar", "").shape, tensor("any").shape
    (('V', 'H'), (), None)
    """
    return Tensor(name, None if shape is None else tuple(shape.split()), frozenset(dtypes) or None)


def number(name: str) -> Number:
    """Return a named Python number, such as an epsilon."""
    return Number(name)


def attribute(name: str) -> Attribute:
    """Return a named attribute, such as a reduction; `...` in its place means any value, unbound."""
    return Attribute(name)


def either(*terms: Term) -> Either:
    """Return the first of `terms` with which the rest of the pattern matches too."""
    return Either(tuple((index, term) for index, term in enumerate(terms)))


def choice(name: str, **terms: Term) -> Either:
    """Return one of `terms`; `name` binds the keyword of the one that matched.

    >>> gate = tensor("gate")
    >>> print(choice("act", silu=silu(gate), gelu=gelu(gate)))
    (silu(gate) | gelu(gate, none))
    """
    return Either(tuple(terms.items()), name)


def maybe(build: Callable[[Term], Term], term: Term, name: str = "") -> Either:
    """Return `build(term)` or `term` itself; `name`, where given, binds which as True or False."""
    return Either(((True, build(term)), (False, term)), name)


def keep(term: Term, *, cheap: bool = False) -> Escaping:
    """Return `term`, whose stock nodes stay in the graph where its value is read from outside.

    That costs its computation, so it is done only where a value that feeds the graph's output alone is
    computed lazily, or where the pattern says that it is `cheap`.
    """
    return Escaping(term, "keep", cheap=cheap)


def export(name: str, term: Term) -> Escaping:
    """Return `term`, whose value the replacement also returns where it is read from outside."""
    return Escaping(term, "export", name)


def named(name: str, term: Term) -> Named:
    """Return `term`, and bind `name` to the node that it matches."""
    return Named(name, term)


def also(term: Term) -> Also:
    """Return a further output that a match may do without: `search` returns it after the first output."""
    return Also(term)


def many(name: str, term: Term, at_least: int = 1) -> Many:
    """Return one or more list items that match `term`, as in `cat(many("parts", x * w))`."""
    return Many(name, term, at_least)


def cast(x: Term, dtype: Any = ...) -> Operation:
    """Return `x` in another dtype."""
    return operation(vocabulary.cast, x, dtype=dtype)


def upcast(x: Term) -> Operation:
    """Return `x` in a dtype that holds each of its values exactly."""
    return Operation(vocabulary.cast, (x,), (("dtype", ...),), _is_upcast, "a cast to a wider dtype")


def downcast(x: Term) -> Operation:
    """Return `x` rounded to a narrower dtype."""
    return Operation(vocabulary.cast, (x,), (("dtype", ...),), _is_downcast, "a cast to a narrower dtype")


def _cast_dtypes(node: torch.fx.Node) -> tuple[torch.dtype, torch.dtype]:
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    return source.meta["example_value"].dtype, node.meta["example_value"].dtype


def _is_upcast(node: torch.fx.Node) -> bool:
    before, after = _cast_dtypes(node)
    return (
        before.is_floating_point and after.is_floating_point and torch.promote_types(before, after) == after
    )


def _is_downcast(node: torch.fx.Node) -> bool:
    before, after = _cast_dtypes(node)
    return (
        before.is_floating_point and after.is_floating_point and torch.promote_types(before, after) == before
    )


def mean(x: Term, dim: Any = (-1,), keepdim: Any = True) -> Operation:
    """Return the mean over `dim`."""
    return operation(torch.mean, x, dim=dim, keepdim=keepdim)


def total(x: Term, dim: Any = (-1,), keepdim: Any = True) -> Operation:
    """Return the sum over `dim`."""
    return operation(torch.sum, x, dim=dim, keepdim=keepdim)


def variance(x: Term, dim: Any = (-1,), correction: Any = 0, keepdim: Any = True) -> Operation:
    """Return the variance over `dim`; `correction` 0 divides by the number of items."""
    return operation(torch.var, x, dim=dim, correction=correction, keepdim=keepdim)


def logsumexp(x: Term, dim: Any = (-1,), keepdim: Any = False) -> Operation:
    """Return the logarithm of the sum of exponentials over `dim`."""
    return operation(torch.logsumexp, x, dim=dim, keepdim=keepdim)


def not_equal(a: Term, b: Term) -> Operation:
    """Return where `a` is another value than `b`."""
    return operation(torch.ne, a, b)


def sum_of_all(x: Term) -> Operation:
    """Return the sum over all items."""
    return operation(torch.sum, x)


def mean_of_all(x: Term) -> Operation:
    """Return the mean over all items."""
    return operation(torch.mean, x)


def sqrt(x: Term) -> Operation:
    """Return the square root."""
    return operation(torch.sqrt, x)


def rsqrt(x: Term) -> Operation:
    """Return the reciprocal square root."""
    return operation(torch.rsqrt, x)


def reciprocal(x: Term) -> Operation:
    """Return one over `x`."""
    return operation(torch.reciprocal, x)


def exp(x: Term) -> Operation:
    """Return the exponential."""
    return operation(torch.exp, x)


def tanh(x: Term) -> Operation:
    """Return the hyperbolic tangent."""
    return operation(torch.tanh, x)


def erf(x: Term) -> Operation:
    """Return the error function."""
    return operation(torch.erf, x)


def sigmoid(x: Term) -> Operation:
    """Return the logistic function."""
    return operation(torch.sigmoid, x)


def silu(x: Term) -> Operation:
    """Return `x * sigmoid(x)`, called by its name."""
    return operation(F.silu, x)


def relu(x: Term) -> Operation:
    """Return `x` where it is positive, else 0."""
    return operation(F.relu, x)


def gelu(x: Term, approximate: Any = "none") -> Operation:
    """Return the Gaussian error linear unit, called by its name; `approximate` is "none" or "tanh"."""
    return operation(F.gelu, x, approximate=approximate)


def clamp(x: Term, min: Any = None, max: Any = None) -> Operation:
    """Return `x` cut off below `min` and above `max`, None where there is no such limit."""
    return operation(torch.clamp, x, min=min, max=max)


def linear(x: Term, w: Term, bias: Term | None = None) -> Operation:
    """Return `x @ w.T + bias`."""
    return operation(TORCH_LINEAR, x, w, bias)


def matmul(a: Term, b: Term) -> Operation:
    """Return the matrix product."""
    return operation(torch.matmul, a, b)


def grouped_mm(x: Term, w: Term, ends: Term) -> Operation:
    """Return the rows of `x`, each group of them multiplied by a matrix of its own."""
    return operation(vocabulary.grouped_mm, x, w, ends)


def reshape(x: Term, shape: Any = ...) -> Operation:
    """Return `x` in another shape, in the same order."""
    return operation(vocabulary.reshape, x, shape=shape)


def expand(x: Term, shape: Any = ...) -> Operation:
    """Return `x` repeated along dims of size 1."""
    return operation(vocabulary.expand, x, shape=shape)


def transpose(x: Term, dim0: int = -2, dim1: int = -1) -> Operation:
    """Return `x` with two dims swapped, both counted from the last, the outer one first."""
    return operation(torch.transpose, x, dim0=dim0, dim1=dim1)


def unsqueeze(x: Term, dim: Any) -> Operation:
    """Return `x` with a new dim of size 1."""
    return operation(torch.unsqueeze, x, dim=dim)


def contiguous(x: Term) -> Operation:
    """Return `x` copied to a dense layout."""
    return operation(vocabulary.contiguous, x)


def cat(*tensors: Term, dim: Any = -1) -> Operation:
    """Return `tensors` one after the other; one of them may be `many(...)`."""
    return operation(torch.cat, tensors, dim=dim)


def stack(*tensors: Term, dim: Any = -1) -> Operation:
    """Return `tensors` side by side along a new dim."""
    return operation(torch.stack, tensors, dim=dim)


def chunk(x: Term, chunks: Any, dim: Any = -1) -> Operation:
    """Return `x` cut into a number of equal pieces: `chunk(x, 2)[0]` is the first half."""
    return operation(torch.chunk, x, chunks=chunks, dim=dim)


def split(x: Term, sizes: Any, dim: Any = -1) -> Operation:
    """Return `x` cut into pieces of one size, or of several sizes."""
    return operation(torch.split, x, split_size_or_sections=sizes, dim=dim)


def rms_norm(x: Term, weight: Term | None = None, eps: Any = ...) -> Operation:
    """Return torch's own RMS norm over whatever dims it names."""
    return operation(F.rms_norm, x, normalized_shape=..., weight=weight, eps=eps)


def layer_norm(x: Term, weight: Any = ..., bias: Any = ..., eps: Any = ...) -> Operation:
    """Return torch's own layer norm over whatever dims it names."""
    return operation(F.layer_norm, x, normalized_shape=..., weight=weight, bias=bias, eps=eps)


def masked_fill(x: Term, mask: Term, value: Any) -> Operation:
    """Return `x` with `value` where `mask` is true."""
    return operation(torch.masked_fill, x, mask, value)


def where(condition: Term, a: Any, b: Any) -> Operation:
    """Return `a` where `condition` is true, else `b`."""
    return operation(torch.where, condition, a, b)


def fixed(name: str) -> Either:
    """Return a named number, written as a Python number or as a tensor without dims that holds it."""
    constant = operation(vocabulary.constant, value=number(name), dtype=..., device=...)
    return either(number(name), keep(constant, cheap=True))


def softmax(x: Term, dtype: Any = ...) -> Operation:
    """Return the softmax over the last dim."""
    return operation(F.softmax, x, dim=-1, dtype=dtype)


def largest(x: Term, dim: Any = -1, keepdim: Any = True) -> Operation:
    """Return the largest items along `dim`, without their places."""
    return operation(operator.getitem, operation(torch.max, x, dim=dim, keepdim=keepdim), 0)


def dropout(x: Term, p: Any = ...) -> Operation:
    """Return `x` with items dropped at random; dropout that drops nothing is no node of a canonical graph."""
    return operation(F.dropout, x, p=p, training=..., inplace=...)


def attention(q: Term, k: Term, v: Term, mask: Term | None = None, **attributes: Any) -> Operation:
    """Return torch's attention; `attributes` not given match any value."""
    named = {"dropout_p": ..., "is_causal": ..., "scale": ..., "enable_gqa": ..., **attributes}
    return operation(F.scaled_dot_product_attention, q, k, v, mask, **named)


def cross_entropy(logits: Term, labels: Term, **attributes: Any) -> Operation:
    """Return torch's cross entropy without class weights; `attributes` not given match any value."""
    named = {"ignore_index": ..., "reduction": ..., "label_smoothing": ..., **attributes}
    return operation(F.cross_entropy, logits, labels, None, **named)
