"""Fails in plain words when a torch version moves something private that reading a captured graph touches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import TruncToFloat
from torch.utils._sympy.numbers import int_oo

from fxopt.graph import torch_private
from fxopt.graph.names import ATTRIBUTES, op_name


def captured(function: Any, *args: Any, dynamic: bool | None = None) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compiler.reset()
    torch.compile(function, backend=keep, fullgraph=True, dynamic=dynamic)(*args)
    (gm,) = graphs
    return gm


def symbolic_sizes() -> tuple[Any, Any]:
    (x, *_) = captured(lambda x: x + 1, torch.ones(5, 7), dynamic=True).graph.nodes
    x = next(node for node in x.graph.nodes if isinstance(node.meta.get("example_value"), Tensor))
    rows, columns = x.meta["example_value"].shape
    assert isinstance(rows, torch.SymInt), "a dynamic capture no longer has symbolic sizes"
    return rows, columns


def test_functions_of_torchs_own_name_space_have_names() -> None:
    names = [
        op_name(node) for node in captured(lambda x: F.gelu(F.pad(x, (1, 0))), torch.ones(2, 3)).graph.nodes
    ]
    assert [name for name in names if name] == ["pad", "gelu"], (
        "torch._C._nn no longer holds what F.pad calls"
    )


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_that_is_a_view_is_captured_as_its_read_or_as_its_op(name: str) -> None:
    gm = captured(lambda x: getattr(x, name) + 1, torch.ones(2, 3))
    first = next(node for node in gm.graph.nodes if node.op == "call_function")
    assert op_name(first) in ("getattr", name), f"Dynamo captures Tensor.{name} as {first.target}"


def test_registered_ops_have_names_and_schemas() -> None:
    op = torch.ops.aten.add_.Tensor
    assert torch_private.registered_name(op) == "aten::add_.Tensor", "OpOverload.name moved"
    assert torch_private.registered_name(torch.ops.aten.add) == "aten::add", "_qualified_op_name moved"
    schema = torch_private.schema_of(op)
    assert schema.is_mutable
    assert [argument.name for argument in schema.arguments] == ["self", "other", "alpha"], (
        "OpOverload._schema moved"
    )
    assert isinstance(torch.ops.higher_order.cond, torch_private.HigherOrderOperator), "torch._ops moved"


def test_mode_switches_arrive_as_the_nodes_we_know() -> None:
    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            x = x @ x
        with torch.inference_mode():
            return x.data.clone()

    targets = {node.target for node in captured(run, torch.ones(2, 2)).graph.nodes}
    switches = (torch_private.ENTER_AUTOCAST, torch_private.EXIT_AUTOCAST, torch_private.SET_GRAD)
    for target in (*switches, torch_private.ENTER_INFERENCE, torch_private.GET_DATA):
        assert target in targets, f"Dynamo no longer puts {target.__name__} into a graph"


def test_sizes_that_are_not_fixed_have_expressions_and_hints() -> None:
    rows, columns = symbolic_sizes()
    assert (torch_private.hint_of(rows), torch_private.hint_of(columns)) == (5, 7), "SymNode.hint moved"
    assert torch_private.expression_of(rows * 2) == torch_private.expression_of(rows) * 2, (
        "SymNode.expr moved"
    )
    assert torch_private.constant_of(rows) is None
    assert torch_private.constant_of(rows - rows + 3) == 3, "SymNode.maybe_as_int moved"
    unknown = ShapeEnv().create_unbacked_symint()
    assert torch_private.hint_of(unknown) is None, "SymNode.has_hint moved"


def test_a_branch_on_a_size_leaves_its_condition() -> None:
    rows, _ = symbolic_sizes()
    assert bool(rows < 100)
    (symbol,) = torch_private.expression_of(rows).free_symbols
    assert torch_private.numbers_at_capture(rows)[symbol] == rows.node.hint, (
        "ShapeEnv.backed_var_to_val moved"
    )
    (asked,) = torch_private.conditions_on(rows)
    assert torch_private.evaluate(asked, dict.fromkeys(asked.free_symbols, 99)) is True, (
        "ShapeEnv.guards moved"
    )
    assert torch_private.evaluate(asked, dict.fromkeys(asked.free_symbols, 100)) is False, (
        "ShapeEnv.guards moved"
    )


def test_sizes_evaluate_to_what_substitution_makes_of_them() -> None:
    rows, columns = symbolic_sizes()
    sizes = (
        rows * columns // 4,
        (rows - columns) // 2,
        rows % columns,
        torch.sym_max(rows, columns),
        torch.sym_ite(rows < 9, rows, columns),
    )
    for size in sizes:
        expression = torch_private.expression_of(size)
        symbols = sorted(expression.free_symbols, key=str)
        for numbers in ((11, 3), (8, 9), (64, 2)):
            known = dict(zip(symbols, numbers, strict=False))
            assert torch_private.evaluate(expression, known) == int(expression.subs(known)), (
                "SYMPY_INTERP, PythonPrinter or the functions of torch.utils._sympy moved"
            )


@pytest.mark.parametrize("spell", [lambda s: 1 / s, lambda s: TruncToFloat(s / 4) + s, lambda s: s - int_oo])
def test_what_torch_cannot_print_is_substituted(spell: Callable[[Any], Any]) -> None:
    symbol = sympy.Symbol("s", integer=True, positive=True)
    expression = spell(symbol)
    assert torch_private.evaluate(expression, {symbol: 8}) == expression.subs({symbol: 8})


def test_views_share_a_storage_also_among_stand_ins() -> None:
    with FakeTensorMode():
        x, other = torch.ones(4, 4), torch.ones(4, 4)
    key = torch_private.storage_key(x)
    assert torch_private.storage_key(x[1:]) == key, "UntypedStorage._cdata moved"
    assert torch_private.storage_key(other) != key, "UntypedStorage._cdata moved"


def test_real_tensors_can_be_made_within_a_capture() -> None:
    with FakeTensorMode(), torch_private.unset_fake_temporarily():
        assert torch.ones(2).sum().item() == 2, "unset_fake_temporarily no longer leaves the stand-ins' mode"


def test_functions_written_in_c_have_schemas() -> None:
    schemas = torch_private.schemas_of(torch.amax)
    assert schemas, "torch.jit._builtins no longer knows which op torch.amax calls"
    first = next(schema for schema in schemas if not schema.is_mutable)
    got = [(each.name, str(each.real_type), each.has_default_value()) for each in first.arguments]
    assert got == [("self", "Tensor", False), ("dim", "List[int]", True), ("keepdim", "bool", True)], (
        "the schemas of torch's ops have another form"
    )
    assert torch_private.schemas_of(torch.nn.functional.selu) == (), "F.selu is written in C now"


def test_what_fails_without_storage_is_logged_only_where_logs_are_asked_for() -> None:
    log = logging.getLogger("torch._subclasses.fake_tensor")
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    log.addHandler(handler)

    def fail() -> int:
        seen.clear()
        mode = torch_private.FakeTensorMode()
        a, b = mode.from_tensor(torch.ones(2)), mode.from_tensor(torch.ones(3))
        with pytest.raises(RuntimeError, match="2"):
            a + b  # pyright: ignore[reportUnusedExpression]
        return len(seen)

    try:
        assert fail() == 1, "torch logs what fails on fake tensors elsewhere"
        with torch_private.quiet_fakes():
            assert fail() == 0
            other: list[int] = []
            thread = threading.Thread(target=lambda: other.append(fail()))
            thread.start()
            thread.join()
            assert other == [1], "what other threads log is theirs"
        torch._logging.set_logs(graph_breaks=True)
        log.addHandler(handler)
        with torch_private.quiet_fakes():
            assert fail() == 1, "torch keeps elsewhere what logs it was asked for"
    finally:
        torch._logging.set_logs()
        log.removeHandler(handler)
    assert not torch_private.are_logs_asked_for()
