"""join_rows: a dense weight with a factor beside it, by the kernel and by torch, to the bit."""

from __future__ import annotations

import pytest
import torch

from fxopt.kernels.lora_linear.joined import join_rows, launch_join

SIZES = [
    (1, 1, 1, 0, 64),
    (63, 63, 16, 0, 64),
    (130, 1000, 16, 16, 64),
    (70, 4096, 48, 0, 48),
    (9, 9000, 5, 3, 64),
]
"""Rows, columns, columns of the factor, where it starts, columns that are written beside the rows."""


def expected(rows: torch.Tensor, tail: torch.Tensor, start: int, beside: int) -> torch.Tensor:
    zeros = rows.new_zeros(rows.shape[0], beside)
    zeros[:, start : start + tail.shape[1]] = tail
    return torch.cat([rows, zeros], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_rows", "columns", "rank", "start", "beside"), SIZES, ids=str)
def test_rows_their_factor_and_zeros_are_written_and_nothing_else(
    num_rows: int, columns: int, rank: int, start: int, beside: int, dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(0)
    rows = torch.randn(num_rows, columns + 3, device=device).to(dtype)[:, :columns]
    for tail in (torch.randn(num_rows, rank), torch.randn(rank, num_rows).t()):
        tail = tail.to(device, dtype)
        out = torch.full((num_rows, columns + beside + 8), torch.nan, device=device, dtype=dtype)
        for run in (launch_join, join_rows):
            out.fill_(torch.nan)
            run(out[:, : columns + beside], rows, tail, start)
            assert torch.equal(out[:, : columns + beside], expected(rows, tail, start, beside))
            assert out[:, columns + beside :].isnan().all()


def test_without_a_factor_zeros_stand_beside_the_rows(device: str) -> None:
    rows = torch.randn(5, 7, device=device)
    out = torch.full((5, 9), torch.nan, device=device)
    join_rows(out, rows, None, 0)
    assert torch.equal(out, expected(rows, rows[:, :0], 0, 2))
