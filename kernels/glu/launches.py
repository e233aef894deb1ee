"""How the kernels are launched: blocks, warps, and tensors as rows."""

from typing import Any

from torch import Tensor

from fxopt.kernels.glu.form import Form, new_gradients, new_output, passes_at_limit, split_pair
from fxopt.kernels.glu.kernels import glu_backward_kernel, glu_forward_kernel
from fxopt.kernels.launch import as_rows, ceil_div, on_device
from fxopt.kernels.launcher import launch

BLOCKS = (4096, 2048, 1024, 512, 256, 128)
ELEMENTS_PER_WARP = 512  # 16 a thread: two loads of 16 bytes per input


def block_for(num_columns: int) -> int:
    """Return the widest block of which at most an eighth of a row's last one stays empty, else the narrowest.

    >>> block_for(18944), block_for(14336), block_for(1408), block_for(10**8)
    (4096, 2048, 512, 4096)
    """
    for block in BLOCKS:
        if ceil_div(num_columns, block) * block - num_columns <= num_columns // 8:
            return block
    return BLOCKS[-1]


def num_warps_for_block(block: int) -> int:
    """Return the warps of a program of `block` columns."""
    return max(1, block // ELEMENTS_PER_WARP)


def rows_of(form: Form, gate: Tensor, up: Tensor | None, *others: Tensor) -> list[Tensor]:
    """Return gate, up and `others` as 2-D tensors of as many rows, whose first columns are what kernels start at.

    One long row where all are contiguous and no half ends within. Interleaved, gate and up are the whole tensor.
    """
    tensors = [gate, *others] if up is None else [gate, up, *others]
    is_one_row = form.layout != "packed" and all(tensor.is_contiguous() for tensor in tensors)
    rows = [tensor.view(1, -1) if is_one_row else as_rows(tensor) for tensor in tensors]
    if up is not None:
        return rows
    both, *rest = rows
    pair = (both, both) if form.layout == "interleaved" else split_pair(both, None, form)
    return [*pair, *rest]


def launch_forward(gate: Tensor, up: Tensor | None, *attributes: Any) -> Tensor:
    """Return the unit, contiguous, by the kernel."""
    form = Form(*attributes).rounded(gate, up)
    y = new_output(gate, up)
    if y.numel() == 0:
        return y
    gate_rows, up_rows = rows_of(form, gate, up)
    num_columns = y.numel() // gate_rows.shape[0]
    block = block_for(num_columns)
    blocks_per_row = ceil_div(num_columns, block)
    with on_device(gate):
        launch(
            glu_forward_kernel,
            (gate_rows.shape[0] * blocks_per_row,),
            gate_rows,
            up_rows,
            y,
            gate_rows.stride(0),
            up_rows.stride(0),
            num_columns,
            blocks_per_row,
            *form.numbers(),
            **form.constants(),
            BLOCK=block,
            num_warps=num_warps_for_block(block),
            enable_fp_fusion=True,  # polynomials and products: a fused multiply-add only rounds less
        )
    return y


def launch_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    *attributes: Any,
    y: Tensor | None = None,
    memory: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients that are needed, by the kernel; of one tensor that holds both, as the first.

    y: contiguous memory that the unit itself is written to, or None. `memory`: contiguous memory that the gradients are
    written to, None for new. All of it may be dy, gate or up: a program reads all of its block before it writes there,
    and no other reads that.
    """
    *values, need_gate, need_up = attributes
    form = Form(*values).rounded(gate, up)
    dgate, dup = new_gradients(dy, gate, up, *attributes, memory=memory)
    if dy.numel() == 0:
        return dgate, dup
    gate_rows, up_rows, dy_rows = rows_of(form, gate, up, dy)
    num_rows = gate_rows.shape[0]
    num_columns = dy.numel() // num_rows
    block = block_for(num_columns)
    blocks_per_row = ceil_div(num_columns, block)
    if up is None:
        assert dgate is not None
        both = dgate.view(num_rows, -1)
        dgate_rows, dup_rows = (both, both) if form.layout == "interleaved" else split_pair(both, None, form)
        need_gate = need_up = True
    else:
        dgate_rows = gate_rows if dgate is None else dgate.view(num_rows, -1)
        dup_rows = up_rows if dup is None else dup.view(num_rows, -1)
    with on_device(gate):
        launch(
            glu_backward_kernel,
            (num_rows * blocks_per_row,),
            dy_rows,
            gate_rows,
            up_rows,
            dgate_rows,
            dup_rows,
            dy_rows if y is None else y,
            dy_rows.stride(0),
            gate_rows.stride(0),
            up_rows.stride(0),
            dgate_rows.stride(0),
            dup_rows.stride(0),
            num_columns,
            blocks_per_row,
            *form.numbers(),
            **form.constants(),
            NEED_GATE=need_gate,
            NEED_UP=need_up,
            PASSES_AT_LIMIT=passes_at_limit(),
            NEED_Y=y is not None,
            BLOCK=block,
            num_warps=num_warps_for_block(block),
            enable_fp_fusion=True,  # as in forward
        )
    return dgate, dup
