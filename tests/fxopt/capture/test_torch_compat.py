"""Fails in plain words when a torch version moves something private that fxopt touches."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable

import pytest
import torch

from fxopt.capture import torch_compat
from fxopt.capture.reasons import reason_of
from fxopt.demo.training import count_saved_bytes
from fxopt.graph.view import modules_of


def test_modules_have_a_compile_slot_that_copies_and_pickles_drop():
    module = torch.nn.Linear(2, 2)
    assert torch.nn.Module._compiled_call_impl is None, "Module._compiled_call_impl moved"
    module.__dict__["_compiled_call_impl"] = lambda x: "slot"
    assert module(torch.ones(2)) == "slot", "Module.__call__ no longer goes through _compiled_call_impl"
    assert "_compiled_call_impl" not in module.__getstate__(), "Module.__getstate__ no longer drops the slot"


def test_stock_call_is_the_call_without_a_slot():
    module = torch.nn.Linear(2, 2)
    x = torch.ones(2)
    assert torch.equal(torch_compat.stock_call(module, x), module(x)), "Module._call_impl moved"


def test_modules_keep_their_hooks_where_we_look():
    module = torch.nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
    module.register_full_backward_hook(lambda *_: None)
    module.register_full_backward_pre_hook(lambda *_: None)
    for name in torch_compat.HOOK_DICTS:
        assert len(getattr(module, name)) == 1, f"Module.{name} moved"
    assert not torch_compat.has_global_hooks()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert torch_compat.has_global_hooks(), "the process-wide hook dictionaries moved"
    handle.remove()


def test_modules_hold_children_and_tensors_where_we_look():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    assert torch_compat.children_of(model) == dict(model.named_children()), "Module._modules moved"
    ours = {id(tensor) for tensor in torch_compat.own_tensors(model[0])}
    assert ours == {id(tensor) for tensor in (*model.parameters(), *model.buffers())}, (
        "_parameters or _buffers moved"
    )
    assert not torch_compat.carries_hooks(model)
    model.register_forward_hook(lambda *_: None)
    assert torch_compat.carries_hooks(model)


def test_the_method_that_reads_the_slot_has_the_name_we_look_for():
    callers = []
    module = torch.nn.Linear(2, 2)
    module.__dict__[torch_compat.SLOT] = lambda x: callers.append(sys._getframe(1).f_code.co_name)
    module(torch.ones(2))
    assert callers == [torch_compat.CALLER], "Module.__call__ no longer reads the slot itself"


def test_tensors_count_their_writes():
    x = torch.ones(2)
    before = torch_compat.version_of(x)
    x.add_(1)
    assert torch_compat.version_of(x) > before, "Tensor._version moved"


def test_functions_leave_a_subclass_alone_within_the_scope():
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
        ):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

        @classmethod
        def __torch_dispatch__(
            cls, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
        ):
            raise AssertionError("no value is read")

    form = torch.ones(2, 3).t()
    x = torch_compat.make_form(Watched, form, torch.device("cpu"))
    with torch_compat.without_torch_function():
        assert (x.shape, x.stride(), x.dtype) == (form.shape, form.stride(), form.dtype)
        assert seen == [], "DisableTorchFunctionSubclass no longer keeps functions from a subclass"
        with torch_compat.with_torch_function():
            assert x.dim() == 2
    assert seen, "_EnableTorchFunction no longer lets functions go to a subclass"


def test_what_torch_compile_wraps_around_a_module_is_told_by_its_class():
    compiled = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    assert isinstance(compiled, torch_compat.OptimizedModule), "torch._dynamo.OptimizedModule moved"


def test_dynamo_takes_a_patched_call_through_the_slot():
    """The model's capture needs this to see each block as one leaf."""
    inner, graphs = torch.nn.Linear(2, 2), []

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if torch_compat.is_fake(x) else torch_compat.stock_call(inner, x)

    leaf.fxopt_leaf = True

    def run(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(x) * 2

    def keep(gm: torch.fx.GraphModule, _: object) -> object:
        graphs.append(gm)
        return gm.forward

    inner.__dict__["_compiled_call_impl"] = torch_compat.mark_leaf(leaf)
    inner.__dict__["_call_impl"] = functools.partial(torch_compat.stock_call, inner)
    torch_compat.compile_frame(run, keep, fullgraph=True)(inner, torch.ones(2))
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any(getattr(target, "fxopt_leaf", False) for target in targets), (
        "Dynamo no longer goes through Module._compiled_call_impl when _call_impl is not the stock method"
    )


def test_capture_limits_are_raised_in_scope():
    from torch._dynamo import config

    before = config.recompile_limit
    with torch_compat.capture_scope(torch_compat.make_capture_settings()):
        assert config.recompile_limit == torch_compat.RECOMPILE_LIMIT
    assert config.recompile_limit == before


def test_no_file_is_tokenized_for_log_lines_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import funcname_cache

    read: list[str] = []
    add_file = funcname_cache._add_file
    monkeypatch.setattr(funcname_cache, "_add_file", lambda name: (read.append(name), add_file(name)))
    kept = torch_compat.FUNCTION_NAMES
    assert funcname_cache.cache is kept, "another scope has left its stand-in"
    kept.clear()

    def capture() -> None:
        torch.compile(torch_compat.isolate(lambda x: torch.relu(x) + 1), backend="eager")(torch.ones(2))

    with torch_compat.capture_scope(torch_compat.make_capture_settings()):
        capture()
        assert funcname_cache.get_funcname(__file__, 1) is None, "get_funcname reads its names elsewhere"
    assert not read
    assert funcname_cache.cache is kept
    monkeypatch.setattr(torch_compat, "is_artifact_logged", lambda name: name == "trace_call")
    with torch_compat.capture_scope(torch_compat.make_capture_settings()):
        assert funcname_cache.get_funcname(__file__, 1) == "", "get_funcname reads its names elsewhere"
    assert read == [__file__]


def test_a_refused_capture_raises_one_of_the_capture_errors():
    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    compiled = torch_compat.compile_frame(breaks, lambda gm, _: gm.forward, fullgraph=True)
    with pytest.raises(torch_compat.CAPTURE_ERRORS) as caught:
        compiled(torch.ones(2))
    assert "test_torch_compat.py:" in reason_of(caught.value)


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


def test_nodes_run_one_by_one_let_backward_run_twice():
    x = torch.ones(3, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.exp().sin().sum()

    compiled = torch_compat.compile_frame(function, torch_compat.plain_backend, fullgraph=True)
    compiled(x).backward()
    loss = compiled(x)
    loss.backward(retain_graph=True)
    loss.backward()
    assert x.grad is not None
    (once,) = torch.autograd.grad(function(x), x)
    torch.testing.assert_close(x.grad, 3 * once, msg="AOTAutograd's bw_donated_idxs moved")


def test_plain_lowering_saves_no_more_than_stock_and_differentiates():
    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
        return ((torch.sigmoid(x * w) + x.tanh()).sum(),)

    def run(call: Callable[..., tuple[torch.Tensor]]) -> tuple[int, tuple[torch.Tensor, ...]]:
        with count_saved_bytes(torch.nn.ParameterList([x, w])) as saved:  # its parameters are not counted
            (out,) = call(x, w)
        return saved.total, torch.autograd.grad(out, (x, w))

    x, w = (torch.nn.Parameter(torch.randn(64)) for _ in range(2))
    compiled = torch_compat.plain_backend(torch.fx.symbolic_trace(function), [x, w])
    (our_bytes, ours), (stock_bytes, stock) = run(compiled), run(function)
    assert stock_bytes == 2 * 64 * 4, "stock saves the results of sigmoid and tanh"
    assert our_bytes <= stock_bytes
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


def test_isolated_functions_keep_defaults_and_closures():
    y = 3

    def function(x: int = 1, *, z: int = 2) -> int:
        return x + y + z

    copy = torch_compat.isolate(function)
    assert isinstance(copy, types.FunctionType)
    assert copy() == 6


def test_modules_whose_tensors_are_left_unlisted_list_them_as_ever():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    parameters, buffers = dict(model.named_parameters("p")), dict(model.named_buffers(recurse=True))
    with torch_compat.tensors_left_unlisted((model, model[0])):
        assert dict(model.named_parameters("p")) == parameters
        assert dict(model.named_buffers(recurse=True)) == buffers
        assert len(list(model.parameters())) == 4
    assert not {"named_parameters", "named_buffers"}.intersection(model.__dict__)


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

    pieces = torch_compat.compile_frame(entry, note, fullgraph=False)

    def run_pieces(gm, inputs):
        def run(*args):
            with torch_compat.frames_of_pieces_captured():
                pieces(torch.ones(2))
            return gm(*args)

        return run

    assert torch_compat.compile_frame(lambda x: x * 2, run_pieces, fullgraph=True)(torch.ones(2)).sum() == 4
    assert graphs, "Dynamo's switch for frames inside a whole capture moved"


def test_guards_of_a_captured_frame_can_be_read() -> None:
    """Moved if this fails: `torch._dynamo.eval_frame._debug_get_cache_entry_list`, or how guards print."""
    compiled = torch_compat.compile_frame(lambda x: x.exp(), lambda gm, inputs: gm.forward, fullgraph=True)
    assert torch_compat.guards_of(compiled) == ()
    compiled(torch.ones(2, 3))
    found = torch_compat.guards_of(compiled)
    assert any(guard.startswith("TENSOR_MATCH: ") and "size=[2, 3]" in guard for guard in found), found


def test_hooks_on_saved_tensors_can_be_seen_and_writes_be_counted() -> None:
    """Moved if this fails: `_top_saved_tensors_default_hooks`, `_saved_tensors_hooks_is_enabled`, `Tensor._version`."""
    assert torch_compat.top_saved_tensors_hooks() is None
    hooks = (lambda tensor: tensor, lambda tensor: tensor)
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        assert torch_compat.top_saved_tensors_hooks() == hooks
    assert torch_compat.can_hook_saved_tensors()
    with torch.autograd.graph.disable_saved_tensors_hooks("not now"):
        assert not torch_compat.can_hook_saved_tensors()
    tensor = torch.ones(2)
    before = torch_compat.writes_to(tensor.detach())
    tensor[:1].add_(1)
    assert torch_compat.writes_to(tensor) == before + 1
