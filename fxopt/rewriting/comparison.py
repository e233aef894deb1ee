"""How far values of a replacement are from the oracle's, beside those of the stock run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

ZERO = 64
"""What is smaller than the largest value of its sort by this many epsilons of the oracle's dtype is told as a zero.

It is judged as all else is."""
PART = 1 << 24
"""The items of two values that are compared at a time."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far one value of the replacement, and of the stock run, is from the oracle, and what is allowed.

    All in parts of the value's own norm; where `is_zero`, which has none, of the largest norm of its sort.
    """

    name: str
    error: float
    stock_error: float
    allowed: float
    is_zero: bool = False

    @property
    def excess(self) -> float:
        """How many times the allowed error was reached; above 1 the proof fails."""
        return self.error / self.allowed if math.isfinite(self.error) else math.inf


def compare_values(
    new: Mapping[str, torch.Tensor],
    stock: Mapping[str, torch.Tensor],
    oracle: Mapping[str, torch.Tensor],
    floor: float,
    suffix: str = "",
) -> list[Comparison]:
    """Return a comparison for each value of `oracle`, by name; `floor` is allowed whatever the error of `stock`.

    Values whose names begin with the same word are of one sort. `new` may lack some.
    """
    norms = {name: _norm(value) for name, value in oracle.items()}
    scales: dict[str, float] = {}
    for name, norm in norms.items():
        sort = name.split()[0]
        scales[sort] = max(scales.get(sort, 0.0), norm)
    comparisons: list[Comparison] = []
    for name, exact in oracle.items():
        compared = compare_value(f"{name}{suffix}", new.get(name), stock[name], exact, floor)
        comparisons.append(_in_parts_of(compared, exact.dtype, norms[name], scales[name.split()[0]]))
    return comparisons


def _in_parts_of(compared: Comparison, dtype: torch.dtype, norm: float, scale: float) -> Comparison:
    """Return `compared` in parts of `scale` where its value, of `norm`, is a zero beside it; it judges the same."""
    is_float = dtype.is_floating_point or dtype.is_complex
    if not is_float or not scale or not math.isfinite(norm) or not math.isfinite(scale):
        return compared
    if norm > ZERO * torch.finfo(dtype).eps * scale:
        return compared
    part = (norm or 1.0) / scale
    error, stock_error, allowed = (
        part * figure for figure in (compared.error, compared.stock_error, compared.allowed)
    )
    return Comparison(compared.name, error, stock_error, allowed, is_zero=True)


def _norm(value: torch.Tensor) -> float:
    if not (value.is_floating_point() or value.is_complex()):
        return 0.0
    parts = (part.abs().pow(2).sum() for part in _slices_of(value))
    return sum(parts, torch.zeros((), device=value.device)).sqrt().item()


def compare_value(
    name: str, new: torch.Tensor | None, stock: torch.Tensor, oracle: torch.Tensor, floor: float
) -> Comparison:
    """Return how far `new`, or that there is none, and `stock` are from `oracle`."""
    if new is None:
        return Comparison(
            f"{name} (none: nothing the replacement returns depends on it)", math.inf, 0.0, floor
        )
    if new.shape != oracle.shape:
        return Comparison(f"{name} (shape {list(new.shape)}, not {list(oracle.shape)})", math.inf, 0.0, floor)
    if new.dtype != stock.dtype:
        return Comparison(f"{name} (dtype {new.dtype}, not {stock.dtype})", math.inf, 0.0, floor)
    stock_error = _relative_error(stock, oracle)
    return Comparison(name, _relative_error(new, oracle), stock_error, max(2 * stock_error, floor))


def _relative_error(value: torch.Tensor, oracle: torch.Tensor) -> float:
    if not (oracle.is_floating_point() or oracle.is_complex()):
        return 0.0 if torch.equal(value, oracle) else math.inf
    square = distance = oracle.new_zeros(())
    for some, exact in zip(_slices_of(value), _slices_of(oracle), strict=True):
        square = square + exact.pow(2).sum()
        distance = distance + (some.to(exact.dtype) - exact).pow(2).sum()
    norm = square.sqrt().item()
    return distance.sqrt().item() / norm if norm else distance.sqrt().item()


def _slices_of(value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the items of `value` in parts, so that what is compared is not held once more as a whole."""
    return torch.split(value.reshape(-1), PART)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
