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
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.graph.arguments import same_size
from fxopt.graph.vocabulary import cast as cast_tensor
from fxopt.kernels.experts import experts as fused_experts
from fxopt.patterns.expert_units import form_of, unit_of
from fxopt.rewriting.pattern import Call, Example, Match, Mismatch, Pattern, call
from fxopt.rewriting.terms import (
    Term,
    cast,
    choice,
    either,
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
    unsqueeze,
)


def search() -> Term:
    """Return the weighed sum over each token's choices, the experts in order or by copies of their matrices."""
    x, ids, weights = tensor("x", "T H"), tensor("ids", "S"), tensor("weights", "S")
    in_order = _in_order(x, ids, weights)
    rows = either(in_order, _by_copies(x, ids, weights))
    choices = named("choices", reshape(rows))
    return maybe(cast, total(choices, dim=(-2,), keepdim=False))


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


def _by_copies(x: Term, ids: Term, weights: Term) -> Term:
    """Return the weighed rows of the experts as batched products compute them."""

    def product(value: Term, name: str) -> Term:
        w = tensor(f"w_{name}")[ids]
        found = choice(
            f"{name}_side",
            left=_only_one(matmul(w, unsqueeze(value, -1)), -1),
            right=_only_one(matmul(unsqueeze(value, -2), w), -2),
        )
        found = named(f"{name}_product", found)
        return maybe(lambda inner: inner + tensor(f"b_{name}")[ids], found)

    repeated = operation(torch.repeat_interleave, x, number("num_choices"), dim=-2)
    down = product(unit_of(product(repeated, "up")), "down")
    return down * unsqueeze(weights, -1)


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
    if len(shape) != 3 or shape[1] != num_choices or not same_size(shape[0], x.shape[0]):
        return m.fail(
            f"rows are summed in the shape {list(shape)}, expected [{x.shape[0]}, {num_choices}, H]",
            "choices",
        )
    tensors = [name for name in ("up_product", "down_product", "b_up", "b_down") if m[name] is not None]
    dtypes = {m.example(name).dtype for name in tensors}
    if len(dtypes) > 1 or not w_up.is_floating_point():
        return m.fail(f"products and biases of {len(dtypes)} dtypes, expected floats of one", "w_up")
    if w_up.dim() != 3 or w_down.dim() != 3:
        return m.fail(f"weights of {w_up.dim()} and {w_down.dim()} dims, expected 3", "w_up")
    ranks = [m.example(name).dim() for name in ("b_up", "b_down") if m[name] is not None]
    if any(rank != 2 for rank in ranks):
        return m.fail(f"biases of {ranks[0]} dims, expected a row per expert", "b_up", "b_down")
    return None


def _one_more(last: Any) -> Any:
    return None if last is None else last + 1


def replace(m: Match) -> Call:
    """Return one call of the fused op, its result in the dtype of stock's."""
    weights: list[Any] = []
    for side in ("up", "down"):
        w, dtype = m[f"w_{side}"], m.example(f"{side}_product").dtype
        if m.example(f"w_{side}").dtype != dtype:
            w = call(cast_tensor, w, dtype=dtype)  # as autocast does
        weights.append(call(torch.transpose, w, dim0=-2, dim1=-1) if m[f"{side}_side"] == "left" else w)
    return call(
        fused_experts,
        m["x"],
        m["ids"],
        m["weights"],
        *weights,
        m["b_up"],
        m["b_down"],
        **form_of(m),
        dtype=m.output.dtype,
    )


def _default_gate(up: torch.Tensor) -> torch.Tensor:
    gate, up = up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _clamped_gate(up: torch.Tensor) -> torch.Tensor:
    gate, up = up[..., ::2], up[..., 1::2]
    gate, up = gate.clamp(min=None, max=0.7), up.clamp(min=-0.7, max=0.7)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


NUM_EXPERTS, NUM_CHOICES = 4, 2


