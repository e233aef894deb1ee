"""The choice of each token's experts and their weights -> one op.

Source: transformers `MixtralTopKRouter`, `Qwen2MoeTopKRouter`, `OlmoeTopKRouter` (scores, then the choice),
`GptOssTopKRouter`, `GraniteMoeTopKGating` (the choice, then scores), `DeepseekV3TopkRouter`, `Glm4MoeTopkRouter`
(chosen by scores plus a bias, of the best groups), `DeepseekV2TopkRouter`, `Ernie4_5_MoeTopKRouter`.
Saved for backward: the logits, which their product saves nowhere, and the ids; stock saves the scores of all experts,
those chosen and their sums.
Numerics: experts are compared in stock's dtypes; all after the choice in fp32, rounded once. The order in which a
token's choices stand means nothing, so a proof compares the weights of all experts.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from fxopt.graph.vocabulary import reshape as reshape_tensor
from fxopt.kernels.route import Form
from fxopt.kernels.route import route as fused_route
from fxopt.kernels.route.form import MOST_PAIRS, is_grouping
from fxopt.patterns.route_cases import examples, mutations, near_misses
from fxopt.rewriting.pattern import Call, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    also,
    attribute,
    cast,
    choice,
    clamp,
    downcast,
    expand,
    keep,
    largest,
    masked_fill,
    maybe,
    named,
    number,
    operation,
    reshape,
    sigmoid,
    softmax,
    tensor,
    total,
    unsqueeze,
    upcast,
)

SCATTERED = 1


def search() -> tuple[Term, Term]:
    """Return the weights of the chosen experts, and their ids."""
    logits = maybe(upcast, tensor("logits", "* E"))
    scores = keep(named("scores", _score(logits)), cheap=True)
    values = choice("values", biased=scores + tensor("bias"), plain=scores, logits=logits)
    compared = choice("compared", grouped=_of_best_groups(values), all=values)
    chosen = operation(torch.topk, compared, k=number("num_choices"), dim=-1, sorted=attribute("is_sorted"))
    ids = chosen[1]
    picked = choice(
        "picked",
        gathered=operation(torch.gather, scores, dim=-1, index=ids),
        values=chosen[0],
        after=named("scores", _score(maybe(upcast, chosen[0]))),
    )
    picked = maybe(cast, picked)
    of_chosen = total(picked)
    divisor = choice(
        "bound",
        eps=of_chosen + number("eps"),
        least=clamp(of_chosen, min=number("least")),
        none=of_chosen,
    )
    weights = maybe(cast, maybe(lambda found: found / divisor, picked, "normalizes"))
    return maybe(cast, maybe(lambda found: found * number("scale"), weights)), also(ids)


def _score(logits: Term) -> Term:
    """Return the scores of `logits`, maybe rounded afterwards."""
    found = choice("score", softmax=softmax(logits, attribute("softmax_dtype")), sigmoid=sigmoid(logits))
    return maybe(downcast, named("wide_scores", found))


def _of_best_groups(values: Term) -> Term:
    """Return `values`, those of other groups than the best ones filled with a number."""
    groups = named("groups", reshape(values))
    largest_ones = operation(torch.topk, groups, k=number("group_choices"), dim=-1, sorted=...)[0]
    group_scores = choice(
        "group_score", several=total(largest_ones, keepdim=False), one=largest(groups, -1, False)
    )
    best = operation(torch.topk, group_scores, k=number("num_kept"), dim=-1, sorted=...)[1]
    marks = operation(
        torch.scatter, operation(torch.zeros_like, group_scores), number("mark_dim"), best, SCATTERED
    )
    spread = reshape(expand(unsqueeze(marks, -1)))
    others = operation(operator.invert, cast(spread, torch.bool))
    return masked_fill(values, others, number("fill"))


def check(m: Match) -> Mismatch | None:
    """Refuse choices by other values than those that are scored, biases of other shapes, and groups unlike the op's."""
    if len(m.outputs) == 1:
        return m.fail("nothing reads which experts were chosen", "logits")
    is_after, values = m["picked"] == "after", m["values"]
    if is_after != (values == "logits") or (is_after and m["compared"] == "grouped"):
        return m.fail("experts are chosen by other values than those that are scored", "logits")
    if m["picked"] == "values" and values == "biased":
        return m.fail("the bias is in the weights, expected weights of the scores alone", "bias")
    logits, num_experts = m.example("logits"), m.example("logits").shape[-1]
    if not logits.is_floating_point() or not isinstance(num_experts, int):
        return m.fail(f"logits of {logits.dtype} and {num_experts} experts, expected floats", "logits")
    if num_experts * m["num_choices"] > MOST_PAIRS:
        return m.fail(
            f"{num_experts} experts by {m['num_choices']} choices, expected at most {MOST_PAIRS} together",
            "logits",
        )
    given = m["softmax_dtype"]
    if given is not None and torch.promote_types(logits.dtype, given) != given:
        return m.fail(f"logits of {logits.dtype} are rounded to {given} before the softmax", "logits")
    if values == "biased":
        bias = m.example("bias")
        if tuple(bias.shape) not in ((num_experts,), (1, num_experts)) or bias.requires_grad:
            return m.fail(
                f"a bias of shape {list(bias.shape)}, expected one per expert, without gradient", "bias"
            )
    if m["compared"] == "grouped":
        return _check_groups(m, num_experts)
    return None


