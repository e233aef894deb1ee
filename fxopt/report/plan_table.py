"""A plan as a table: the peak and the time, then per form of block what is saved, offloaded and computed again."""

from __future__ import annotations

from fxopt.remat.budget import format_bytes
from fxopt.remat.records import Decision, Plan

SHOWN = 12
"""So many residuals of one decision are listed, the largest first."""


def render_plan(plan: Plan) -> str:
    """Return `plan` as text."""
    limit = "no limit" if plan.limit_bytes is None else f"limit {format_bytes(plan.limit_bytes)}"
    lines = [
        f"fxopt plan: {plan.model} on {plan.device}, lowering {plan.lowering}, {plan.tokens} tokens a call",
        f"budget {plan.budget} ({limit}): peak {format_bytes(plan.peak_bytes)} in the {plan.peak_at}, "
        f"step {plan.step_ms:.1f} ms, of these {plan.recompute_ms:.1f} ms computing again"
        + (f" and {plan.wait_ms:.1f} ms waiting for the host" if plan.wait_ms else ""),
        f"the smallest possible peak is {format_bytes(plan.smallest_bytes)}; {format_bytes(plan.static_bytes)} "
        "are weights, buffers and the optimizer's state",
    ]
    if plan.host_bytes:
        lines.append(f"{format_bytes(plan.host_bytes)} wait in the host's memory")
    for number, decision in enumerate(plan.decisions):
        paths = [path for path, chosen in plan.layers if chosen == number]
        lines += ["", *_render_decision(paths, decision)]
    return "\n".join(lines) + "\n"


def summarize_plan(plan: Plan) -> str:
    """Return the figures of `plan` in one line."""
    return (
        f"budget {plan.budget}, predicted peak {format_bytes(plan.peak_bytes)} in the {plan.peak_at}, "
        f"{format_bytes(plan.static_bytes)} of it weights, buffers and the optimizer's state; smallest possible "
        f"peak {format_bytes(plan.smallest_bytes)}"
    )


def _render_decision(paths: list[str], decision: Decision) -> list[str]:
    where = paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]} ({len(paths)} blocks)"
    lines = [
        f"{where}: saves {format_bytes(decision.saved_bytes)} each, "
        + (f"offloads {format_bytes(decision.offloaded_bytes)}, " if decision.offloaded_bytes else "")
        + f"computes again for {decision.recompute_ms:.2f} ms on top of {decision.compute_ms:.2f} ms"
    ]
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
