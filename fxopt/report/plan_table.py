"""A plan as a table: the peak and the time, then per form of block what is saved, offloaded and computed again."""

from __future__ import annotations

from fxopt.report.memory import describe_budget, find_holdings, find_peak, find_saved, readable_budget
from fxopt.report.plan import SHARES, Decision, Plan
from fxopt.report.units import format_bytes

SHOWN = 12
"""So many residuals of one decision are listed, the largest first."""
SHOWN_AT_PEAK = 5


def render_plan(plan: Plan) -> str:
    """Return `plan` as text."""
    lines = [
        f"fxopt plan: {plan.model} on {plan.device}, lowering {plan.lowering}, {plan.tokens} tokens a call",
        describe_budget(plan),
        f"peak {format_bytes(plan.peak_bytes)} in the {plan.peak_at}",
        f"step {plan.step_ms:.1f} ms: "
        + ", ".join(f"{ms:.1f} ms {what}" for ms, what in step_parts(plan) if ms),
        f"{plan.measured_share:.0%} of the device's work from ops timed on it, the rest by estimate",
        *(f"  by datasheet: {reason}" for reason in plan.rooflines),
        f"the smallest possible peak is {format_bytes(plan.smallest_bytes)}; {format_bytes(plan.static_bytes)} "
        "are weights, buffers and the optimizer's state",
    ]
    if plan.host_bytes:
        lines.append(f"{format_bytes(plan.host_bytes)} wait in the host's memory")
    lines += _render_peak(plan)
    for number, decision in enumerate(plan.decisions):
        paths = [path for path, chosen in plan.layers if chosen == number]
        lines += ["", *_render_decision(paths, decision)]
    return "\n".join(lines) + "\n"


def step_parts(plan: Plan) -> list[tuple[float, str]]:
    """Return the milliseconds that a step's time is made of, and what each of them goes to."""
    blocks = [plan.decisions[number] for _, number in plan.layers]
    return [
        (sum(decision.compute_ms for decision in blocks), "the blocks"),
        (sum(decision.compute_ms for decision in plan.after), "what follows them"),
        (sum(decision.chunk_ms for decision in (*blocks, *plan.after)), "running some in chunks"),
        (plan.recompute_ms, "computing again"),
        (plan.wait_ms, "waiting for the host's memory"),
        (plan.update_ms, "the optimizer's"),
        (plan.idle_ms, "waiting for launches"),
    ]


def _render_peak(plan: Plan) -> list[str]:
    """Return what holds the peak, and of what waits for backward the most."""
    place = find_peak(plan)
    if place is None:
        return []
    instant = plan.timeline[place]
    lines = ["", f"at the peak, in the {instant.name}, live {format_bytes(instant.bytes)}:"]
    for holding in find_holdings(plan, instant):
        if holding.bytes:
            share = holding.bytes / instant.bytes
            lines.append(f"  {format_bytes(holding.bytes):>10}  {share:4.0%}  {holding.title}")
        if holding.key == "saved":
            for value in find_saved(plan, place)[:SHOWN_AT_PEAK]:
                form = f"{value.residual.dtype}{list(value.residual.shape)}"
                blocks = f" x {value.blocks}" if value.blocks > 1 else ""
                lines.append(f"  {format_bytes(value.bytes):>10}        {value.residual.op}{blocks}  {form}")
    return lines


def summarize_plan(plan: Plan) -> str:
    """Return the figures of `plan` in one line."""
    return (
        f"budget {readable_budget(plan)}, predicted peak {format_bytes(plan.peak_bytes)} in the {plan.peak_at}, "
        f"{format_bytes(plan.static_bytes)} of it weights, buffers and the optimizer's state; smallest possible "
        f"peak {format_bytes(plan.smallest_bytes)}"
    )


def _render_decision(paths: list[str], decision: Decision) -> list[str]:
    where = paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]} ({len(paths)} blocks)"
    lines = [
        f"{where}:",
        f"  saves {format_bytes(decision.saved_bytes)} each, "
        + (f"offloads {format_bytes(decision.offloaded_bytes)}, " if decision.offloaded_bytes else "")
        + f"computes again for {decision.recompute_ms:.2f} ms on top of {decision.compute_ms:.2f} ms",
    ]
    if decision.chunks > 1:
        lines.append(
            f"  runs its widest part in {decision.chunks} chunks of tokens, {decision.chunk_ms:.2f} ms more"
        )
    if decision.part_of:
        again = SHARES - decision.sixteenths
        lines.append(
            f"  computes {again}/{SHARES} of the rows of {decision.part_of} again, the others are kept"
        )
    parts = (
        ("saved", decision.saved),
        ("offloaded", decision.offloaded),
        ("recomputed", decision.recomputed),
    )
    rows = [(name, r) for name, part in parts for r in part]
    shown = [
        (name, r) for name, part in parts for r in sorted(part, key=lambda residual: -residual.bytes)[:SHOWN]
    ]
    width = max((len(residual.op) for _, residual in shown), default=0)
    for action, residual in shown:
        form = f"{residual.dtype}{list(residual.shape)}"
        time = f"  {residual.recompute_ms:.3f} ms" if action == "recomputed" else ""
        place = f"  {residual.location}" if residual.location else ""
        lines.append(
            f"  {action:10}  {residual.op:{width}}  {format_bytes(residual.bytes):>10}  {form}{time}{place}"
        )
    left = len(rows) - len(shown)
    return lines + ([f"  and {left} more, smaller"] if left else [])
