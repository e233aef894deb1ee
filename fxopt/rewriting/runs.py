"""Run the stock nodes of a match, or what replaces them, on given inputs in a given dtype, with gradients."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.graph import vocabulary
from fxopt.graph.torch_private import tree_map_only
from fxopt.graph.view import requires_grad
from fxopt.rewriting.pattern import Call, Match, Replacement
from fxopt.rewriting.proof_sizes import Sizes
from fxopt.rewriting.replacement import evaluate_call

SHAPED = (vocabulary.reshape, vocabulary.expand, vocabulary.filled)
Values = dict[fx.Node, Any]
Runner = Callable[[Values], list[torch.Tensor]]


def stock_run(match: Match, sizes: Sizes, dtype: torch.dtype | None) -> Runner:
    """Return a function that runs the matched nodes, every float cast going to `dtype` where it is given."""
    values = (*match.outputs, *match.exports.values())

    def run(inputs: Values) -> list[torch.Tensor]:
        known = dict(inputs)
        for node in match.nodes:
            args, kwargs = tree_map_only(fx.Node, known.__getitem__, (node.args, dict(node.kwargs)))
            args, kwargs = _resize((args, kwargs), node, sizes)
            if node.target is F.rms_norm and kwargs.get("eps") is None:
                kwargs["eps"] = torch.finfo(node.args[0].meta["example_value"].dtype).eps  # pyright: ignore
            args, kwargs = _recast((args, kwargs), dtype)
            assert callable(node.target)
            known[node] = node.target(*args, **kwargs)
        return [known[node] for node in values]

    return run


def _resize(arguments: Any, stock: fx.Node | Call, sizes: Sizes) -> Any:
    """Return arguments in which the sizes of a new shape are those of the samples; leading sizes and classes only.

    So are the numbers that integers are counted and compared by.
    """
    args, kwargs = arguments
    if sizes.numbers and isinstance(stock, fx.Node) and _counts(stock):
        return tree_map_only(int, lambda number: _resized(number, sizes), (args, kwargs))
    if stock.target not in SHAPED or not (sizes.numbers or sizes.classes):
        return args, kwargs
    shape = kwargs["shape"]
    given: Any = stock.kwargs["shape"]
    last = len(shape) - 1
    resized = tuple(
        (sizes.of(size) if place < last else sizes.classes.get(size, size))
        if isinstance(given[place], int)
        else size
        for place, size in enumerate(shape)
    )
    return args, {**kwargs, "shape": resized}


def _resized(number: int, sizes: Sizes) -> int:
    return number if isinstance(number, bool) else sizes.numbers.get(number, number)


def _counts(node: fx.Node) -> bool:
    """Return whether `node` counts integers into bins, compares or limits them, or lists the first ones."""
    if node.target in (torch.histc, torch.arange):
        return True
    value = (
        node.args[0].meta.get("example_value") if node.args and isinstance(node.args[0], fx.Node) else None
    )
    is_integer = isinstance(value, torch.Tensor) and not value.is_floating_point()
    return is_integer and node.target in (torch.clamp, operator.ge)


def _recast(arguments: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return arguments
    return tree_map_only(torch.dtype, lambda found: dtype if found.is_floating_point else found, arguments)


def replacement_run(replacement: Replacement, sizes: Sizes, dtype: torch.dtype | None) -> Runner:
    """Return a function that runs the replacement, its float dtypes all being `dtype` where it is given."""
    items = replacement if isinstance(replacement, tuple) else (replacement,)
    known_calls: dict[int, Call] = {}
    recast = [_recast_call(item, sizes, dtype, known_calls) for item in items]

    def run(inputs: Values) -> list[torch.Tensor]:
        known: dict[int, Any] = {}
        return [evaluate_call(item, inputs.__getitem__, None, known) for item in recast]

    return run


def _recast_call(item: Any, sizes: Sizes, dtype: torch.dtype | None, known: dict[int, Call]) -> Any:
    """Return a call of the replacement for samples of `sizes` and `dtype`; one that stands in two places stays one."""
    if not isinstance(item, Call):
        return item
    if id(item) not in known:
        args, kwargs = tree_map_only(
            Call, lambda inner: _recast_call(inner, sizes, dtype, known), (item.args, dict(item.kwargs))
        )
        args, kwargs = _recast(_resize((args, kwargs), item, sizes), dtype)
        known[id(item)] = Call(item.target, args, kwargs)
    return known[id(item)]


def read_by(match: Match, run: Runner) -> Runner:
    """Return `run` as what the pattern compares of its outputs."""
    read_out, num_outputs = match.pattern.read_out, len(match.outputs)
    if read_out is None:
        return run

    def read(inputs: Values) -> list[torch.Tensor]:
        found = run(inputs)
        return [*read_out(match, found[:num_outputs]), *found[num_outputs:]]

    return read


def run_with_gradients(
    run: Runner, inputs: Values, gradients: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the outputs by name, and the gradients of the inputs that require them in the graph.

    Raises:
        RuntimeError: the backward pass writes to the gradient that it is given, which others may read.
    """
    leaves = {node: _as_leaf(node, value) for node, value in inputs.items()}
    outputs = run(leaves)
    found = {f"output {place}": output.detach() for place, output in enumerate(outputs)}
    wanted = {
        node: leaf for node, leaf in leaves.items() if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    }
    pairs = [
        (output, gradient.to(output.dtype))
        for output, gradient in zip(outputs, gradients, strict=True)
        if output.requires_grad
    ]
    if wanted and pairs:
        sources, seeds = zip(*pairs, strict=True)
        given = [seed.clone() for seed in seeds]
        computed: tuple[Any, ...] = torch.autograd.grad(
            sources, list(wanted.values()), seeds, allow_unused=True
        )
        if not all(map(torch.equal, seeds, given)):
            raise RuntimeError(
                "the backward pass writes to the gradient that it is given, which others may read"
            )
        for node, leaf, gradient in zip(wanted, wanted.values(), computed, strict=True):
            found[f"gradient of {node.name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def _as_leaf(node: fx.Node, value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().requires_grad_(requires_grad(node))


def as_dtype(inputs: Values, dtype: torch.dtype) -> Values:
    """Return the float tensors of `inputs` in `dtype` and in their layout, all else as it is."""
    return {
        node: _laid_out_as(value, dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for node, value in inputs.items()
    }


def _laid_out_as(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `value` in `dtype` with the same strides: a plain cast would repeat what is expanded."""
    num_items = value.untyped_storage().nbytes() // value.element_size()
    stored = value.as_strided((num_items,), (1,), 0).to(dtype)
    return stored.as_strided(value.shape, value.stride(), value.storage_offset())
