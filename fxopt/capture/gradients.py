"""What a compiled graph's gradients owe to stock: None where nothing was read, no second derivatives, none in part.

AOTAutograd makes one autograd node of a graph and fills the gradient of an output that nothing read with
zeros: every input that reaches such an output would get a gradient of zeros where stock leaves None. An output that
the graph itself computes from (the weights of attention, collected) gets the gradient of what reads it outside alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.capture import torch_tensors
from fxopt.capture.lowering import Lowering
from fxopt.errors import FxoptError
from fxopt.graph.purity import mutated_inputs
from fxopt.graph.strides import before_layout
from fxopt.graph.view import find_subgraphs, is_tensor, requires_grad, results_of, tensors_of

Reach = dict[int, frozenset[int]]
"""By the number of an input: the numbers of the outputs that its gradient can come from."""


def keep_stock_gradients(lower: Lowering, region: str) -> Lowering:
    """Return `lower` so that what it compiles has gradients of None where stock has None.

    A second derivative, which AOTAutograd has none of, is an `FxoptError` that names `region`; so is `retain_grad()`
    on an output whose gradient goes through the graph's inside too.
    """

    def lower_exactly(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        reach, read_on = find_partial_reach(gm), find_read_on(gm)
        compiled = lower(gm, example_inputs)

        def run(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                return compiled(*args)
            watch = Watch(region, reach, read_on)
            outputs = compiled(*watch.enter(args))
            watch.watch(args, outputs)
            return outputs

        return run

    return lower_exactly


def find_partial_reach(gm: fx.GraphModule) -> Reach:
    """Return the inputs of `gm` whose gradient comes from some of its outputs only; all others are left out.

    What is not known to stand apart counts as reached: a graph that writes in place has no such input.
    """
    results = results_of(gm)
    numbers = {
        number
        for number, node in enumerate(results)
        if isinstance(node, fx.Node) and any(value.requires_grad for value in tensors_of(node))
    }
    if len(numbers) < 2 or any(_writes(part) for _, part in find_subgraphs(gm)):
        return {}
    reached: dict[fx.Node, set[int]] = {node: set() for node in gm.graph.nodes}
    for number in numbers:
        reached[results[number]].add(number)
    for node in reversed(gm.graph.nodes):
        if node.op == "output" or _stops_gradients(node):
            continue
        for source in node.all_input_nodes:
            reached[source] |= reached[node]
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return {
        index: frozenset(reached[node])
        for index, node in enumerate(placeholders)
        if is_tensor(node) and node.meta["example_value"].requires_grad and reached[node] != numbers
    }


def find_read_on(gm: fx.GraphModule) -> tuple[int, ...]:
    """Return the numbers of the outputs with a gradient from which `gm` computes others."""
    return tuple(
        number
        for number, node in enumerate(results_of(gm))
        if isinstance(node, fx.Node)
        and node.op not in ("placeholder", "get_attr")
        and requires_grad(node)
        and _computes_others(before_layout(node), node)
    )


def _computes_others(node: fx.Node, result: fx.Node) -> bool:
    """Return whether anything but its own `result` is computed from `node`."""
    if node is result:
        return any(user.op != "output" for user in node.users)
    return len(node.users) > 1


def _writes(gm: fx.GraphModule) -> bool:
    return any(
        node.op in ("call_function", "call_method") and bool(mutated_inputs(node)) for node in gm.graph.nodes
    )


def _stops_gradients(node: fx.Node) -> bool:
    values = tensors_of(node)
    return bool(values) and "rewritten_by" not in node.meta and not any(v.requires_grad for v in values)


class Watch:
    """One call of a compiled graph: notes in the backward pass which outputs have a gradient."""

    def __init__(self, region: str, reach: Reach, read_on: tuple[int, ...] = ()) -> None:
        self.region = region
        self.reach = reach
        self.read_on = read_on
        self.read: frozenset[int] | None = None
        self._numbers: dict[int, set[int]] = {}
        self._views: frozenset[int] = frozenset()

    def enter(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return `args` with the inputs that some outputs do not reach behind a node that may give None."""
        indices = [
            index
            for index in self.reach
            if isinstance(args[index], torch.Tensor) and args[index].requires_grad
        ]
        if not indices:
            return args
        entered: Any = Entry.apply(self, indices, *(args[index] for index in indices))
        changed = list(args)
        for index, value in zip(indices, entered, strict=True):
            changed[index] = value
        return tuple(changed)

    def watch(self, args: tuple[Any, ...], outputs: Any) -> None:
        """Have this call's autograd node tell, before it runs, which outputs were read, and by whom."""
        values = outputs if isinstance(outputs, tuple | list) else (outputs,)
        given = {value.grad_fn for value in args if isinstance(value, torch.Tensor)}
        node: Any = None
        views: set[int] = set()
        for number, value in enumerate(values):
            if not isinstance(value, torch.Tensor) or not value.requires_grad:
                continue
            own = value.grad_fn
            if torch_tensors.is_compiled_node(own) and own not in given:
                node = own
                self._numbers.setdefault(value.output_nr, set()).add(number)
            else:
                views.add(number)
        if node is None:
            return
        self._views = frozenset(views)
        find_node = weakref.ref(node)
        # Only what is no leaf: it needs no memory here, and leaves are known to the node.
        inner = [v for v in args if isinstance(v, torch.Tensor) and v.requires_grad and not v.is_leaf]
        sources: Any = Sources.apply(*inner) if inner else None
        finds_read_on = [weakref.ref(values[number]) for number in self.read_on]

        def before_backward(gradients: tuple[torch.Tensor | None, ...]) -> None:
            if any(value.retains_grad for find in finds_read_on if (value := find()) is not None):
                _refuse_retained(self.region)
            self.read = self._find_read(gradients)
            if torch.is_grad_enabled():
                _refuse_second_derivatives(find_node(), self.region, sources)

        node.register_prehook(before_backward)

    def _find_read(self, gradients: tuple[torch.Tensor | None, ...]) -> frozenset[int]:
        """Return the numbers of the outputs with a gradient; those with nodes of their own, views, always count."""
        read = set(self._views)
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                read |= self._numbers.get(place, set())
        return frozenset(read)


