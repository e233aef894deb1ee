"""The experts of a mixture, chosen by ids and summed by weight -> one op.

Source: transformers `integrations/moe.py`: experts as grouped products over rows in order, and as batched products
with each choice's own copy of its expert's matrices. The gated unit between the two products is the op that
`patterns/glu.py` made of its spelling: this pattern works on what that one leaves.
Saved for backward: x, the first products, the weights and three vectors of integers; `kernels/experts` says what
stock saves. Batched products save two matrices of an expert for every choice.
Numerics: the sum over a token's choices in fp32, rounded once.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from fxopt.graph.arguments import same_shape, same_size
from fxopt.graph.lift import OF_A_LOOP
from fxopt.graph.vocabulary import cast as cast_tensor
from fxopt.graph.vocabulary import reshape as reshape_tensor
from fxopt.kernels.experts import experts as fused_experts
from fxopt.patterns.expert_units import form_of, unit_of
from fxopt.patterns.experts_cases import examples, mutations, near_misses
from fxopt.rewriting.pattern import Call, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    cast,
    choice,
    either,
    expand,
    grouped_mm,
    masked_fill,
    matmul,
    maybe,
    named,
    number,
    operation,
    reshape,
    tensor,
    total,
    transpose,
    unsqueeze,
)


def search() -> Term:
    """Return the weighed sum over each token's choices, the experts in order or by copies of their matrices."""
    x, ids = tensor("x", "T H"), tensor("ids", "S")
    weights, shares = tensor("weights", "S"), tensor("shares", "T K")
    copies = _by_copies(x, ids)
    rows = either(_in_order(x, ids, weights), copies * unsqueeze(weights, -1))
    weighed = total(named("choices", reshape(rows)), dim=(-2,), keepdim=False)
    choices = named("choices", reshape(copies))
    weighed_later = either(
        total(choices * unsqueeze(shares, -1), dim=(-2,), keepdim=False),
        operation(torch.squeeze, matmul(unsqueeze(shares, -2), choices), dim=-2),
        operation(torch.squeeze, matmul(transpose(choices), unsqueeze(shares, -1)), dim=-1),
    )
    return maybe(cast, either(weighed, weighed_later))


def _in_order(x: Term, ids: Term, weights: Term) -> Term:
    """Return the weighed rows of the experts as grouped products compute them, back in the order of the choices."""
    ordered = operation(torch.sort, ids, dim=-1, descending=False, stable=...)
    sorted_ids, rows = ordered[0], ordered[1]
    ends = operation(
        torch.cumsum,
        operation(torch.histc, cast(sorted_ids), bins=number("bins"), min=0, max=number("last")),
        dim=-1,
        dtype=torch.int32,
    )
    has_no_expert = unsqueeze(operation(torch.ge, sorted_ids, number("num_known")), -1)
    known_ids = maybe(
        lambda found: operation(torch.clamp, found, min=None, max=number("last")),
        sorted_ids,
        "are_ids_clamped",
    )

    def masked(value: Term) -> Term:
        return maybe(lambda inner: masked_fill(inner, has_no_expert, 0), value, "is_masked")

    def product(value: Term, name: str) -> Term:
        found = named(f"{name}_product", grouped_mm(maybe(cast, value), tensor(f"w_{name}"), ends))
        return maybe(lambda inner: inner + tensor(f"b_{name}")[known_ids], found)

    source = operation(operator.floordiv, rows, number("num_choices"))
    up = masked(product(masked(x[source]), "up"))
    down = masked(product(unit_of(up), "down"))
    empty = operation(torch.empty_like, rows)
    numbers = operation(torch.arange, ..., device=...)
    places = operation(torch.index_put, empty, (rows,), numbers)
    return (down * unsqueeze(weights[rows], -1))[places]


def _by_copies(x: Term, ids: Term) -> Term:
    """Return the rows of the experts as batched products compute them."""

    def product(value: Term, name: str) -> Term:
        w = tensor(f"w_{name}")[ids]
        found = choice(
            f"{name}_side",
            left=_only_one(matmul(w, unsqueeze(value, -1)), -1),
            right=_only_one(matmul(unsqueeze(value, -2), w), -2),
        )
        found = named(f"{name}_product", found)
        return maybe(lambda inner: inner + tensor(f"b_{name}")[ids], found)

    repeated = either(
        operation(torch.repeat_interleave, x, number("num_choices"), dim=-2),
        reshape(named("expanded", expand(unsqueeze(x, -2)))),
    )
    unit = either(
        unit_of(product(repeated, "up")), unit_of(product(repeated, "gate"), product(repeated, "up"))
    )
    return product(unit, "down")


