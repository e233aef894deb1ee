"""A choice among the experts of the best groups alone: what marks these, and how all others are left out."""

from __future__ import annotations

import torch

from fxopt.graph.vocabulary import filled
from fxopt.kernels.route.form import Form, is_grouping
from fxopt.rewriting.pattern import Match, Mismatch
from fxopt.rewriting.terms import (
    Term,
    attribute,
    cast,
    choice,
    either,
    expand,
    fixed,
    largest,
    masked_fill,
    maybe,
    named,
    number,
    operation,
    reshape,
    total,
    unsqueeze,
    where,
)


def of_best_groups(values: Term) -> Term:
    """Return `values`, those of other groups than the best ones filled with a number, or multiplied by 0."""
    groups = named("groups", reshape(values))
    largest_ones = operation(torch.topk, groups, k=number("group_choices"), dim=-1, sorted=...)[0]
    group_scores = choice(
        "group_score",
        several=total(largest_ones, keepdim=False),
        one=either(largest(groups, -1, False), operation(torch.amax, groups, dim=(-1,), keepdim=False)),
    )
    group_scores = named("group_scores", group_scores)
    best = operation(torch.topk, group_scores, k=number("num_kept"), dim=-1, sorted=...)[1]
    blank = operation(filled, shape=..., value=attribute("blank"), dtype=..., device=...)
    marks = operation(torch.scatter, blank, number("mark_dim"), best, attribute("mark"))
    by_group = _flags(marks, "group")
    spread = unsqueeze(by_group, -1)
    repeated = operation(torch.repeat_interleave, by_group, number("repeats"), dim=-1)
    of_members = _flags(spread, "member")
    by_expert = _flags(either(reshape(expand(spread)), repeated), "expert")
    return either(
        _left_out(either(values, reshape(groups)), by_expert), reshape(_left_out(groups, of_members))
    )


def _flags(marks: Term, name: str) -> Term:
    """Return `marks` as flags, maybe the opposite ones."""
    found = maybe(
        lambda term: either(cast(term, torch.bool), operation(torch.ne, term, 0), _greater(term)), marks
    )
    opposite = either(
        operation(torch.logical_not, found), operation(torch.eq, marks, 0), operation(torch.eq, marks, False)
    )
    return choice(f"{name}_flags", opposite=opposite, same=found)


def _greater(term: Term) -> Term:
    return operation(torch.gt, term, 0)


def _left_out(values: Term, flags: Term) -> Term:
    filling = either(
        fixed("filling"), operation(filled, shape=..., value=number("filling"), dtype=..., device=...)
    )
    return choice(
        "way",
        filled=masked_fill(values, flags, filling),
        kept=where(flags, values, filling),
        hidden=where(flags, filling, values),
        multiplied=values * flags,
    )


def check_groups(m: Match, form: Form) -> Mismatch | None:
    """Refuse groups that are not the op's, and marks that are not those of the best ones."""
    groups, num_experts = m.example("groups"), m.example("logits").shape[-1]
    is_plain = (
        groups.dim() == m.example("logits").dim() + 1 and groups.shape[-2] * groups.shape[-1] == num_experts
    )
    is_reduced = m.example("group_scores").dim() == groups.dim() - 1
    if not (is_plain and is_reduced) or not is_grouping(form, num_experts):
        return m.fail(
            f"groups of shape {list(groups.shape)}, {m['num_kept']} kept by their {form.group_choices} largest, "
            "expected enough of them, by one or two",
            "groups",
        )
    if m["filling"] not in (0, -torch.inf, None):
        return m.fail(f"other groups are filled with {m['filling']}, expected 0 or -inf", "groups")
    if m["mark_dim"] not in (-1, groups.dim() - 2):
        return m.fail("groups are marked along the tokens", "groups")
    if m["repeats"] not in (None, groups.shape[-1]):
        return m.fail(f"marks are repeated {m['repeats']} times, expected {groups.shape[-1]}", "groups")
    turns = sum(m[f"{name}_flags"] == "opposite" for name in ("group", "member", "expert"))
    is_best_marked = bool(m["mark"]) != bool(turns % 2)
    if bool(m["mark"]) == bool(m["blank"]) or is_best_marked != (m["way"] in ("kept", "multiplied")):
        return m.fail("other groups are kept, or all are", "groups")
    if m["way"] == "multiplied" and 1 not in (m["mark"], m["blank"]):
        return m.fail(f"the best groups are multiplied by {m['mark']}, expected 1", "groups")
    return None
