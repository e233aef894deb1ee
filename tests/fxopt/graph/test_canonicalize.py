"""Identities, in-place ops and equal nodes: what goes, what must stay, and that it costs linear time."""

from __future__ import annotations

import gc
import operator
import time

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fxopt.graph.canonicalize import canonicalize
from fxopt.graph.purity import mutated_inputs
from fxopt.graph.snapshot import count_ops, snapshot

LEAF = torch.randn(2, 3, 4, requires_grad=True)
HALF = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
PLAIN = torch.randn(2, 3, 4)
INTEGERS = torch.arange(6).view(2, 3)

REMOVED = {
    "cast to the same dtype": ((LEAF,), lambda x: x.float() + 1, ["add"]),
    "cast to the same device": ((LEAF,), lambda x: x.to("cpu") + 1, ["add"]),
    "cast up and down": ((HALF,), lambda x: (x + 1).float().to(torch.bfloat16) * 2, ["add", "mul"]),
    "cast down and up stays": (
        (LEAF,),
        lambda x: (x + 1).bfloat16().float() * 2,
        ["add", "cast", "cast", "mul"],
    ),
    "cast up and down with another reader stays": (
        (HALF,),
        lambda x: ((y := (x + 1).float()).to(torch.bfloat16) * 2, y * 3),
        ["add", "cast", "cast", "mul", "mul"],
    ),
    "contiguous": ((LEAF,), lambda x: x.contiguous() + 1, ["add"]),
    "contiguous of a transpose stays": (
        (LEAF,),
        lambda x: x.transpose(0, 1).contiguous() + 1,
        ["transpose", "contiguous", "add"],
    ),
    "times one": ((LEAF,), lambda x: (x + 2) * 1.0 - 3, ["add", "sub"]),
    "times one of what is returned stays": ((LEAF,), lambda x: (x - 3) * 1.0, ["sub", "mul"]),
    "minus zero": ((LEAF,), lambda x: ((x + 2) - 0).exp(), ["add", "exp"]),
    "plus zero of floats stays": ((LEAF,), lambda x: ((x + 2) + 0).exp(), ["add", "add", "exp"]),
    "plus zero of integers": ((INTEGERS,), lambda x: (x * 2 + 0) * 3, ["mul", "mul"]),
    "times one that promotes stays": ((INTEGERS,), lambda x: (x * 2 * 1.0) * 3, ["mul", "mul", "mul"]),
    "slice of everything": ((LEAF,), lambda x: (x + 1)[:, 0:, :] * 2, ["add", "mul"]),
    "reshape to the same shape": ((LEAF,), lambda x: (x + 1).view(2, 3, 4) * 2, ["add", "mul"]),
    "reshape of a reshape": (
        (LEAF,),
        lambda x: (x + 1).view(-1, 4).view(3, 8) * 2,
        ["add", "reshape", "mul"],
    ),
    "transpose there and back": ((LEAF,), lambda x: (x + 1).mT.mT * 2, ["add", "mul"]),
    "a mean that gets its dim back": ((LEAF,), lambda x: x - x.mean(-1).unsqueeze(-1), ["mean", "sub"]),
    "a largest item that gets its dim back": ((LEAF,), lambda x: x / x.amax(1)[:, None], ["amax", "div"]),
    "a mean that is read without the dim too stays": (
        (LEAF,),
        lambda x: ((m := x.mean(-1)) * 2, x - m[..., None]),
        ["mean", "mul", "unsqueeze", "sub"],
    ),
    "a mean that gets another dim stays": (
        (LEAF,),
        lambda x: x.mean(-1).unsqueeze(0) * 2,
        ["mean", "unsqueeze", "mul"],
    ),
    "a detach before what is chosen": (
        (LEAF,),
        lambda x: x.gather(-1, (x.detach() + 1).topk(2)[1]),
        ["add", "topk", "getitem", "gather"],
    ),
    "a detach before what is computed too stays": (
        (LEAF,),
        lambda x: ((y := x.detach() + 1) * 2, x.gather(-1, y.topk(2)[1])),
        ["detach", "add", "mul", "topk", "getitem", "gather"],
    ),
    "times minus one": ((LEAF,), lambda x: -1 * (x + 2), ["add", "neg"]),
    "times minus one that promotes stays": ((INTEGERS,), lambda x: (x + 2) * -1.0, ["add", "mul"]),
    "plus a negated value": ((LEAF, HALF), lambda x, y: x + -(y.float() * 2), ["cast", "mul", "sub"]),
    "plus a negated integer, which may wrap, stays": (
        (INTEGERS,),
        lambda x: x.float() + -(x * 2),
        ["cast", "mul", "neg", "add"],
    ),
    "plus a negated value with another reader stays": (
        (LEAF,),
        lambda x: ((y := -(x * 2)).exp(), x + y),
        ["mul", "neg", "exp", "add"],
    ),
    "idle dropout": ((LEAF,), lambda x: F.dropout(x + 1, 0.0, True) * 2, ["add", "mul"]),
    "dropout in evaluation": ((LEAF,), lambda x: F.dropout(x + 1, 0.5, False) * 2, ["add", "mul"]),
    "dropout stays": ((LEAF,), lambda x: F.dropout(x + 1, 0.5, True) * 2, ["add", "dropout", "mul"]),
    "unread dropout stays": ((LEAF,), lambda x: (F.dropout(x, 0.5, True), x * 2)[1], ["dropout", "mul"]),
    "a copy whose removal would reorder gradients stays": (
        (LEAF,),
        lambda x: ((y := x * 2), (y * 1.0).exp() * y * y.sin())[1],
        ["mul", "mul", "exp", "mul", "sin", "mul"],
    ),
}