class Entry(torch.autograd.Function):
    """Inputs as they are; in the backward pass, None for those that no output with a gradient reaches."""

    @staticmethod
    def forward(
        ctx: Any, watch: Watch, indices: list[int], *values: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return views of `values`."""
        ctx.watch, ctx.indices = watch, indices
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        """Return `gradients` where these come from an output that was read."""
        read = ctx.watch.read
        kept = (
            gradient if read is None or not read.isdisjoint(ctx.watch.reach[index]) else None
            for index, gradient in zip(ctx.indices, gradients, strict=True)
        )
        return None, None, *kept


class Sources(torch.autograd.Function):
    """An empty tensor that autograd holds to be computed from all inputs; it keeps none of them."""

    @staticmethod
    def forward(ctx: Any, *values: torch.Tensor) -> torch.Tensor:
        """Return it."""
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        """Return nothing: what has it among its inputs has raised."""
        raise AssertionError("a gradient has passed what has no second derivatives")


class NoSecondDerivatives(torch.autograd.Function):
    """Gradients as they are; differentiating them is an error, by whatever they are computed from."""

    @staticmethod
    def forward(
        ctx: Any, region: str, num_gradients: int, *values: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the first `num_gradients` of `values`; the others are what they are computed from."""
        ctx.region = region
        return tuple(None if value is None else value.view_as(value) for value in values[:num_gradients])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Raise what is wrong."""
        raise FxoptError(
            f"{ctx.region}: second derivatives through a compiled region (create_graph=True, a gradient penalty) "
            "are not implemented, expected one backward pass\n"
            "call fxopt.restore(model) before such a step; fxopt.optimize(model) puts everything back"
        )


def _refuse_retained(region: str) -> None:
    raise FxoptError(
        f"{region}: retain_grad() on a value from inside a compiled region, collected or returned beside what is "
        "computed from it (output_attentions=True), would miss the gradient through the region, expected a value that "
        "regions begin or end with\n"
        "call fxopt.restore(model) before such a step; fxopt.optimize(model) puts everything back"
    )


def _refuse_second_derivatives(node: Any, region: str, sources: torch.Tensor | None) -> None:
    """Replace what `node` is about to return by gradients that say so when they are differentiated.

    They are a function of its leaves and `sources`: what autograd thinks independent of these would be given a
    derivative of zeros, or none.
    """
    leaves = [
        leaf for source, _ in node.next_functions if (leaf := getattr(source, "variable", None)) is not None
    ]

    def after_backward(grad_inputs: tuple[torch.Tensor | None, ...], _: Any) -> Any:
        handle.remove()
        # torch before 2.12 returns compiled gradients that require none: they would differentiate to nothing
        differentiable = [
            value.detach().requires_grad_() if value is not None and value.is_floating_point() else value
            for value in grad_inputs
        ]
        return NoSecondDerivatives.apply(region, len(differentiable), *differentiable, *leaves, sources)

    handle = node.register_hook(after_backward)
