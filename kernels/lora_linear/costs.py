"""What the ops take: floating-point operations, memory for themselves, and bytes moved beside their large products."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxopt.kernels.lora_linear.extended import extends_backward, extends_forward, padded
from fxopt.kernels.lora_linear.form import Form, Weight, read_weights, split_lists
from fxopt.kernels.lora_linear.one_read import LEAST_BYTES, parts_bytes

PACKED_BYTES = 0.5
"""Of one four-bit value."""


class Call:
    """The arguments of the forward op, as far as costs go; a backward op's follow its `dys`."""

    def __init__(
        self,
        xs: list[Tensor],
        weights: list[Tensor],
        biases: list[Tensor | None],
        a: list[Tensor],
        b: list[Tensor],
        codes: list[Tensor | None],
        codings: list[str],
        widths: list[int],
        inputs: list[int],
        owners: list[int],
        scales: list[float],
        *rest: Any,
    ) -> None:
        self.xs, self.a, self.b = xs, a, b
        self.x = xs[0].reshape(-1, xs[0].shape[-1])
        self.layers: list[Weight] = read_weights(self.x, weights, codes, codings, widths)
        self.form = Form(tuple(inputs), tuple(owners), tuple(scales), xs[0].dtype)
        self.widths = widths
        self.last = rest[-1]
        """The dtype of the results, or the gradients needed."""

    @property
    def num_rows(self) -> int:
        """The rows of x."""
        return self.x.shape[0]

    @property
    def in_width(self) -> int:
        """The columns of x."""
        return self.x.shape[1]

    @property
    def rank(self) -> int:
        """The columns of x A^T, as longer rows hold them."""
        return padded(self.a[0].shape[0])

    @property
    def extends(self) -> bool:
        """Whether forward is one product of longer rows per layer."""
        return extends_forward(
            self.x, self.layers, self.a[0], self.b, self.form._replace(out_dtype=self.last)
        )

    @property
    def copied(self) -> int:
        """The rows of dense weights of which longer ones are copies."""
        return sum(layer.width for layer in self.layers if not layer.coding)

    @property
    def decoded_bytes(self) -> float:
        """What decoding each weight once reads and writes."""
        values = sum(layer.width for layer in self.layers if layer.coding) * self.in_width
        return values * (PACKED_BYTES + self.x.element_size())

    @property
    def largest_weight(self) -> int:
        """The values of the largest weight that is decoded."""
        return self.in_width * max((layer.width for layer in self.layers if layer.coding), default=0)

    def needs(self) -> tuple[bool, int, bool, bool]:
        """Return of the gradients whether x's is needed, of how many weights, of any A, and of any B."""
        xs, weights, _, a, b = split_lists(self.last, len(self.xs), len(self.layers))
        return bool(xs[0]), sum(map(bool, weights)), any(a), any(b)


def forward_flops(*arguments: Any) -> int:
    """Count the products with the weights and with both factors of each adapter."""
    call = Call(*arguments)
    factors = sum(factor.numel() for factor in (*call.a, *call.b))
    return 2 * call.num_rows * (call.in_width * sum(call.widths) + factors)


def backward_flops(dys: Any, *arguments: Any) -> int:
    """Count the products of the gradients that are needed, and of what these read."""
    call = Call(*arguments)
    need_x, num_weights, need_a, need_b = call.needs()
    of_a, of_b = (sum(factor.numel() for factor in factors) for factors in (call.a, call.b))
    base = call.in_width * sum(call.widths) * (need_x + num_weights / len(call.layers))
    # dY B for dX and dA, x A^T for dB, and one product each for dX, dA and dB
    factors = of_b * (need_x or need_a) + of_a * need_b + of_a * need_x + of_a * need_a + of_b * need_b
    return int(2 * call.num_rows * (base + factors))


def forward_workspace(*arguments: Any) -> int:
    """Return the bytes of longer rows and of the largest weight beside them, or of one that is decoded."""
    call = Call(*arguments)
    size = call.x.element_size()
    if not call.extends:
        return call.largest_weight * size
    width = call.in_width + call.rank
    return size * width * (call.num_rows + max(layer.width for layer in call.layers))


def backward_workspace(dys: list[Tensor], *arguments: Any) -> int:
    """Return the bytes of longer rows, and of the weights under them or of the sums that come later."""
    call = Call(*arguments)
    need_x, _, need_a, need_b = call.needs()
    size = call.x.element_size()
    rows = [call.x, *(dy.reshape(-1, dy.shape[-1]) for dy in dys)]
    parts = max(map(_parts_of, rows)) * call.rank if need_a or need_b else 0
    if not need_x:
        return parts
    if not extends_backward(call.x, rows[1:], call.layers, call.a[0], call.form):
        return max(call.largest_weight * size, parts)
    width = sum(call.widths) + call.rank
    return call.num_rows * width * size + max(width * call.in_width * size, parts)


def _parts_of(rows: Tensor) -> int:
    """Return the bytes, per column of a factor, of what one read of `rows` sums up in parts."""
    if rows.numel() * rows.element_size() < LEAST_BYTES or rows.device.type == "cpu":
        return 0
    return parts_bytes(rows, 1)


def forward_moved(*arguments: Any) -> int:
    """Return the bytes of decoding, of reading x for the adapters, and of longer rows or of sums."""
    call = Call(*arguments)
    longer = (call.num_rows + 2 * call.copied) * (call.in_width + call.rank)
    sums = 2 * call.num_rows * sum(call.widths[owner] for owner in call.form.owners)
    items = call.num_rows * call.in_width + (longer if call.extends else sums)
    return int(call.decoded_bytes + items * call.x.element_size())


def backward_moved(dys: list[Tensor], *arguments: Any) -> int:
    """Return the bytes of decoding, of reading x and dY for the adapters, and of longer rows or of sums."""
    call = Call(*arguments)
    need_x, _, need_a, need_b = call.needs()
    rows = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    items, moved = 0, 0.0
    if need_x or need_a or need_b:
        items += call.num_rows * sum(call.widths)
    if need_a or need_b:
        items += call.num_rows * call.in_width
    if need_x:
        moved += call.decoded_bytes
        extends = extends_backward(call.x, rows, call.layers, call.a[0], call.form)
        longer = call.num_rows * (sum(call.widths) + call.rank) + 2 * call.copied * call.in_width
        sums = 2 * call.num_rows * call.in_width * len(call.layers)
        items += longer if extends else sums
    return int(moved + items * call.x.element_size())


def forward_launches(*arguments: Any) -> int:
    """Return the kernels of forward: of longer rows, of their weights and products, or of sums."""
    call = Call(*arguments)
    if call.extends:
        return 1 + 2 * len(call.layers)
    return len(call.layers) + _num_decoded(call) + len(call.xs) + len(call.b)


def backward_launches(dys: list[Tensor], *arguments: Any) -> int:
    """Return the kernels of the gradients that are needed: two per layer for that of x, one per narrow product."""
    call = Call(*arguments)
    need_x, num_weights, need_a, need_b = call.needs()
    narrow = len(call.b) * need_b + len(call.xs) * (need_b + need_a)
    if not need_x:
        return num_weights + narrow + len(call.b) * need_a
    rows = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    if extends_backward(call.x, rows, call.layers, call.a[0], call.form):
        return num_weights + narrow + 2 * len(call.layers) + 2
    return num_weights + narrow + len(call.layers) + _num_decoded(call) + len(call.b) + 1


def _num_decoded(call: Call) -> int:
    return sum(bool(layer.coding) for layer in call.layers)
