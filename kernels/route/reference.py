"""The routing in plain torch: the specification, and its gradient."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxopt.kernels.launch import wide_dtype
from fxopt.kernels.route.form import Form

LINEAR_FROM = 20.0
"""Where torch's softplus returns what it is given."""


def route_reference(logits: Tensor, bias: Tensor | None = None, **attributes: Any) -> tuple[Tensor, Tensor]:
    """Return the weights, differentiable in the logits, and the ids of the chosen experts: [*, K] each."""
    form = Form(**attributes)
    scores = None if form.scores_after else _score(logits, form)
    choice = logits.detach() if form.by_logits or scores is None else scores.detach()
    choice = choice if bias is None else choice + bias.detach()
    ids = torch.topk(_keep_groups(choice, form), form.num_choices, dim=-1, sorted=form.is_sorted)[1]
    picked = _score(logits.gather(-1, ids), form) if scores is None else scores.gather(-1, ids)
    weights = picked.to(wide_dtype(picked.dtype))
    if form.normalizes:
        weights = weights / (weights.sum(-1, keepdim=True) + form.eps).clamp(min=form.least)
    return (weights * form.scale).to(form.dtype), ids


def plain_forward(logits: Tensor, bias: Tensor | None, *attributes: Any) -> tuple[Tensor, Tensor]:
    """Return the weights and ids, contiguous."""
    weights, ids = route_reference(logits, bias, **vars(Form(*attributes)))
    return weights.contiguous(), ids.contiguous()


def plain_backward(dweights: Tensor, logits: Tensor, ids: Tensor, *attributes: Any) -> Tensor:
    """Return the gradient of the logits."""
    form = Form(*attributes)
    wide = wide_dtype(logits.dtype)
    logits, found = logits.to(wide), torch.zeros(logits.shape, dtype=wide, device=logits.device)
    scores = logits.gather(-1, ids) if form.scores_after else logits
    scores = _score(scores, dataclasses.replace(form, scores_dtype=wide))
    picked = scores if form.scores_after else scores.gather(-1, ids)
    given = dweights.to(wide) * form.scale
    if form.normalizes:
        total = picked.sum(-1, keepdim=True) + form.eps
        divisor = total.clamp(min=form.least)
        through_sum = (given * picked).sum(-1, keepdim=True) / divisor**2
        given = given / divisor - torch.where(total >= form.least, through_sum, 0.0)
    if form.score != "softmax":
        return found.scatter(-1, ids, given * _derivative(logits.gather(-1, ids), picked, form))
    mean = (given * picked).sum(-1, keepdim=True)
    if form.scores_after:
        return found.scatter(-1, ids, picked * (given - mean))
    return scores * (found.scatter(-1, ids, given) - mean)


def _score(logits: Tensor, form: Form) -> Tensor:
    dtype = torch.promote_types(logits.dtype, form.scores_dtype)
    if form.score == "softmax":
        return F.softmax(logits, dim=-1, dtype=dtype).to(form.scores_dtype)
    wide = logits.to(dtype)
    scores = torch.sigmoid(wide) if form.score == "sigmoid" else F.softplus(wide).sqrt()
    return scores.to(form.scores_dtype)


def _derivative(logits: Tensor, scores: Tensor, form: Form) -> Tensor:
    """Return the derivative of scores that each hang on one logit alone."""
    if form.score == "sigmoid":
        return scores * (1 - scores)
    return torch.where(logits > LINEAR_FROM, 1.0, torch.sigmoid(logits)) / (2 * scores)


def _keep_groups(choice: Tensor, form: Form) -> Tensor:
    """Return what experts are compared by, those of other groups than the best ones left out or 0."""
    if not form.group_size:
        return choice
    groups = choice.unflatten(-1, (-1, form.group_size))
    largest = torch.topk(groups, form.group_choices, dim=-1)[0].sum(-1)
    best = torch.topk(largest, form.num_kept, dim=-1, sorted=False)[1]
    is_kept = torch.zeros_like(largest, dtype=torch.bool).scatter(-1, best, True)
    fill = 0.0 if form.fills_zero else -torch.inf
    return groups.masked_fill(~is_kept.unsqueeze(-1), fill).flatten(-2)