def _ordered(
    gate: Callable[[torch.Tensor], torch.Tensor] = _default_gate,
    *,
    bias: bool = False,
    is_stored_transposed: bool = True,
    masks: bool = False,
    num_experts: int = NUM_EXPERTS,
    num_counted: int | None = None,
    num_choices: int = NUM_CHOICES,
    num_summed: int | None = None,
    restore: Callable[..., torch.Tensor] | None = None,
) -> Callable[..., torch.Tensor]:
    """Return experts as grouped products of (x, ids, weights, w_up, w_down, biases)."""
    last = (num_counted or num_experts) - 1

    def product(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x.to(w.dtype), w.transpose(-2, -1) if is_stored_transposed else w, offs=ends)

    def run(
        x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *matrices: torch.Tensor
    ) -> torch.Tensor:
        w_up, w_down, *biases = matrices
        sorted_ids, rows = torch.sort(ids.reshape(-1))
        selected = x[rows // num_choices]
        counted = sorted_ids.int() if x.is_cuda else sorted_ids.float()
        counts = torch.histc(counted, bins=num_experts, min=0, max=last)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        mask = None
        if masks:
            mask = (sorted_ids >= num_experts).unsqueeze(-1)
            sorted_ids.clamp_(max=num_experts - 1)
            selected.masked_fill_(mask, 0.0)
        up = product(selected, w_up, ends)
        up = up.add_(biases[0][sorted_ids]) if bias else up
        up = up.masked_fill(mask, 0.0) if mask is not None else up
        down = product(gate(up), w_down, ends)
        if bias:
            down.add_(biases[1][sorted_ids])
        down = down.masked_fill(mask, 0.0) if mask is not None else down
        down = down * weights.reshape(-1)[rows].unsqueeze(-1)
        places = torch.empty_like(rows)
        places[rows] = torch.arange(rows.size(0), device=rows.device)
        down = down[places] if restore is None else restore(down, rows, places)
        return down.view(-1, num_summed or num_choices, down.shape[-1]).sum(dim=1).to(x.dtype)

    return run


def _copied(
    gate: Callable[[torch.Tensor], torch.Tensor] = _default_gate,
    *,
    bias: bool = False,
    is_stored_transposed: bool = True,
) -> Callable[..., torch.Tensor]:
    """Return experts as batched products with copies of (x, ids, weights, w_up, w_down, biases)."""

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if is_stored_transposed:
            return torch.bmm(w, x.unsqueeze(-1)).squeeze(-1)
        return torch.bmm(x.unsqueeze(1), w).squeeze(1)

    def run(
        x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *matrices: torch.Tensor
    ) -> torch.Tensor:
        w_up, w_down, *biases = matrices
        ids = ids.reshape(-1)
        up = product(x.repeat_interleave(NUM_CHOICES, dim=0), w_up[ids])
        if bias:
            up.add_(biases[0][ids])
        down = product(gate(up), w_down[ids])
        if bias:
            down.add_(biases[1][ids])
        down = down * weights.reshape(-1).unsqueeze(-1)
        return down.view(x.shape[0], NUM_CHOICES, -1).sum(dim=1).to(x.dtype)

    return run


def _picked(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *matrices: torch.Tensor
) -> torch.Tensor:
    """Return experts by copies, in another spelling."""
    w_up, w_down = matrices
    names = ids.flatten()
    rows = x.repeat_interleave(NUM_CHOICES, 0)
    up, gate = torch.bmm(rows[:, None], w_up.mT[names])[:, 0].split(w_down.shape[-1], -1)
    rows = (w_down[names] @ (up * F.gelu(gate))[:, :, None])[..., 0]
    return (weights.flatten()[:, None] * rows).unflatten(0, (-1, NUM_CHOICES)).sum(-2)


def _inputs(
    device: torch.device,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    is_stored_transposed: bool = True,
    num_tokens: int = 9,
    num_experts: int = NUM_EXPERTS,
    num_choices: int = NUM_CHOICES,
    width: int = 16,
    inner: int = 24,
) -> tuple[torch.Tensor, ...]:
    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    x = torch.randn(num_tokens, width, dtype=dtype, device=device, requires_grad=True)
    ids = torch.randint(0, num_experts, (num_tokens, num_choices), device=device)
    weights = torch.rand(num_tokens, num_choices, dtype=dtype, device=device, requires_grad=True)
    shapes = [(width, 2 * inner), (inner, width)]
    matrices = [draw(num_experts, *(shape[::-1] if is_stored_transposed else shape)) for shape in shapes]
    biases = [draw(num_experts, shape[1]) for shape in shapes] if bias else []
    return x, ids, weights, *matrices, *biases


def examples(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield the forms that models capture, in the dtype in which torch has its grouped product."""
    half = torch.bfloat16
    yield "in order", (_ordered(), _inputs(device, half))
    yield "in order with masks", (_ordered(masks=True), _inputs(device, half))
    form: dict[str, Any] = {"bias": True, "is_stored_transposed": False}
    yield "in order, clamped", (_ordered(_clamped_gate, **form), _inputs(device, half, **form))
    masked = _ordered(_clamped_gate, **form, masks=True)
    yield "in order, clamped, masks", (masked, _inputs(device, half, **form))
    wide = _inputs(device, half)
    weights = torch.rand(9, NUM_CHOICES, device=device, requires_grad=True)
    yield "in order, weights in fp32", (_ordered(), (*wide[:2], weights, *wide[3:]))
    many: dict[str, Any] = {"num_experts": 80, "num_choices": 4}
    yield (
        "in order, more experts than tokens",
        (_ordered(**many), _inputs(device, half, num_tokens=40, **many)),
    )
    yield "by copies, picked", (_picked, _inputs(device, torch.float32))
    for dtype in (half, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield f"by copies, {name}", (_copied(), _inputs(device, dtype))
        yield f"by copies, clamped, {name}", (_copied(_clamped_gate, **form), _inputs(device, dtype, **form))


def near_misses(device: torch.device) -> Iterator[tuple[str, Example, str]]:
    """Yield code that must be left alone, and a part of the reason."""
    half = torch.bfloat16
    inputs = _inputs(device, half, num_tokens=8)
    yield (
        "summed over other rows",
        (_ordered(num_summed=4), inputs),
        "rows are summed in the shape [4, 4, 16], expected [8, 2, H]",
    )
    yield "fewer experts counted", (_ordered(num_counted=3), inputs), "3 experts are counted"
    yield (
        "left in order",
        (_ordered(restore=lambda down, rows, places: down), inputs),
        "expected getitem",
    )
    yield (
        "put back by the order itself",
        (_ordered(restore=lambda down, rows, places: down[rows]), inputs),
        "expected index_put",
    )

    def escaping(x: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen: list[torch.Tensor] = []

        def gate(up: torch.Tensor) -> torch.Tensor:
            seen.append(up)
            return _default_gate(up)

        return _ordered(gate)(x, *others), seen[0]

    yield "the first product is read elsewhere", (escaping, inputs), "is also read by the graph's output"


def mutations(device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield broken experts: they must be left alone, or be computed as they stand."""
    half = torch.bfloat16
    inputs = _inputs(device, half, num_tokens=8)
    x, ids, weights, w_up, w_down = inputs

    def of_other_rows(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return _ordered(restore=lambda down, rows, places: down[places] * places[:, None])(x, *others)

    def by_other_copies(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ids, weights, w_up, w_down = others
        flat = ids.reshape(-1)
        up = torch.bmm(w_up[flat], x.repeat_interleave(NUM_CHOICES, dim=0).unsqueeze(-1)).squeeze(-1)
        down = torch.bmm(w_down[flat.flip(0)], _default_gate(up).unsqueeze(-1)).squeeze(-1)
        return (down * weights.reshape(-1).unsqueeze(-1)).view(x.shape[0], NUM_CHOICES, -1).sum(dim=1)

    def of_repeated_rows(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return _copied()(x.repeat(1, 1), *others)

    def averaged(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return _copied()(x, *others) / NUM_CHOICES

    yield "scaled by its place", (of_other_rows, inputs)
    yield "another expert's second matrix", (by_other_copies, inputs)
    yield "of a copy", (of_repeated_rows, inputs)
    yield "averaged", (averaged, inputs)
    yield "weights that are ids", (_copied(), (x, ids, ids.to(half).requires_grad_(), w_up, w_down))
    yield "only one expert", (_copied(), (x, torch.zeros_like(ids), weights, w_up, w_down))


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
