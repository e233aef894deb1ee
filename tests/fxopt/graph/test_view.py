"""Typed reads of a captured graph, its invariants, and its text."""

from __future__ import annotations

import collections
import contextlib
import doctest
import functools
import importlib
import sysconfig
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from fxopt.errors import VerifyError
from fxopt.graph import vocabulary
from fxopt.graph.canonicalize import canonicalize
from fxopt.graph.purity import is_pure
from fxopt.graph.snapshot import count_ops, snapshot
from fxopt.graph.verify import note_placeholders, verify
from fxopt.graph.view import (
    device_of,
    dtype_of,
    find_subgraphs,
    location_in,
    location_of,
    module_of,
    modules_of,
    requires_grad,
    shape_of,
)

MODULES = ("arguments", "canonicalize", "names", "purity", "snapshot", "verify", "view", "vocabulary")
X = torch.randn(2, 3, requires_grad=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3)])
        self.named = nn.ModuleDict({"norm": nn.LayerNorm(3)})

    def forward(self, x):
        y = self.named["norm"](self.layers[0](x))
        return F.dropout(y, 0.5) + torch.rand_like(y)


def find(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.name.startswith(name))


def test_reads(capture) -> None:
    gm = capture(lambda x: (x.to(torch.bfloat16) + 1).detach().sum(), X).gm
    cast, total = find(gm, "to"), find(gm, "sum")
    assert (shape_of(cast), dtype_of(cast), device_of(cast)) == ((2, 3), torch.bfloat16, torch.device("cpu"))
    assert (requires_grad(cast), requires_grad(total), shape_of(total)) == (True, False, ())
    output = find(gm, "output")
    assert (shape_of(output), dtype_of(output), device_of(output), requires_grad(output)) == (
        None,
        None,
        None,
        False,
    )


def test_symbolic_shapes(capture) -> None:
    gm = capture(lambda x: x * 2, torch.randn(5, 6), dynamic=True).gm
    shape = shape_of(find(gm, "mul"))
    assert shape is not None
    assert all(isinstance(size, torch.SymInt) for size in shape)


def test_modules_are_named_from_the_root_and_lines_are_the_models(capture) -> None:
    gm = capture(Block(), X).gm
    names = [node.name for node in gm.graph.nodes if node.op == "call_function"]
    nodes = [find(gm, name) for name in names]
    assert [module_of(node) for node in nodes[:2]] == ["layers.0", "named.norm"]
    assert module_of(nodes[-1]) == ""
    assert all(location_of(node).startswith("test_view.py:") for node in nodes)
    assert location_of(find(gm, "output")) == ""


def test_lines_of_pythons_own_library_are_nobodys() -> None:
    library = [(module.__file__, 9) for module in (contextlib, functools, collections)]
    frames = [
        (torch.__file__, 1),
        ("/models/mine.py", 2),
        *library,
        ("<frozen runpy>", 3),
        (torch.__file__, 4),
    ]
    assert location_in(frames) == "mine.py:2"
    assert location_in(library) == ""
    packages = sysconfig.get_path("purelib")
    assert location_in([*frames, (f"{packages}/transformers/modeling.py", 5)]) == "modeling.py:5"


def test_purity(capture) -> None:
    def function(x):
        y = x.exp() + 1
        y[0] = 2
        y += 1
        z = F.dropout(y, 0.0, True) + F.dropout(y, 0.5, True) + torch.rand_like(y)
        with torch.no_grad():
            w = F.relu(z * 1, inplace=True)
        return F.embedding(torch.tensor([0, 1]), w) + F.scaled_dot_product_attention(z, z, z, dropout_p=0.1)

    gm = capture(function, torch.randn(2, 2)).gm
    impure = [node.name for node in gm.graph.nodes if node.op.startswith("call") and not is_pure(node)]
    expected = ["setitem", "y", "dropout", "rand_like", "_set_grad_enabled", "w", "_set_grad", "scaled_dot"]
    places = {name: sum(item.startswith(name) for item in impure) for name in expected}
    assert all(places.values()), impure
    assert not any(item.startswith(("exp", "add", "embedding", "mul")) for item in impure), impure


def test_subgraphs_are_found_once_with_their_prefix(capture) -> None:
    gm = capture(
        lambda x: checkpoint(torch.sin, checkpoint(torch.cos, x, use_reentrant=False), use_reentrant=False), X
    ).gm
    prefixes = [prefix for prefix, _ in find_subgraphs(gm)]
    assert prefixes[0] == ""
    assert len(prefixes) == 3
    assert all(prefix.endswith("/") for prefix in prefixes[1:])


