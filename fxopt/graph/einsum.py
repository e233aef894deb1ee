"""The canonical form of an einsum of two tensors that is one product of matrices: that product, and its transposes.

Torch computes it so. Sums in more than one letter, and products with several letters on a side, stay einsums.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.graph.arguments import Form, rank_of, same_size
from fxopt.graph.arithmetic import Rule
from fxopt.graph.edit import Editor
from fxopt.graph.torch_private import TORCH_LINEAR
from fxopt.graph.view import is_tensor, value_of


def _einsum(node: fx.Node, editor: Editor) -> Form | None:
    equation, operands = node.args[0] if node.args else None, list(node.args[1:])
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if (
        not isinstance(equation, str)
        or len(operands) != 2
        or node.kwargs
        or not all(map(is_tensor, operands))
    ):
        return None
    a, b = operands
    letters = _letters_of(equation, a, b)
    return None if letters is None or a is b else _Product(node, editor, a, b, *letters).form()


def _letters_of(equation: str, a: Any, b: Any) -> tuple[str, str, str] | None:
    """Return the letters of both operands and of the result, if each dim of a tensor has a letter of its own."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    first, comma, second = left.partition(",")
    parts = (first, second, out)
    is_plain = all(part.isalpha() and len(set(part)) == len(part) for part in parts)
    fits = (len(first), len(second)) == (rank_of(a), rank_of(b)) if is_plain else False
    return parts if arrow and comma and fits and set(out) <= {*first, *second} else None


class _Product:
    """An einsum as a product: its letters by what becomes of them."""

    def __init__(
        self, node: fx.Node, editor: Editor, a: Any, b: Any, first: str, second: str, out: str
    ) -> None:
        self.node, self.editor = node, editor
        self.a, self.b, self.first, self.second, self.out = a, b, first, second, out
        self.batch = [item for item in out if item in first and item in second]
        self.summed = [item for item in first if item in second and item not in out]
        self.rows = [item for item in first if item not in second]
        self.columns = [item for item in second if item not in first]

    def form(self) -> Form | None:
        """Return the last node of the product, those before it inserted; None if it is no such product."""
        sides = {*self.batch, *self.summed, *self.rows, *self.columns}
        dtypes = {value_of(item).dtype for item in (self.a, self.b)}
        is_whole = len(sides) == len({*self.first, *self.second}) and set(self.out) == sides - set(
            self.summed
        )
        if not is_whole or len(self.summed) != 1 or len(dtypes) != 1:
            return None
        (summed,) = self.summed
        first, second = value_of(self.a).shape, value_of(self.b).shape
        if not same_size(first[self.first.index(summed)], second[self.second.index(summed)]):
            return None  # one of them is repeated
        if not self.batch:
            return self._by_matrix(summed)
        is_small = len(self.rows) <= 1 and len(self.columns) <= 1
        return self._by_batch(summed) if is_small and self.rows + self.columns else None

    def _by_matrix(self, summed: str) -> Form | None:
        """Return rows of the first tensor multiplied by a matrix, the second one."""
        is_last = self.first[-1] == summed and self.out == "".join((*self.rows, *self.columns))
        if not is_last or len(self.second) != 2 or len(self.columns) != 1:
            return None
        if self.second[1] == summed:
            return Form(TORCH_LINEAR, (self.a, self.b, None), {})
        return Form(torch.matmul, (self.a, self.b), {})

    def _by_batch(self, summed: str) -> Form:
        """Return a product per item of the batch; a vector has a dim of size 1 for the length of it."""
        transposed = bool(self.columns) and self.second.index(self.columns[0]) < self.second.index(summed)
        right = self._ordered(
            self.b,
            self.second,
            [*self.batch, *self.columns, summed] if transposed else [*self.batch, summed, *self.columns],
        )
        left = self._ordered(self.a, self.first, [*self.batch, *self.rows, summed])
        if not self.rows and transposed:
            operands, dim = (right, self._insert(torch.unsqueeze, left, dim=-1)), -1
        elif not self.rows:
            operands, dim = (self._insert(torch.unsqueeze, left, dim=-2), right), -2
        elif not self.columns:
            operands, dim = (left, self._insert(torch.unsqueeze, right, dim=-1)), -1
        else:
            right = self._insert(torch.transpose, right, dim0=-2, dim1=-1) if transposed else right
            operands, dim = (left, right), None
        made = [*self.batch, *self.rows, *self.columns]
        steps: list[tuple[Any, dict[str, Any]]] = [(torch.squeeze, {"dim": dim})] if dim is not None else []
        steps += self._reordering("".join(made), self.out)
        if not steps:
            return Form(torch.matmul, operands, {})
        value = self._insert(torch.matmul, *operands)
        for target, kwargs in steps[:-1]:
            value = self._insert(target, value, **kwargs)
        return Form(steps[-1][0], (value,), steps[-1][1])

    def _ordered(self, x: fx.Node, letters: str, wanted: list[str]) -> fx.Node:
        for target, kwargs in self._reordering(letters, "".join(wanted)):
            x = self._insert(target, x, **kwargs)
        return x

    @staticmethod
    def _reordering(letters: str, wanted: str) -> list[tuple[Any, dict[str, Any]]]:
        """Return the transpose that brings dims from one order to another, none where they are in it."""
        rank = len(letters)
        dims = tuple(letters.index(item) - rank for item in wanted)
        moved = [place - rank for place, dim in enumerate(dims) if dim != place - rank]
        if len(moved) == 2:
            return [(torch.transpose, {"dim0": moved[0], "dim1": moved[1]})]
        return [(torch.permute, {"dims": dims})] if moved else []

    def _insert(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        values, product = [value_of(item) for item in args], value_of(self.node)
        mode = getattr(values[0], "fake_mode", None) or contextlib.nullcontext()
        with mode, torch.set_grad_enabled(product.requires_grad):
            example: Tensor = target(*values, **kwargs)
            if target is torch.matmul:
                example = example.to(product.dtype)  # autocast may be on where it stands
        return self.editor.insert_before(self.node, target, args, kwargs, example)


RULES: dict[str, Rule] = {"einsum": _einsum}
