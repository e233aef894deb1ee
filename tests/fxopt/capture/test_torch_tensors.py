"""Fails in plain words when a torch version moves something private of tensors and autograd that fxopt touches."""

from __future__ import annotations

import torch

from fxopt.capture import torch_dynamo, torch_lowering, torch_tensors


def test_tensors_count_their_writes():
    x = torch.ones(2)
    before = torch_tensors.version_of(x)
    x.add_(1)
    assert torch_tensors.version_of(x) > before, "Tensor._version moved"


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
    x = torch_tensors.make_form(Watched, form, torch.device("cpu"))
    with torch_tensors.without_torch_function():
        assert (x.shape, x.stride(), x.dtype) == (form.shape, form.stride(), form.dtype)
        assert seen == [], "DisableTorchFunctionSubclass no longer keeps functions from a subclass"
        with torch_tensors.with_torch_function():
            assert x.dim() == 2
    assert seen, "_EnableTorchFunction no longer lets functions go to a subclass"


def test_hooks_on_saved_tensors_can_be_seen_and_writes_be_counted() -> None:
    """Moved if this fails: `_top_saved_tensors_default_hooks`, `_saved_tensors_hooks_is_enabled`, `Tensor._version`."""
    assert torch_tensors.top_saved_tensors_hooks() is None
    hooks = (lambda tensor: tensor, lambda tensor: tensor)
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        assert torch_tensors.top_saved_tensors_hooks() == hooks
    assert torch_tensors.can_hook_saved_tensors()
    with torch.autograd.graph.disable_saved_tensors_hooks("not now"):
        assert not torch_tensors.can_hook_saved_tensors()
    tensor = torch.ones(2)
    before = torch_tensors.version_of(tensor.detach())
    tensor[:1].add_(1)
    assert torch_tensors.version_of(tensor) == before + 1


def test_calls_of_compiled_graphs_are_told_by_their_autograd_nodes():
    x = torch.ones(2, requires_grad=True)
    compiled = torch_dynamo.compile_frame(
        lambda x: x.exp().sin(), torch_lowering.plain_backend, fullgraph=True
    )
    assert torch_tensors.is_compiled_node(compiled(x).grad_fn), (
        "AOTAutograd calls its autograd node otherwise"
    )
    assert not torch_tensors.is_compiled_node(x.exp().grad_fn)


def test_many_tensors_are_copied_at_once():
    into = [torch.zeros(2), torch.zeros(3)]
    torch_tensors.copy_each(into, [torch.ones(2), torch.ones(3)])
    assert all(bool((tensor == 1).all()) for tensor in into), "torch._foreach_copy_ moved"


def test_hooks_on_a_gradient_are_found():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert torch_tensors.gradient_hooks(parameter) == []

    def hook(tensor: torch.Tensor) -> None:
        pass

    parameter.register_post_accumulate_grad_hook(hook)
    assert torch_tensors.gradient_hooks(parameter) == [hook], "Tensor._post_accumulate_grad_hooks moved"