def _check_groups(m: Match, num_experts: int) -> Mismatch | None:
    shape, form = m.example("groups").shape, _form_of(m)
    is_plain = len(shape) == m.example("logits").dim() + 1 and shape[-2] * shape[-1] == num_experts
    if not is_plain or not is_grouping(form, num_experts):
        return m.fail(
            f"groups of shape {list(shape)}, {m['num_kept']} kept by their {form.group_choices} largest, "
            "expected enough of them, by one or two",
            "groups",
        )
    if m["fill"] not in (0, -torch.inf):
        return m.fail(f"other groups are filled with {m['fill']}, expected 0 or -inf", "groups")
    if m["mark_dim"] not in (-1, m.example("groups").dim() - 2):
        return m.fail("groups are marked along the tokens", "groups")
    return None


def _form_of(m: Match) -> Form:
    """Return the attributes of the op."""
    is_grouped, is_after = m["compared"] == "grouped", m["picked"] == "after"
    scores = m.example("scores").dtype
    return Form(
        score=m["score"],
        num_choices=m["num_choices"],
        scores_after=is_after,
        group_size=m.example("groups").shape[-1] if is_grouped else 0,
        num_kept=m["num_kept"] if is_grouped else 0,
        group_choices=m["group_choices"] if m["group_score"] == "several" else 1,
        fills_zero=is_grouped and m["fill"] == 0,
        normalizes=bool(m["normalizes"]),
        eps=float(m["eps"] or 0.0),
        least=float(m["least"] or 0.0),
        scale=1.0 if m["scale"] is None else float(m["scale"]),
        is_sorted=m["is_sorted"],
        scores_dtype=scores,
        dtype=m.output.dtype,
    )


def replace(m: Match) -> tuple[Call, Call]:
    """Return the weights and the ids of one call of the op."""
    bias = m["bias"]
    if bias is not None and m.example("bias").dim() > 1:
        bias = call(reshape_tensor, bias, shape=(-1,))
    both = call(fused_route, m["logits"], bias, **vars(_form_of(m)))
    return call(operator.getitem, both, 0), call(operator.getitem, both, 1)


def read_out(m: Match, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the weights of all experts, 0 for those not chosen: the same in whatever order choices stand."""
    weights, ids = outputs
    zeros: Any = weights.new_zeros(*weights.shape[:-1], m.example("logits").shape[-1])
    return [zeros.scatter_add(-1, ids, weights)]


ROUTE = Pattern(
    name="route",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    read_out=read_out,
    source="transformers models/mixtral, qwen2_moe, deepseek_v3, gpt_oss: the routers",
)
