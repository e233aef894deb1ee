"""One training step against another: losses, all gradients, and which of the two is off where they differ."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

MOST_ERROR = 1e-4
"""Relative, of the loss and of each gradient in fp32: beyond it a row is judged by a float64 run."""
MOST_RATIO = 3.0
"""By how much our distance to float64 may exceed stock's where the two differ beyond `MOST_ERROR`."""
NOISE = 1e-3
"""Gradients below this share of the largest count with that share's norm: `MOST_ERROR` is then two roundings of the
largest, as what remains of a gradient that is zero in exact arithmetic (a key's bias) differs by."""


@dataclasses.dataclass
class Step:
    """Loss and gradients of one training step."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def run_step(model: Any, batch: dict[str, Any], seed: int = 0) -> Step:
    """Run forward and backward once."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = loss_of(model(**batch))
    loss.backward()
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(loss.detach().clone(), gradients)


def loss_of(output: Any) -> torch.Tensor:
    """Return the model's loss, or where it has none a weighted sum of its first floating-point output."""
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    values = output.values() if hasattr(output, "values") else output
    first = next(v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())
    weights = torch.linspace(-1, 1, first.numel(), dtype=first.dtype).reshape(first.shape)
    return (first * weights).mean()


def worst_error(ours: Step, theirs: Step) -> tuple[float, str]:
    """Return the largest relative error of a gradient that both have, and whose it is."""
    largest = max((float(each.norm()) for each in theirs.gradients.values()), default=0.0)
    errors = {
        name: relative(ours.gradients[name], gradient, NOISE * largest)
        for name, gradient in theirs.gradients.items()
        if name in ours.gradients
    }
    worst = max(errors, key=lambda name: errors[name], default="")
    return errors.get(worst, 0.0), worst


def relative(value: torch.Tensor, reference: torch.Tensor, least: float = 0.0) -> float:
    """Return the error of `value` as a ratio of norms; NaN where stock has NaN too is no error."""
    value, reference = value.double(), reference.double()
    if torch.equal(value.nan_to_num(), reference.nan_to_num()):
        return 0.0
    error = float((value - reference).norm() / max(float(reference.norm()), least, 1e-30))
    return error if error == error else float("inf")


def judge_by_double(
    stock: Any, batch: dict[str, Any], ours: Step, theirs: Step, worst: str
) -> tuple[str, float | None]:
    """Return why our step is wrong, or "", and how far stock's own gradient of `worst` is off a float64 run.

    Wrong is what is further off that run than stock's own by more than rounding in another order explains.
    """
    double = copy.deepcopy(stock).double()
    if hasattr(double, "set_experts_implementation"):
        double.set_experts_implementation("eager")  # torch's grouped product takes no float64
    try:
        exact = run_step(double, {name: _double(value) for name, value in batch.items()})
    except Exception as error:
        return f"differs from stock, and no float64 run decides: {one_line(error)}", None
    largest = max((float(each.norm()) for each in exact.gradients.values()), default=0.0)
    verdict, own_of_worst = "", None
    for name, reference in {"loss": exact.loss, **exact.gradients}.items():
        mine = ours.loss if name == "loss" else ours.gradients.get(name)
        stocks = theirs.loss if name == "loss" else theirs.gradients.get(name)
        if mine is None or stocks is None:
            continue
        error, own = (relative(each, reference, NOISE * largest) for each in (mine, stocks))
        if name == worst:
            own_of_worst = float(f"{own:.2g}")
        if not verdict and error > max(MOST_RATIO * own, MOST_ERROR):
            verdict = f"{name} is {error:.1e} off a float64 run, stock {own:.1e}"
    return verdict, own_of_worst


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def one_line(error: BaseException) -> str:
    """Return type and text of an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]