def ops_of(gm: fx.GraphModule) -> list[str]:
    lines = snapshot(gm).splitlines()
    calls = [line.split(" = ")[1] for line in lines if " = " in line and not line.endswith("placeholder")]
    return [call.split("(")[0] for call in calls]


@pytest.mark.parametrize("name", REMOVED)
def test_identities(name, capture, canonical) -> None:
    inputs, function, expected = REMOVED[name]
    assert ops_of(canonical(capture(function, *inputs))) == expected


def mutate_view(x):
    y = x + 1
    z = y[..., :2]
    z.mul_(2)
    return y * 3


def read_after(x):
    y = x + 1
    y.mul_(2)
    return y * 3


def read_alias_after(x):
    y = x + 1
    z = y.view(-1)
    y += 2
    return y * 3, z * 4


def read_before(x):
    y = x * 3
    z = y.exp()
    y *= 2
    return y * 3, z * 4


def widen(x):
    y = x + 1
    y += torch.ones(4)
    y -= 2.5
    y /= 3
    return y.sin()


def narrow(x):
    y = x * 2
    y += torch.ones(4, dtype=torch.float32)
    return y.sin()


def mutate_input(x):
    x += 1
    return x * 2


def set_item(x):
    y = x * 2
    y[..., 0] = 5.0
    return y.exp()


def set_item_unread(x):
    y = torch.zeros(4)
    y[1] = 3.0
    return x * y


def put_back(x):
    _, order = torch.sort(x[:, 0, 0].detach())
    places = torch.empty_like(order)
    places[order] = torch.arange(2)
    return x[order].exp()[places]


def limit_sorted(x):
    found, order = torch.sort((x[:, 0, 0] * 9).detach().long())
    mask = found >= 2
    found.clamp_(max=1)
    return x[order, 0].masked_fill_(mask.unsqueeze(-1), 0.0) * found.unsqueeze(-1)


def share_of_largest(x):
    values, _ = torch.topk(x.sigmoid(), 2)
    values /= values.sum(-1, keepdim=True)
    return values * 2


def write_through_one_view(x):
    y = torch.matmul(x.unsqueeze(1), torch.ones(2, 4, 3)).squeeze(1)
    y.add_(1.0)
    return y.exp()


def read_view_before(x):
    y = (x * 2).unsqueeze(1)
    z = y.exp()
    y.add_(1.0)
    return y * 3 + z


INPLACE = {
    "places": (
        (PLAIN,),
        put_back,
        [
            "getitem",
            "sort",
            "getitem",
            "empty_like",
            "arange",
            "index_put",
            "getitem",
            "exp",
            "getitem",
        ],
    ),
    "limits of one of two results": (
        (PLAIN,),
        limit_sorted,
        [
            "getitem",
            "mul",
            "cast",
            "sort",
            "getitem",
            "getitem",
            "ge",
            "clamp",
            "getitem",
            "unsqueeze",
            "masked_fill",
            "unsqueeze",
            "mul",
        ],
    ),
    "one of two results": (
        (PLAIN,),
        share_of_largest,
        ["sigmoid", "topk", "getitem", "sum", "div", "mul"],
    ),
    "through the only view": (
        (PLAIN,),
        write_through_one_view,
        ["unsqueeze", "filled", "matmul", "squeeze", "add", "exp"],
    ),
    "through a view that was read stays": (
        (PLAIN,),
        read_view_before,
        ["mul", "unsqueeze", "exp", "add_", "mul", "add"],
    ),
    "chain of operators": ((PLAIN,), widen, ["add", "filled", "add", "sub", "div", ".sin"]),
    "a read before": ((PLAIN,), read_before, ["mul", ".exp", "mul", "mul", "mul"]),
    "activation": ((PLAIN,), lambda x: F.relu(x + 1, inplace=True) * 2, ["add", "relu", "mul"]),
    "write through a view stays": ((PLAIN,), mutate_view, ["add", "getitem", ".mul_", "mul"]),
    "a read afterwards": ((PLAIN,), read_after, ["add", "mul", "mul"]),
    "a read of an alias stays": ((PLAIN,), read_alias_after, ["add", ".view", "iadd", "mul", "mul"]),
    "rounding to the narrower dtype stays": ((HALF,), narrow, ["mul", "filled", "iadd", ".sin"]),
    "write to an input stays": ((PLAIN,), mutate_input, ["iadd", "mul"]),
    "setitem stays": ((LEAF,), set_item, ["mul", "setitem", "exp"]),
    "setitem in a constant stays": ((LEAF,), set_item_unread, ["filled", "setitem", "mul"]),
}


