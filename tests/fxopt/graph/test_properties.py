"""Random programs of pointwise ops, casts, views and writes: canonical and stock agree to the bit."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses import FakeTensorMode

from fxopt.graph.canonicalize import canonicalize
from fxopt.graph.verify import verify

UNARY: list[tuple[str, Any, tuple[Any, ...]]] = [
    ("call_method", "float", ()),
    ("call_method", "bfloat16", ()),
    ("call_method", "to", (torch.float64,)),
    ("call_method", "square", ()),
    ("call_method", "contiguous", ()),
    ("call_method", "transpose", (0, 1)),
    ("call_method", "view_as_itself", ()),
    ("call_method", "sigmoid", ()),
    ("call_method", "pow", (2,)),
    ("call_function", operator.neg, ()),
    ("call_function", F.silu, ()),
    ("call_function", operator.getitem, ((slice(None), slice(0, None)),)),
    ("call_function", operator.mul, (1.0,)),
    ("call_function", operator.mul, (0.5,)),
    ("call_function", operator.add, (0,)),
    ("call_function", operator.sub, (0,)),
    ("call_function", operator.iadd, (1,)),
    ("call_function", operator.imul, (2.0,)),
    ("call_function", F.dropout, (0.3, True)),
    ("call_function", F.dropout, (0.0, True)),
    ("call_function", operator.setitem, ((0,), 1.5)),
]
BINARY = [operator.add, operator.mul, operator.sub, torch.maximum, operator.iadd, operator.imul]
CHOICE = st.integers(0, len(UNARY) + len(BINARY) - 1)
STEP = st.tuples(CHOICE, st.integers(0, 4), st.integers(0, 4), st.integers(1, 3))


def build(
    program: list[tuple[int, int, int, int]], mode: FakeTensorMode, inputs: list[torch.Tensor]
) -> fx.GraphModule:
    """Return the graph of `program`, each step done as often as it says; what torch refuses is left out."""
    graph = fx.Graph()
    values: list[fx.Node] = []
    for place, item in enumerate(inputs):
        node = graph.placeholder(f"x{place}")
        # As in a model, the graph's inputs are not leaves, or a write to one would be refused.
        node.meta["example_value"] = mode.from_tensor(item) * 1
        values.append(node)
    steps = [(choice, first, second) for choice, first, second, times in program for _ in range(times)]
    for choice, first, second in steps:
        a, b = values[-1 - first % len(values)], values[-1 - second % len(values)]
        op, target, args = _step(choice, a, b)
        shown = fx.map_arg(args, lambda item: item.meta["example_value"])
        function = target if op == "call_function" else getattr(torch.Tensor, target)
        try:
            value = function(*shown)
        except RuntimeError:
            continue
        node = graph.create_node(op, target, args)
        node.meta["example_value"] = value
        if value is not None:
            values.append(node)
    # All that is left unread is returned, so that gradients flow back through everything.
    graph.output(tuple(value for value in values if not value.users))
    return fx.GraphModule({}, graph)


def _step(choice: int, a: fx.Node, b: fx.Node) -> tuple[str, Any, tuple[Any, ...]]:
    if choice >= len(UNARY):
        return "call_function", BINARY[choice - len(UNARY)], (a, b)
    op, target, rest = UNARY[choice]
    if target == "view_as_itself":
        return op, "reshape", (a, tuple(a.meta["example_value"].shape))
    return op, target, (a, *rest)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(program=st.lists(STEP, min_size=2, max_size=14), gradients=st.tuples(st.booleans(), st.booleans()))
def test_random_programs_keep_every_bit(run, same_bits, program, gradients) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(4, 4, requires_grad=flag) for flag in gradients]
    with FakeTensorMode() as mode:
        gm = build(program, mode, inputs)
    stock = copy.deepcopy(gm)
    writes = _writes(stock)
    try:
        before = run(stock, inputs)
    except RuntimeError as error:
        # The stock program wrote to a value saved for backward: no program of the kind meant.
        if "modified by an inplace operation" not in str(error):
            raise
        reject()
    canonicalize(gm)
    verify(gm, "canonicalize")
    same_bits(before, run(gm, inputs))
    assert _writes(gm, only={operator.setitem}) == _writes(stock, only={operator.setitem})
    assert len(_writes(gm)) <= len(writes)


def _writes(gm: fx.GraphModule, only: set[Any] | None = None) -> list[str]:
    targets = only or {operator.setitem, operator.iadd, operator.imul}
    return [node.name for node in gm.graph.nodes if node.target in targets]
