"""Fails in plain words when a torch version moves something private of Dynamo that fxopt touches."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable

import torch

from fxopt.capture import torch_dynamo, torch_modules, torch_stand_ins


def test_dynamo_takes_a_patched_call_through_the_slot():
    """The model's capture needs this to see each block as one leaf."""
    inner, graphs = torch.nn.Linear(2, 2), []

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if torch_stand_ins.is_fake(x) else torch_modules.stock_call(inner, x)

    leaf.fxopt_leaf = True

    def run(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(x) * 2

    def keep(gm: torch.fx.GraphModule, _: object) -> object:
        graphs.append(gm)
        return gm.forward

    inner.__dict__["_compiled_call_impl"] = torch_dynamo.mark_leaf(leaf)
    inner.__dict__["_call_impl"] = functools.partial(torch_modules.stock_call, inner)
    torch_dynamo.compile_frame(run, keep, fullgraph=True)(inner, torch.ones(2))
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any(getattr(target, "fxopt_leaf", False) for target in targets), (
        "Dynamo no longer goes through Module._compiled_call_impl when _call_impl is not the stock method"
    )


def test_inductors_warning_of_slow_replays_is_still_worded_so():
    """It is a false alarm where blocks are equal, and `expect_equal_blocks` knows it by its text."""
    from torch._inductor import cudagraph_trees

    assert torch_dynamo.SLOW_PATH in inspect.getsource(cudagraph_trees), "Inductor warns in other words"


def test_isolated_functions_keep_defaults_and_closures():
    y = 3

    def function(x: int = 1, *, z: int = 2) -> int:
        return x + y + z

    copy = torch_dynamo.isolate(function)
    assert isinstance(copy, types.FunctionType)
    assert copy() == 6


def test_what_a_whole_capture_calls_may_itself_be_captured_in_pieces():
    graphs: list[torch.fx.GraphModule] = []

    def note(gm, inputs):
        graphs.append(gm)
        return gm.forward

    def inner(x):
        torch._dynamo.graph_break()
        return x + 1

    def entry(x):
        return inner(x)

    pieces = torch_dynamo.compile_frame(entry, note, fullgraph=False)

    def run_pieces(gm, inputs):
        def run(*args):
            with torch_dynamo.frames_of_pieces_captured():
                pieces(torch.ones(2))
            return gm(*args)

        return run

    assert torch_dynamo.compile_frame(lambda x: x * 2, run_pieces, fullgraph=True)(torch.ones(2)).sum() == 4
    assert graphs, "Dynamo's switch for frames inside a whole capture moved"


def test_guards_of_a_captured_frame_can_be_read() -> None:
    """Moved if this fails: `torch._dynamo.eval_frame._debug_get_cache_entry_list`, or how guards print."""
    compiled = torch_dynamo.compile_frame(lambda x: x.exp(), lambda gm, inputs: gm.forward, fullgraph=True)
    assert torch_dynamo.guards_of(compiled) == ()
    compiled(torch.ones(2, 3))
    found = torch_dynamo.guards_of(compiled)
    assert any(guard.startswith("TENSOR_MATCH: ") and "size=[2, 3]" in guard for guard in found), found


def test_isolated_functions_have_code_objects_of_their_own():
    def function(x: int) -> int:
        return x + 1

    copies = [torch_dynamo.isolate(function) for _ in range(2)]
    assert copies[0].__code__ is not copies[1].__code__
    assert copies[0](1) == 2


def test_a_backend_can_tell_whether_the_captured_frame_changes_python_objects():
    """Moved if this fails: what Dynamo's translator keeps of side effects."""
    told: list[bool] = []

    def note(gm: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        told.append(torch_dynamo.changes_python_state(*known))
        return gm.forward

    kept: list[torch.Tensor] = []
    known: list[object] = []

    def keeps(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x + 1

    torch_dynamo.compile_frame(lambda x: x + 1, note, fullgraph=True)(torch.ones(2))
    torch_dynamo.compile_frame(keeps, note, fullgraph=True)(torch.ones(2))
    known.append(kept)
    torch_dynamo.compile_frame(keeps, note, fullgraph=True)(torch.ones(2))
    assert told == [False, True, False]


def test_an_empty_mapping_that_is_emptied_has_not_changed():
    """Moved if this fails: what Dynamo's translator keeps of mappings, or that it guards whether they are empty."""
    told: list[bool] = []
    kept: dict[str, torch.Tensor] = {}

    def note(gm: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        told.append(torch_dynamo.changes_python_state())
        return gm.forward

    def empties(x: torch.Tensor) -> torch.Tensor:
        kept.clear()
        return x + 1

    compiled = torch_dynamo.compile_frame(empties, note, fullgraph=True)
    compiled(torch.ones(2))
    assert told == [False]
    kept["before"] = torch.ones(2)
    compiled(torch.ones(2))
    assert told == [False, True]
    assert not kept


def test_where_a_graph_breaks_is_read_off_its_first_piece():
    found: list[tuple[str, list[str]] | None] = []

    def note(gm: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        found.append(torch_dynamo.find_break(gm))
        return gm.forward

    def breaks(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    # As blocks are: torch 2.11 may have left frames switched off.
    with torch_dynamo.frames_of_pieces_captured():
        torch_dynamo.compile_frame(breaks, note, fullgraph=False)(torch.ones(2))
    first, last = found
    assert first is not None, "GraphModule.compile_subgraph_reason moved"
    assert any("test_torch_dynamo.py" in line for line in first[1]), first
    assert last is None


def test_what_export_and_jit_record_is_told_from_an_ordinary_call():
    told: list[bool] = []

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            told.append(torch_dynamo.is_recorded())
            return x + 1

    Module()(torch.ones(2))
    torch.jit.trace(Module(), torch.ones(2), check_trace=False)
    assert told[0] is False
    assert True in told


def test_graphs_that_inductor_does_not_record_are_counted():
    before = torch_dynamo.num_unrecorded()
    torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] += 1
    assert torch_dynamo.num_unrecorded() == before + 1
    from torch._inductor import cudagraph_utils

    source = inspect.getsource(cudagraph_utils)
    assert 'counters["inductor"]["cudagraph_skips"] += 1' in source, "Inductor counts them elsewhere"


def test_what_dynamo_traces_is_recorded_only_where_it_exports():
    seen: list[bool] = []

    class Seeing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch_dynamo.is_recorded())
            return x + 1

    x = torch.ones(2)
    torch.compile(Seeing(), backend="eager")(x)
    torch.export.export(Seeing(), (x,), strict=False)
    assert seen == [False, True], "torch.compiler._is_exporting_flag moved"


def test_frames_passed_over_tell_where_and_why():
    def look(x: torch.Tensor) -> torch.Tensor:
        try:
            return x + 1 if x.sum() > 0 else x - 1
        except ZeroDivisionError:
            return x

    known = torch_dynamo.frames_passed_over()
    torch_dynamo.compile_frame(look, lambda gm, _: gm.forward, fullgraph=False)(torch.ones(2))
    frame = torch_dynamo.frames_passed_over()[-1]
    assert all(frame is not each for each in known), "Dynamo no longer keeps its metrics of frames that fail"
    assert frame.co_name.startswith("look")
    assert frame.co_filename == frame.fail_user_frame_filename == __file__
    assert frame.fail_user_frame_lineno == frame.co_firstlineno + 2
    assert "Data-dependent" in frame.fail_reason
