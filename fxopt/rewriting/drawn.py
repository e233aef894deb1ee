"""What both comparisons of a proof run on: random inputs and gradients, of few tokens and of many."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import fx

from fxopt.graph import vocabulary
from fxopt.rewriting.modes import Autocast, uncached_autocast
from fxopt.rewriting.pattern import Match
from fxopt.rewriting.proof_sizes import Sizes, propose_few, propose_many
from fxopt.rewriting.runs import Values, read_by, stock_run
from fxopt.rewriting.samples import GRADIENT_SEED, Sampler

log = logging.getLogger("fxopt")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Sizes, and random inputs and gradients of these sizes."""

    sizes: Sizes
    inputs: Values
    gradients: list[torch.Tensor]


def draw_few(match: Match, autocast: Autocast) -> Drawn:
    """Return random values of the first sizes with which the stock nodes run."""
    *proposals, last = propose_few(match)
    for sizes in proposals:
        drawn = _try(match, sizes, autocast)
        if drawn is not None:
            return drawn
    drawn = _draw(match, last, autocast, is_checked=False)
    assert drawn is not None
    return drawn


def draw_many(match: Match, autocast: Autocast) -> Drawn | None:
    """Return random values of the largest sizes in which the stock nodes run, None where no more than few do."""
    found = (_try(match, sizes, autocast) for sizes in propose_many(match))
    return next((drawn for drawn in found if drawn is not None), None)


def _try(match: Match, sizes: Sizes, autocast: Autocast) -> Drawn | None:
    """Return what `_draw` does, None where the stock nodes do not run with these sizes: any op may refuse them."""
    try:
        return _draw(match, sizes, autocast)
    except Exception as error:
        log.debug("%s: the stock nodes do not run with %s: %s", match.pattern.name, sizes, error)
        return None


def _draw(match: Match, sizes: Sizes, autocast: Autocast, is_checked: bool = True) -> Drawn | None:
    """Return random inputs, and a gradient for each output, one that the output's dtype holds exactly.

    None where the outputs have another form than those of the match. Gradients are drawn apart from the inputs: along
    x itself the gradient of a norm is all cancellation.
    """
    sampler = Sampler(match, sizes)
    inputs = _with_equal_views({node: sampler.sample(node) for node in match.inputs})
    with torch.no_grad(), uncached_autocast(autocast):
        outputs = stock_run(match, sizes, None)(inputs)
        if is_checked and not all(map(_has_form, outputs, match.outputs)):
            return None
        outputs = read_by(match, lambda _: outputs)(inputs)
    drawn = Sampler(match, sizes, GRADIENT_SEED)
    return Drawn(
        sizes,
        inputs,
        [drawn.like(out) if out.is_floating_point() or out.is_complex() else out for out in outputs],
    )


def _with_equal_views(inputs: Values) -> Values:
    """Return `inputs`, those equal that are one integer tensor in two shapes: labels, and labels in rows."""
    for view, value in tuple(inputs.items()):
        source: Any = view.args[0] if view.target in (vocabulary.reshape, vocabulary.contiguous) else None
        if source in inputs and not value.is_floating_point() and value.numel() == inputs[source].numel():
            inputs[source] = value.reshape(inputs[source].shape)
    return inputs


def _has_form(value: torch.Tensor, node: fx.Node) -> bool:
    example = node.meta["example_value"]
    return value.dim() == example.dim() and value.dtype == example.dtype