def test_verify_names_the_pass_the_node_and_the_module(capture) -> None:
    gm = capture(Block(), X).gm
    verify(gm, "stock")
    del gm.graph.find_nodes(op="call_function", target=F.layer_norm)[0].meta["example_value"]
    with pytest.raises(VerifyError) as caught:
        verify(gm, "broken")
    text = str(caught.value)
    assert text.startswith("broken: y has no example value, expected one on all that is read\n")
    assert text.splitlines()[1].startswith("at named.norm (test_view.py:")


def test_verify_compares_the_placeholders_with_the_stock_ones(capture) -> None:
    gm = capture(lambda x, y: x + y, X, torch.randn(2, 3)).gm
    note_placeholders(gm)
    canonicalize(gm)
    extra = gm.graph.find_nodes(op="placeholder")[0]
    with gm.graph.inserting_before(extra):
        gm.graph.placeholder("z").meta["example_value"] = X
    with pytest.raises(
        VerifyError, match=r"broken: the placeholders changed, expected l_x_, l_y_, got z, l_x_, l_y_"
    ):
        verify(gm, "broken")


def test_verify_finds_a_malformed_graph(capture) -> None:
    gm = capture(lambda x: x.exp().sin(), X).gm
    first, second = find(gm, "exp"), find(gm, "sin")
    second.append(first)
    with pytest.raises(VerifyError, match="broken: the graph is malformed"):
        verify(gm, "broken")


def test_snapshot_shows_names_types_and_lines(capture) -> None:
    gm = capture(Block(), X).gm
    canonicalize(gm)
    lines = snapshot(gm, locations=True).splitlines()
    assert lines[0] == "layers.0.weight: f32[3, 3] = placeholder"
    call = next(line for line in lines if "linear(" in line)
    assert "linear(l_x, layers.0.weight, layers.0.bias)  # test_view.py:" in call
    assert lines[-1].startswith("return (")


def test_snapshot_indents_bodies(capture) -> None:
    gm = capture(lambda x: checkpoint(torch.sin, x, use_reentrant=False), X).gm
    text = snapshot(gm)
    assert "wrap_body_0:\n  " in text
    assert count_ops(gm) == {"sin": 1, "tag_activation_checkpoint": 1, "getitem": 1}


def test_numbered_snapshots_do_not_depend_on_names(capture) -> None:
    def other(y):
        different = y.exp()
        return different.sin()

    first, second = capture(lambda x: x.exp().sin(), X).gm, capture(other, X).gm
    assert snapshot(first) != snapshot(second)
    assert snapshot(first, numbered=True) == snapshot(second, numbered=True)


def test_the_vocabulary_has_one_target_per_name() -> None:
    assert len(vocabulary.BY_NAME) == len(vocabulary.BY_TARGET) == len(vocabulary.OPS)
    assert {torch.add, torch.mul} == vocabulary.COMMUTATIVE


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name) -> None:
    results = doctest.testmod(importlib.import_module(f"fxopt.graph.{name}"))
    assert results.failed == 0


def test_pooling_and_sizes_that_are_not_fixed_are_pure(capture) -> None:
    def function(x):
        pooled = F.avg_pool2d(x, 2) + F.interpolate(x, scale_factor=0.5)
        return pooled.reshape(x.shape[0], -1).masked_scatter(x.flatten(1)[:, :1] > 0, x)

    gm = capture(function, torch.randn(3, 2, 4, 4), dynamic=True).gm
    impure = [node.name for node in gm.graph.nodes if node.op.startswith("call") and not is_pure(node)]
    assert impure == []


def test_module_paths_of_nodes_read_as_in_the_model():
    node = torch.fx.Graph().placeholder("x")
    for given in ("L['model'].layers.0.mlp", "L['model']._modules['layers']._modules['0'].mlp"):
        node.meta["nn_module_stack"] = {"1": ("L['model']", object), "2": (given, object)}
        assert modules_of(node) == ("", "layers.0.mlp")


def test_module_paths_read_so_below_a_module_that_finds_attributes_itself():
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(2, 2))

        def __getattr__(self, name: str) -> object:
            return super().__getattr__(name)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    paths: set[str] = set()

    def note(gm: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        paths.update(path for node in gm.graph.nodes for path in modules_of(node))
        return gm.forward

    torch.compile(Wrapper(), backend=note)(torch.ones(2))
    assert {"inner", "inner.0"} <= paths, f"Dynamo names modules in another way: {sorted(paths)}"
