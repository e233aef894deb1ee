"""The order of the choices by expert, and where each stands in it; all of it computed on the device."""

from typing import NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """`rows[r]` is the choice in row r of the sorted ones, `places[s]` the row of choice s.

    `ends[e]` is where the rows of expert e end. All int32. Choices that name no expert come last, after `ends[-1]`.
    """

    rows: Tensor
    places: Tensor
    ends: Tensor


def order_of(ids: Tensor, num_experts: int) -> Order:
    """Return the order of the choices `ids`, those of one expert as they came.

    >>> [values.tolist() for values in order_of(torch.tensor([1, 2, 0, 1]), 2)]
    [[2, 0, 3, 1], [1, 3, 0, 2], [1, 3]]
    """
    sorted_ids, rows = torch.sort(ids, stable=True)
    experts = torch.arange(num_experts, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
    numbers = torch.arange(ids.numel(), device=ids.device, dtype=torch.int32)
    places = torch.empty_like(numbers).scatter_(0, rows, numbers)
    return Order(rows.to(torch.int32), places, ends)
