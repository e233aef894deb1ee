"""Which lowering a graph gets, and that a graph which writes to its inputs is kept from Inductor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fxopt.capture import torch_dynamo, torch_lowering
from fxopt.capture.lowering import choose_lowering
from fxopt.capture.mutation import find_mutated_inputs
from fxopt.kernels.activation import activation
from fxopt.kernels.glu import glu


def capture(function, *args):
    graphs = []

    def keep(gm, _):
        graphs.append(gm)
        return gm.forward

    torch.compile(torch_dynamo.isolate(function), backend=keep, fullgraph=True)(*args)
    return graphs[0]


def pure(x, w):
    return torch.sigmoid(x * w).view(-1)


def in_place(x, w):
    y = torch.sigmoid(w) * x
    w.mul_(0.5)
    return y


def through_a_view(x, w):
    y = torch.sigmoid(w) * x
    w.view(2, 2)[0] = 1.0
    return y


def fresh_intermediate(x, w):
    y = x * w
    y.add_(1)
    return y


@pytest.mark.parametrize(
    ("function", "written"), [(pure, 0), (in_place, 1), (through_a_view, 1), (fresh_intermediate, 0)]
)
def test_written_inputs_are_found_and_kept_from_inductor(function, written):
    gm = capture(function, torch.randn(4), torch.randn(4))
    assert len(find_mutated_inputs(gm)) == written
    lowering, reason = choose_lowering("inductor", gm)
    assert lowering is (torch_lowering.plain_backend if written else torch_lowering.inductor_backend)
    assert bool(reason) == bool(written)


def test_auto_is_plain_on_a_cpu():
    gm = capture(pure, torch.randn(4), torch.randn(4))
    assert choose_lowering("auto", gm) == (torch_lowering.plain_backend, "")


@pytest.mark.slow  # a C++ compiler runs, for a quarter of a minute
def test_a_graph_compiled_before_comes_from_inductors_cache():
    """A pass of ours without an identity that stays the same would turn the caches off without a word."""
    from torch._dynamo.utils import counters
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._inductor.utils import fresh_cache

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"Inductor needs a C++ compiler on a CPU: {error}")

    def function(x, w):
        return torch.sigmoid(glu(x * w, w, act="silu"))

    def step():
        counters.clear()
        compiled = torch_dynamo.compile_frame(function, torch_lowering.inductor_backend, fullgraph=True)
        x, w = (torch.ones(64, requires_grad=True) for _ in range(2))
        compiled(x, w).sum().backward()
        return dict(counters["inductor"])

    with fresh_cache():
        first = step()
        again = step()
    assert first["fxgraph_cache_miss"] == again["fxgraph_cache_hit"] == 2, "a forward and a backward graph"
    assert "fxgraph_cache_bypass" not in {**first, **again}


@pytest.mark.slow  # Inductor's C++ compiler runs
@pytest.mark.parametrize("act", ["gelu", pytest.param("gelu_tanh", marks=pytest.mark.exhaustive), "relu2"])
def test_inductor_saves_an_activations_input_alone_where_stock_saves_its_result_too(act):
    stock = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu2": lambda x: F.relu(x).square(),
    }[act]
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((40, 8), (24, 8), (8, 24))]

    def count_saved(function):
        def mlp(x, first, second):
            return F.linear(function(F.linear(x, first)), second)

        compiled = torch.compile(torch_dynamo.isolate(mlp), backend=torch_lowering.inductor_backend)
        compiled(*tensors)
        saved = {}

        def keep(value):
            return saved.setdefault(value.data_ptr(), value)

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            compiled(*tensors)
        return sum(value.numel() == 40 * 24 for value in saved.values())

    assert count_saved(stock) == 2
    assert count_saved(lambda x: activation(x, act=act)) == 1


def test_backward_ops_that_lay_out_otherwise_than_they_say_are_run_plain():
    # The gradient of this softplus is transposed: its backward says it returns a contiguous one, which AOT views.
    scale = torch.randn(2, 3, 6)

    def block(x, w):
        return (F.softplus(F.linear(x, w)).transpose(1, 2).contiguous() * scale).exp()

    x, w = torch.randn(2, 6, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    compiled = torch.compile(
        torch_dynamo.isolate(block), backend=torch_lowering.plain_backend, fullgraph=True
    )
    ours = torch.autograd.grad(compiled(x, w).sum(), (x, w))
    theirs = torch.autograd.grad(block(x, w).sum(), (x, w))
    for mine, stocks in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, stocks)
