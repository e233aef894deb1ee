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
import torch.nn.functional as F

from fxopt.graph.vocabulary import reshape as reshape_tensor
from fxopt.kernels.route import Form
from fxopt.kernels.route import route as fused_route
from fxopt.kernels.route.form import MOST_PAIRS
from fxopt.patterns.route_cases import examples, mutations, near_misses
from fxopt.patterns.route_groups import check_groups, of_best_groups
from fxopt.rewriting.pattern import Call, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    also,
    attribute,
    cast,
    choice,
    clamp,
    downcast,
    either,
    keep,
    maybe,
    named,
    number,
    operation,
    sigmoid,
    softmax,
    sqrt,
    tensor,
    total,
    upcast,
)


def search() -> tuple[Term, Term]:
    """Return the weights of the chosen experts, and their ids."""
    logits = maybe(upcast, tensor("logits", "* E"))
    scores = keep(named("scores", _score(logits)), cheap=True)
    bias = tensor("bias")
    values = choice(
        "values",
        biased_scores=named("sums", maybe(upcast, scores) + bias),
        scores=scores,
        biased_logits=named("sums", logits + bias),
        logits=logits,
    )
    compared = choice("compared", grouped=of_best_groups(values), all=values)
    chosen = operation(torch.topk, compared, k=number("num_choices"), dim=-1, sorted=attribute("is_sorted"))
    ids = chosen[1]
    picked = choice(
        "picked",
        scores=operation(torch.gather, scores, dim=-1, index=ids),
        chosen=chosen[0],
        scores_of_chosen=named("scores", _score(maybe(upcast, chosen[0]))),
        scores_of_logits=named(
            "scores", _score(maybe(upcast, operation(torch.gather, logits, dim=-1, index=ids)))
        ),
    )
    picked = maybe(cast, picked)
    of_chosen = total(picked)
    divisor = choice(
        "bound",
        eps=of_chosen + number("eps"),
        least=clamp(of_chosen, min=number("least")),
        none=of_chosen,
    )
    weights = either(
        named("shares", picked / divisor),
        named("shares", operation(F.normalize, picked, p=1, dim=-1, eps=number("least"))),
        picked,
    )
    return maybe(cast, maybe(lambda found: found * number("scale"), maybe(cast, weights))), also(ids)


def _score(logits: Term) -> Term:
    """Return the scores of `logits`, maybe rounded afterwards."""
    positive = operation(F.softplus, logits)
    found = choice(
        "score",
        softmax=softmax(logits, attribute("softmax_dtype")),
        sigmoid=sigmoid(logits),
        sqrt_softplus=either(sqrt(positive), positive**0.5),
    )
    return maybe(downcast, named("wide_scores", found))


def check(m: Match) -> Mismatch | None:
    """Refuse choices by other values than the op's, biases of other shapes, and groups unlike the op's."""
    if len(m.outputs) == 1:
        return m.fail("nothing reads which experts were chosen", "logits")
    if m["picked"] == "chosen" and m["values"] != "scores":
        wanted = "bias" if m["values"].startswith("biased") else "logits"
        return m.fail(f"the {wanted} is in the weights, expected weights of the scores alone", wanted)
    if m["picked"] == "scores_of_chosen" and (m["values"] != "logits" or m["compared"] == "grouped"):
        return m.fail("scores of what experts were chosen by, expected those of the logits", "logits")
    if m["picked"] == "scores_of_logits" and not _is_by_logits(m):
        return m.fail("experts are chosen by other values than those that are scored", "logits")
    logits, num_experts = m.example("logits"), m.example("logits").shape[-1]
    if not logits.is_floating_point() or not isinstance(num_experts, int):
        return m.fail(f"logits of {logits.dtype} and {num_experts} experts, expected floats", "logits")
    if num_experts * m["num_choices"] > MOST_PAIRS:
        return m.fail(
            f"{num_experts} experts by {m['num_choices']} choices, expected at most {MOST_PAIRS} together",
            "logits",
        )
    wrong = _check_dtypes(m)
    if wrong is not None or m["compared"] != "grouped":
        return wrong
    return check_groups(m, _form_of(m))


def _check_dtypes(m: Match) -> Mismatch | None:
    logits, given = m.example("logits"), m["softmax_dtype"]
    if given is not None and torch.promote_types(logits.dtype, given) != given:
        return m.fail(f"logits of {logits.dtype} are rounded to {given} before the softmax", "logits")
    wide, scores = m.example("wide_scores").dtype, m.example("scores").dtype
    if m["score"] == "sqrt_softplus" and wide != scores:
        return m.fail(f"roots in {wide} are rounded to {scores}, expected them in one dtype", "logits")
    if m["bias"] is None:
        return None
    bias = m.example("bias")
    if tuple(bias.shape) not in ((logits.shape[-1],), (1, logits.shape[-1])) or bias.requires_grad:
        return m.fail(
            f"a bias of shape {list(bias.shape)}, expected one per expert, without gradient", "bias"
        )
    expected, found = _form_of(m).choice_dtype(logits, bias), m.example("sums").dtype
    if found != expected:
        return m.fail(f"experts are compared in {found}, expected {expected}", "bias")
    return None


def _is_by_logits(m: Match) -> bool:
    return m["values"].endswith("logits")


def _form_of(m: Match) -> Form:
    """Return the attributes of the op."""
    is_grouped = m["compared"] == "grouped"
    return Form(
        score=m["score"],
        num_choices=m["num_choices"],
        by_logits=_is_by_logits(m),
        scores_after=m["picked"] in ("scores_of_chosen", "scores_of_logits"),
        group_size=m.example("groups").shape[-1] if is_grouped else 0,
        num_kept=m["num_kept"] if is_grouped else 0,
        group_choices=m["group_choices"] if is_grouped and m["group_score"] == "several" else 1,
        fills_zero=is_grouped and m["filling"] in (0, None),
        normalizes=m["shares"] is not None,
        eps=float(m["eps"] or 0.0),
        least=float(m["least"] or 0.0),
        scale=1.0 if m["scale"] is None else float(m["scale"]),
        is_sorted=m["is_sorted"],
        scores_dtype=m.example("scores").dtype,
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
