"""Experts that all tokens go through, all but the chosen ones with rows of zeros -> the op of the chosen ones.

Source: transformers `Llama4TextMoe`: scores of the experts that `topk` left out are sigmoid(-inf) = 0; the tokens' rows
are copied once per expert, weighed by its scores, and multiplied by its matrices. A row of zeros stays one through a
gated unit without biases, and sigmoid has no gradient at -inf, so that only the chosen rows are worth computing:
one row in E / K. Saved for backward: what `patterns/experts.py` says, of K rows per token instead of E.
Numerics: the rows are weighed in stock's dtypes before the first product; the op's own weights are ones.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from fxopt.graph.arguments import same_size
from fxopt.graph.vocabulary import filled
from fxopt.graph.vocabulary import reshape as reshape_tensor
from fxopt.kernels.experts import experts as fused_experts
from fxopt.kernels.route import Form
from fxopt.kernels.route import route as fused_route
from fxopt.patterns.expert_units import form_of, unit_of
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    attribute,
    cast,
    keep,
    matmul,
    maybe,
    named,
    number,
    operation,
    reshape,
    sigmoid,
    tensor,
    total,
    transpose,
)


def search() -> Term:
    """Return the sum over all experts of what they make of the tokens' rows, weighed by scattered scores."""
    x, logits = tensor("x", "T H"), tensor("logits", "T E")
    chosen = operation(torch.topk, logits, k=number("num_choices"), dim=-1, sorted=...)
    values, ids = keep(chosen[0], cheap=True), keep(chosen[1], cheap=True)
    nothing = operation(filled, shape=..., value=number("nothing"), dtype=..., device=...)
    scattered = operation(torch.scatter, nothing, number("scatter_dim"), ids, values)
    scores = named("scores", maybe(cast, sigmoid(maybe(cast, scattered))))
    copies = operation(torch.tile, x, dims=attribute("times"))
    shares = named("shares", reshape(transpose(scores)))
    rows = named("rows", reshape(copies * shares))
    down = matmul(unit_of(matmul(rows, tensor("w_up", "E H I"))), tensor("w_down", "E J H"))
    return total(down, dim=(-3,), keepdim=False)


def check(m: Match) -> Mismatch | None:
    """Refuse rows that are not each token's once per expert, and units that make something of zeros."""
    num_experts, width = m.example("w_up").shape[:2]
    tokens = m.example("x").shape[0]
    shape = m.example("rows").shape
    if len(shape) != 3 or shape[0] != num_experts or not same_size(shape[1], tokens):
        return m.fail(f"rows of shape {list(shape)}, expected [{num_experts}, {tokens}, {width}]", "rows")
    if tuple(m["times"]) != (num_experts, 1):
        return m.fail(f"x is repeated {m['times']} times, expected {(num_experts, 1)}", "x")
    if m.example("shares").shape[-1] != 1 or m.example("shares").dim() != 2:
        return m.fail(
            f"scores in the shape {list(m.example('shares').shape)}, expected one per row", "shares"
        )
    if m["nothing"] != -math.inf:
        return m.fail(f"scores of {m['nothing']} where nothing was chosen, expected -inf", "logits")
    if m["scatter_dim"] not in (1, -1):
        return m.fail("choices along the tokens, expected along the experts", "logits")
    if m["unit"].kwargs.get("up_offset"):
        return m.fail("an offset of up, expected a unit that is zero for rows of zeros", "unit")
    return None


def replace(m: Match) -> Call:
    """Return the op of each token's chosen experts, its rows weighed before."""
    num_choices, width = m["num_choices"], m.example("x").shape[1]
    dtypes = {"scores_dtype": m.example("scores").dtype, "dtype": m.example("scores").dtype}
    form = Form("sigmoid", num_choices, by_logits=True, scores_after=True)
    chosen = call(fused_route, m["logits"], None, **vars(form) | dtypes)
    shares, ids = call(operator.getitem, chosen, 0), call(operator.getitem, chosen, 1)
    rows = call(torch.mul, call(torch.unsqueeze, m["x"], dim=-2), call(torch.unsqueeze, shares, dim=-1))
    rows = call(reshape_tensor, rows, shape=(-1, width))
    ones = call(torch.ones_like, shares)
    y = call(
        fused_experts, rows, ids, ones, m["w_up"], m["w_down"], None, None, **form_of(m), dtype=m.output.dtype
    )
    if num_choices == 1:
        return y
    y = call(reshape_tensor, y, shape=(-1, num_choices, width))
    return call(torch.sum, y, dim=(-2,), keepdim=False)


NUM_EXPERTS = 4


def _all(
    gate: Callable[[torch.Tensor], torch.Tensor] = lambda gate: F.silu(gate),
    *,
    num_choices: int = 1,
    nothing: float = -math.inf,
    offset: float = 0.0,
) -> Callable[..., torch.Tensor]:
    """Return experts of all tokens, of (x, logits, w_up, w_down)."""

    def run(x: torch.Tensor, logits: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor) -> torch.Tensor:
        values, ids = torch.topk(logits, num_choices, dim=1)
        scores = torch.full_like(logits, nothing).scatter_(1, ids, values)
        scores = torch.sigmoid(scores.float()).to(logits.dtype)
        rows = x.repeat(NUM_EXPERTS, 1) * scores.transpose(0, 1).reshape(-1, 1)
        both = torch.bmm(rows.view(NUM_EXPERTS, -1, x.shape[-1]), w_up)
        first, up = both.chunk(2, dim=-1)
        down = torch.bmm((up + offset if offset else up) * gate(first), w_down).view(-1, w_down.shape[-1])
        return down.reshape(NUM_EXPERTS, -1, down.shape[-1]).sum(dim=0)

    return run


def _inputs(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    def draw(*shape: int) -> torch.Tensor:
        scale = shape[-2] ** -0.5 if len(shape) == 3 else 1.0
        return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()

    return draw(9, 16), draw(9, NUM_EXPERTS), draw(NUM_EXPERTS, 16, 48), draw(NUM_EXPERTS, 24, 16)


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield the form that Llama 4 has, and others like it."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield f"one of four, {name}", (_all(), _inputs(device, dtype))
        yield f"two of four, {name}", (_all(F.gelu, num_choices=2), _inputs(device, dtype))


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield code that must be left alone, and a part of the reason."""
    inputs = _inputs(device, torch.float32)
    yield "scores of zero where nothing was chosen", (_all(nothing=0.0), inputs), "expected -inf"


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield broken experts: they must be left alone, or be computed as they stand."""
    inputs = _inputs(device, torch.float32)
    yield "small scores where nothing was chosen", (_all(nothing=-1.0), inputs)
    yield "an offset of up", (_all(offset=1.0), inputs)


EXPERTS_OF_ALL = Pattern(
    name="experts_of_all",
    search=search,
    check=check,
    replace=replace,
    examples=examples,
    near_misses=near_misses,
    mutations=mutations,
    source="transformers models/llama4/modeling_llama4.py, Llama4TextMoe",
)