@pytest.mark.parametrize("name", INPLACE)
def test_in_place_ops(name, capture, canonical) -> None:
    inputs, function, expected = INPLACE[name]
    gm = canonical(capture(function, *inputs))
    assert [op.strip(".") for op in ops_of(gm)] == [op.strip(".") for op in expected]


def test_writes_with_gradients(capture, canonical) -> None:
    def function(x, w):
        y = F.linear(x, w)
        y *= 0.5
        y = y + 1
        y.add_(x)
        y[..., 1] = 0
        return y.exp()

    gm = canonical(capture(function, LEAF, torch.randn(4, 4, requires_grad=True)))
    assert "iadd" not in snapshot(gm)
    assert "setitem" in snapshot(gm)


def test_equal_nodes_without_gradient_are_merged(capture, canonical) -> None:
    def function(x, cos):
        return x * cos.unsqueeze(1) + x.sin() * cos.unsqueeze(1) + x.exp() * cos[:, None]

    captured = capture(function, LEAF, torch.randn(2, 4))
    gm = canonical(captured)
    assert count_ops(gm)["unsqueeze"] == 1
    merged = next(node for node in gm.graph.nodes if node.target is torch.unsqueeze)
    assert len(merged.meta["origins"]) == 3


def choose(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        ids = (x + 1).topk(2)[1]
    return x.gather(-1, ids)


def halve(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        half = x / 2
        place = half.argmax(-1, keepdim=True)
    return x.gather(-1, place) * half


@pytest.mark.parametrize(("function", "num_switches"), [(choose, 0), (halve, 2)])
def test_a_stretch_without_grad_that_ends_in_integers_needs_no_switch(
    function, num_switches, capture, canonical
) -> None:
    gm = canonical(capture(function, LEAF))
    assert sum(node.target is torch._C._set_grad_enabled for node in gm.graph.nodes) == num_switches


def test_equal_nodes_that_gradients_flow_into_are_kept(capture, canonical) -> None:
    gm = canonical(capture(lambda x: x.exp() * 2 + x.exp() * 3, LEAF))
    assert count_ops(gm)["exp"] == 2


def test_nothing_is_merged_across_a_random_op_a_write_or_a_switch(capture, canonical) -> None:
    def function(x):
        a = x.exp()
        y = torch.rand_like(x)
        b = x.exp()
        with torch.autocast("cpu", torch.bfloat16):
            c = x.exp()
        return (a + y) * b * c + torch.rand_like(x)

    gm = canonical(capture(function, PLAIN))
    ops = count_ops(gm)
    assert (ops["exp"], ops[".rand_like"] + ops["rand_like"]) == (3, 2)


def test_values_written_to_are_not_merged(capture, canonical) -> None:
    def function(x):
        a, b = x * 2, x * 2
        a[0] = 7.0
        return a + b.sin()

    assert count_ops(canonical(capture(function, PLAIN)))["mul"] == 2


INPLACE_FLAGS = {
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5, inplace=True),
    "hardtanh by position": lambda x: F.hardtanh(x, -0.5, 0.5, True),
    "selu": lambda x: F.selu(x, inplace=True),
    "celu": lambda x: F.celu(x, 0.5, True),
    "hardsigmoid": lambda x: F.hardsigmoid(x, 1),
    "threshold": lambda x: F.threshold(x, 0.1, 7.0, inplace=True),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, True, inplace=True),
    "dropout1d": lambda x: F.dropout1d(x, 0.5, True, True),
    "rrelu": lambda x: F.rrelu(x, training=True, inplace=True),
    "several at once": lambda x: torch._foreach_mul_([x], 0.5),
}


@pytest.mark.parametrize("name", INPLACE_FLAGS)
def test_values_that_an_op_overwrites_when_asked_are_not_merged(name, capture, canonical) -> None:
    def function(x):
        a, b = x * 2, x * 2
        INPLACE_FLAGS[name](a)
        return a + b.sin()

    assert count_ops(canonical(capture(function, PLAIN)))["mul"] == 2


