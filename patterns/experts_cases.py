"""The spellings of experts that `patterns/experts.py` must find, and those that it must leave alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.rewriting.pattern import Example


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


def _apart(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *matrices: torch.Tensor
) -> torch.Tensor:
    """Return experts by copies of three stacks, in einsums."""
    w_gate, w_up, w_down = matrices
    rows, names = x[:, None].expand(-1, NUM_CHOICES, -1).reshape(-1, x.shape[-1]), ids.view(-1)
    gate, up = (torch.einsum("nd,ndf->nf", rows, w[names]) for w in (w_gate, w_up))
    down = torch.einsum("nf,nfd->nd", F.silu(gate) * up, w_down[names])
    return torch.einsum("tkd,tk->td", down.view(-1, NUM_CHOICES, x.shape[-1]), weights)


def _apart_weighed_later(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *matrices: torch.Tensor
) -> torch.Tensor:
    """Return experts by copies of three stacks that are stored as linear layers store theirs."""
    w_gate, w_up, w_down = matrices
    rows, names = x.repeat_interleave(NUM_CHOICES, 0)[..., None], ids.flatten()
    value = F.gelu(torch.bmm(w_gate.mT[names], rows)[..., 0]) * torch.bmm(w_up.mT[names], rows)[..., 0]
    down = torch.bmm(w_down.mT[names], value.unsqueeze(-1)).squeeze(-1)
    return (down.unflatten(0, (-1, NUM_CHOICES)) * weights.unsqueeze(-1)).sum(1)


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
    single = _inputs(device, torch.float32, is_stored_transposed=False)
    stacks = (
        *single[:3],
        *(part.detach().clone().requires_grad_() for part in single[3].chunk(2, -1)),
        single[4],
    )
    yield "by copies of three stacks, in einsums", (_apart, stacks)
    yield "by copies of three stacks, weighed later", (_apart_weighed_later, stacks)
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

    yield "the first product is read elsewhere", (escaping, inputs), "is also returned"


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