def _only_one(rows: Term, dim: int) -> Term:
    """Return `rows` without the dim of size 1 that a vector was given for a product."""
    picked = rows[..., 0] if dim == -1 else rows[..., 0, :]
    return either(operation(torch.squeeze, rows, dim=dim), picked)


def check(m: Match) -> Mismatch | None:
    """Refuse numbers that do not name the same experts and choices, and weights of other shapes and dtypes."""
    w_up, w_down, x = m.example("w_up"), m.example("w_down"), m.example("x")
    num_experts = w_up.shape[0]
    for name, value in (("bins", m["bins"]), ("known", m["num_known"]), ("last", _one_more(m["last"]))):
        if value is not None and value != num_experts:
            return m.fail(
                f"{value} experts are counted ({name}), expected as many as weights, {num_experts}", "ids"
            )
    if m.example("ids").is_floating_point() or m.example("ids").dtype == torch.bool:
        return m.fail(f"ids are {m.example('ids').dtype}, expected integers", "ids")
    num_choices, shape = m["num_choices"], m.example("choices").shape
    if m["expanded"] is not None:
        num_choices = m.example("expanded").shape[-2]
    if m["shares"] is not None and not same_shape(m.example("shares"), m.example("choices")[..., 0]):
        return m.fail("weights of other choices than those that are summed", "shares")
    if len(shape) != 3 or shape[1] != num_choices or not same_size(shape[0], x.shape[0]):
        return m.fail(
            f"rows are summed in the shape {list(shape)}, expected [{x.shape[0]}, {num_choices}, H]",
            "choices",
        )
    names = ("gate_product", "up_product", "down_product", "b_gate", "b_up", "b_down")
    tensors = [name for name in names if m[name] is not None]
    dtypes = {m.example(name).dtype for name in tensors}
    if len(dtypes) > 1 or not w_up.is_floating_point():
        return m.fail(f"products and biases of {len(dtypes)} dtypes, expected floats of one", "w_up")
    if w_up.dim() != 3 or w_down.dim() != 3:
        return m.fail(f"weights of {w_up.dim()} and {w_down.dim()} dims, expected 3", "w_up")
    if m["w_gate"] is not None:
        alike = same_shape(m.example("w_gate"), w_up) and m["gate_side"] == m["up_side"]
        if not alike or (m["b_gate"] is None) != (m["b_up"] is None):
            return m.fail("gate and up of experts are not alike", "w_gate", "w_up")
        if any(OF_A_LOOP in node.meta for node in m.nodes):
            return m.fail(
                "gate and up of a loop have a stack each, whose copy as one would be kept", "w_gate"
            )
    ranks = [m.example(name).dim() for name in ("b_up", "b_down") if m[name] is not None]
    if any(rank != 2 for rank in ranks):
        return m.fail(f"biases of {ranks[0]} dims, expected a row per expert", "b_up", "b_down")
    return None


def _one_more(last: Any) -> Any:
    return None if last is None else last + 1


def replace(m: Match) -> Call:
    """Return one call of the fused op, its result in the dtype of stock's."""
    b_up, both = m["b_up"], {"layout": "packed", "gate_first": True} if m["w_gate"] is not None else {}
    if m["b_gate"] is not None:
        b_up = call(torch.cat, (m["b_gate"], b_up), dim=-1)
    shares = m["weights"] if m["shares"] is None else call(reshape_tensor, m["shares"], shape=(-1,))
    return call(
        fused_experts,
        m["x"],
        m["ids"],
        shares,
        _matrices(m, "up"),
        _matrices(m, "down"),
        b_up,
        m["b_down"],
        **form_of(m) | both,
        dtype=m.output.dtype,
    )


def _matrices(m: Match, side: str) -> Any:
    """Return the stack of matrices of one product, gate and up side by side where they are two stacks."""
    w, dtype, is_left = m[f"w_{side}"], m.example(f"{side}_product").dtype, m[f"{side}_side"] == "left"
    if side == "up" and m["w_gate"] is not None:
        w = call(torch.cat, (m["w_gate"], w), dim=-2 if is_left else -1)
    if m.example(f"w_{side}").dtype != dtype:
        w = call(cast_tensor, w, dtype=dtype)  # as autocast does
    return call(torch.transpose, w, dim0=-2, dim1=-1) if is_left else w


EXPERTS = Pattern(
    name="experts",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    source="transformers integrations/moe.py, grouped_mm_experts_forward and batched_mm_experts_forward",
)