def test_what_is_written_to_is_read_off_any_form_of_call() -> None:
    graph = fx.Graph()
    a, b, flag = (graph.placeholder(name) for name in "abf")

    def written(target, *args, **kwargs):
        return mutated_inputs(graph.call_function(target, args, kwargs))

    assert written(torch._foreach_mul_, [a, b], 0.5) == (a, b)
    assert written(torch._foreach_add_, [a], [b]) == (a,)
    assert written(torch._fused_sgd_, [a], [b], [], lr=0.1) == (a, b)
    assert written(F.celu, a, 1.0, flag) == (a,)
    assert written(F.celu, a, 1.0, False) == ()
    assert written(F.celu, a, inplace=None) == ()
    assert written(F.selu, input=a, inplace=True) == (a,)
    assert written(operator.setitem, a, 0, b) == (a,)


def test_returned_values_are_not_merged(capture, canonical) -> None:
    gm = canonical(capture(lambda x: (x * 2, x * 2), PLAIN))
    assert count_ops(gm)["mul"] == 2


def test_equal_numbers_of_other_types_are_not_merged(capture, canonical) -> None:
    gm = canonical(
        capture(lambda x: (x * 2).sin() + (x * 2.0).sin() + (x + 0.0).sin() + (x + -0.0).sin(), INTEGERS)
    )
    assert count_ops(gm)["mul"] == 2
    assert count_ops(gm)["add"] == 5


def test_what_a_custom_op_or_a_body_reads_is_not_taken_as_written(capture, canonical) -> None:
    def function(x):
        y = x + 1
        z = checkpoint(torch.sin, y, use_reentrant=False)
        return (
            F.scaled_dot_product_attention(y, y, z, dropout_p=0.5) + torch.histc(y).sum() + y.view(-1).sum()
        )

    gm = canonical(capture(function, PLAIN))
    assert count_ops(gm)["reshape"] == 1


def test_autocast_is_read_from_the_values(capture, canonical) -> None:
    def function(x, v, w):
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(x, v)
            z = y.to(torch.bfloat16) * y.float()
        return z.to(torch.float32) @ w.t()

    weights = torch.randn(2, 4, 4, requires_grad=True).detach().unbind()
    gm = canonical(capture(function, LEAF, *(weight.requires_grad_() for weight in weights)))
    assert ops_of(gm) == ["_enter_autocast", "linear", "cast", "mul", "_exit_autocast", "linear"]


def test_a_product_that_autocast_casts_is_not_made_a_linear(capture, canonical) -> None:
    def function(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return x @ w.t()

    assert count_ops(canonical(capture(function, LEAF, torch.randn(4, 4, requires_grad=True))))["matmul"] == 1


def test_bodies_of_checkpoints_are_canonicalized(capture, canonical) -> None:
    def function(x):
        return checkpoint(lambda y: (2 * y).float().pow(2).mean(-1), x * 3, use_reentrant=False)

    gm = canonical(capture(function, LEAF))
    body = next(node for node in gm.graph.nodes if node.op == "get_attr")
    nodes = list(getattr(gm, body.target).graph.nodes)
    assert [node.target for node in nodes[1:-1]] == [torch.mul, torch.pow, torch.mean]
    assert nodes[2].meta["origins"] == {f"{body.target}/{nodes[2].name}"}


def build_chain(length: int) -> fx.GraphModule:
    """Return a graph of about `length` nodes in which every step has something to do."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode() as mode:
        x.meta["example_value"] = mode.from_tensor(torch.randn(4, 4))

        def call(op: str, target, *args, **kwargs) -> fx.Node:
            node = graph.create_node(op, target, args, kwargs)
            values = fx.map_arg((args, kwargs), lambda item: item.meta["example_value"])
            function = target if op == "call_function" else getattr(torch.Tensor, target)
            node.meta["example_value"] = function(*values[0], **values[1])
            return node

        y = x
        for _ in range(length // 8):
            a = call("call_function", operator.add, 1, y)
            b = call("call_method", "float", a)
            c = call("call_method", "view", b, 16)
            d = call("call_method", "view", c, 4, 4)
            e = call("call_method", "cos", x)
            f = call("call_function", operator.mul, d, e)
            g = call("call_function", operator.iadd, f, 1)
            y = call("call_function", operator.mul, g, 1.0)
        graph.output((y,))
    return fx.GraphModule({}, graph)


def test_cost_is_linear() -> None:
    def seconds(length: int) -> float:
        gm = build_chain(length)
        gc.collect()
        gc.disable()  # its cost grows with all that lives, not with this graph
        try:
            start = time.process_time()
            canonicalize(gm)
            return time.process_time() - start
        finally:
            gc.enable()

    seconds(100)
    # A machine with other work may stretch one of the two, but never makes quadratic look linear.
    ratios: list[float] = []
    while len(ratios) < 5 and min(ratios, default=100.0) > 12:
        ratios.append(seconds(3_000) / seconds(300))
    assert min(ratios) <= 12, ratios
