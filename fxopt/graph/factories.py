"""Canonical forms of tensors that hold one number."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.graph import vocabulary
from fxopt.graph.arguments import Form, is_contiguous, is_integer, rank_of
from fxopt.graph.arithmetic import Rule
from fxopt.graph.edit import Editor
from fxopt.graph.layout import new_sizes
from fxopt.graph.view import is_tensor, value_of

NOT_KEPT = (torch.bool, torch.complex64, torch.complex128)


def _factory(*names: str, value: float | None = None) -> Rule:
    """Return a rule for a new tensor of one number, whatever torch calls that; `names` are its parameters."""

    def rule(node: fx.Node, editor: Editor) -> Form | None:
        given = _bind(node, names)
        numbers = [value, *(given.get(name) for name in ("fill_value", "data", "s"))]
        number = next((item for item in numbers if item is not None), None)
        example = value_of(node)
        if not isinstance(number, int | float) or not is_tensor(node) or node.kwargs.get("requires_grad"):
            return None
        kwargs = {"dtype": example.dtype, "device": example.device}
        if example.dim() == 0:
            rounded = None if example.dtype in NOT_KEPT else torch.tensor(number, dtype=example.dtype).item()
            return None if rounded is None else Form(vocabulary.constant, (), {"value": rounded, **kwargs})
        like, sizes = given.get("input"), given.get("size")
        if isinstance(like, fx.Node) and is_tensor(like):
            sizes = new_sizes(node, like, range(rank_of(like)), editor)
        is_plain = is_contiguous(example) and not example.is_complex()
        if not is_plain or not isinstance(sizes, list | tuple) or not all(map(is_integer, sizes)):
            return None
        return Form(vocabulary.filled, (), {"shape": tuple(sizes), "value": number, **kwargs})

    return rule


def _bind(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the arguments of `node` by name; sizes may be given one by one where nothing follows them."""
    args = list(node.args)
    place = names.index("size") if names and names[-1] == "size" else None
    if place is not None and all(map(is_integer, args[place:])) and len(args) > place:
        args[place:] = [tuple(args[place:])]
    return dict(zip(names, args, strict=False)) | node.kwargs


RULES: dict[str, Rule] = {
    "full": _factory("size", "fill_value"),
    "tensor": _factory("data"),
    "scalar_tensor": _factory("s"),
    "new_full": _factory("self", "size", "fill_value"),
    "new_tensor": _factory("self", "data"),
    "full_like": _factory("input", "fill_value"),
    "zeros": _factory("size", value=0),
    "ones": _factory("size", value=1),
    "new_zeros": _factory("self", "size", value=0),
    "new_ones": _factory("self", "size", value=1),
    "zeros_like": _factory("input", value=0),
    "ones_like": _factory("input", value=1),
}
