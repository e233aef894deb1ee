"""Fails in plain words when a torch version moves something private of modules that fxopt touches."""

from __future__ import annotations

import sys

import torch

from fxopt.capture import torch_modules


def test_modules_have_a_compile_slot_that_copies_and_pickles_drop():
    module = torch.nn.Linear(2, 2)
    assert torch.nn.Module._compiled_call_impl is None, "Module._compiled_call_impl moved"
    module.__dict__["_compiled_call_impl"] = lambda x: "slot"
    assert module(torch.ones(2)) == "slot", "Module.__call__ no longer goes through _compiled_call_impl"
    assert "_compiled_call_impl" not in module.__getstate__(), "Module.__getstate__ no longer drops the slot"


def test_stock_call_is_the_call_without_a_slot():
    module = torch.nn.Linear(2, 2)
    x = torch.ones(2)
    assert torch.equal(torch_modules.stock_call(module, x), module(x)), "Module._call_impl moved"


def test_modules_keep_their_hooks_where_we_look():
    module = torch.nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
    module.register_full_backward_hook(lambda *_: None)
    module.register_full_backward_pre_hook(lambda *_: None)
    for name in torch_modules.HOOK_DICTS:
        assert len(getattr(module, name)) == 1, f"Module.{name} moved"
    assert not torch_modules.has_global_hooks()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert torch_modules.has_global_hooks(), "the process-wide hook dictionaries moved"
    handle.remove()


def test_modules_hold_children_and_tensors_where_we_look():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    assert torch_modules.children_of(model) == dict(model.named_children()), "Module._modules moved"
    ours = {id(tensor) for tensor in torch_modules.own_tensors(model[0])}
    assert ours == {id(tensor) for tensor in (*model.parameters(), *model.buffers())}, (
        "_parameters or _buffers moved"
    )
    assert not torch_modules.carries_hooks(model)
    model.register_forward_hook(lambda *_: None)
    assert torch_modules.carries_hooks(model)


def test_the_method_that_reads_the_slot_has_the_name_we_look_for():
    callers = []
    module = torch.nn.Linear(2, 2)
    module.__dict__[torch_modules.SLOT] = lambda x: callers.append(sys._getframe(1).f_code.co_name)
    module(torch.ones(2))
    assert callers == [torch_modules.CALLER], "Module.__call__ no longer reads the slot itself"


def test_what_torch_compile_wraps_around_a_module_is_told_by_its_class():
    compiled = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    assert isinstance(compiled, torch_modules.OptimizedModule), "torch._dynamo.OptimizedModule moved"


def test_parameters_lie_in_a_dictionary_that_may_be_another_one():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3))
    held = module[0]._parameters
    with torch_modules.parameters_in_plain_dicts(module):
        assert type(module[0]._parameters) is dict
        assert module[0]._parameters is not held
        assert [name for name, _ in module.named_parameters()] == ["0.weight", "0.bias"], "_parameters moved"
    assert module[0]._parameters is held
