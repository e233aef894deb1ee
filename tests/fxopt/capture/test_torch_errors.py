"""Fails in plain words when a torch version moves something private of how captures fail that fxopt touches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxopt.capture import torch_dynamo, torch_errors
from fxopt.capture.reasons import reason_of
from fxopt.errors import FxoptError
from fxopt.rewriting.failures import said_by


def test_a_refused_capture_raises_one_of_the_capture_errors():
    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    compiled = torch_dynamo.compile_frame(breaks, lambda gm, _: gm.forward, fullgraph=True)
    with pytest.raises(torch_errors.CAPTURE_ERRORS) as caught:
        compiled(torch.ones(2))
    assert "test_torch_errors.py:" in reason_of(caught.value)


def test_what_a_backend_raises_is_told_from_a_refused_capture_and_its_cause_is_found():
    def fails(gm: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        raise FxoptError("a mistake")

    compiled = torch_dynamo.compile_frame(lambda x: x + 1, fails, fullgraph=True)
    with pytest.raises(torch_errors.CAPTURE_ERRORS) as caught:
        compiled(torch.ones(2))
    assert torch_errors.is_of_backend(caught.value), "torch._dynamo.exc.BackendCompilerFailed moved"
    assert isinstance(torch_errors.cause_to_raise(caught.value), FxoptError)
    assert not torch_errors.hangs_on_values(caught.value)


LONG = f"a view of a leaf was written to, {'and read again, ' * 20}\nwhich no backward can follow"


def test_a_sentence_of_a_backend_over_several_lines_is_told_whole():
    def fails(gm: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        raise RuntimeError(f"{LONG}.\nHint: write elsewhere")

    compiled = torch_dynamo.compile_frame(lambda x: x + 1, fails, fullgraph=True)
    with pytest.raises(torch_errors.CAPTURE_ERRORS) as caught:
        compiled(torch.ones(2))
    told = " ".join(LONG.split())
    assert f"RuntimeError: {told}" in " ".join(reason_of(caught.value).split())
    assert "Hint" not in reason_of(caught.value)
    assert " ".join(said_by(RuntimeError(LONG)).split()) == f"RuntimeError: {told}"


def test_sizes_that_hang_on_values_are_told_by_their_error():
    def hangs(x: torch.Tensor) -> torch.Tensor:
        size = x.sum().item()
        return x + 1 if size > 3 else x

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch_dynamo.compile_frame(hangs, lambda gm, _: gm.forward, fullgraph=True)
        with pytest.raises(torch_errors.CAPTURE_ERRORS) as caught:
            compiled(torch.ones(2, dtype=torch.int64))
    assert torch_errors.cause_to_raise(caught.value) is None


def reason_under(function: Callable[..., object], *args: object, **settings: bool) -> str:
    with torch._dynamo.config.patch(**settings):
        compiled = torch_dynamo.compile_frame(function, lambda gm, _: gm.forward, fullgraph=True)
        with pytest.raises(torch_errors.CAPTURE_ERRORS) as caught:
            compiled(*args)
    return reason_of(caught.value)


def test_a_value_that_is_not_known_has_the_same_name_in_all_captures():
    def looks(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + 1 if y.sum().item() > 3.0 else x

    def looks_later(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        unread = x.sum().item()
        return x + unread if y.sum().item() > 3.0 else x

    told = [
        reason_under(each, torch.ones(2), torch.ones(2), capture_scalar_outputs=True).rpartition("; at ")[0]
        for each in (looks, looks_later)
    ]
    assert told[0] == told[1]
    assert told[0].startswith("what is computed depends on the values of a tensor; ")
    assert "value > 3.0" in told[0]
    assert "unhinted" not in told[0]
    assert not told[0].endswith(".")


class Held:
    """What no graph takes."""


def test_an_object_that_a_leaf_is_given_is_told_by_its_class():
    leaf = torch_dynamo.mark_leaf(lambda x, held: x)
    reason = reason_under(lambda x: leaf(x, Held()), torch.ones(2))
    assert reason.startswith("a block is given an object that no graph can hold, ")
    assert ": a Held; Failed to convert" in reason


def test_an_error_of_an_op_is_told_without_the_sizes_it_was_given():
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise TypeError("'one' is not \"two\". Never")

    leaf = torch_dynamo.mark_leaf(fails)
    told = {reason_under(lambda x: leaf(x), torch.ones(size)).rpartition("; at ")[0] for size in (2, 3)}
    assert len(told) == 1
    (text,) = told
    assert text.endswith("; TypeError: 'one' is not \"two\"")
    assert text.startswith("what is called fails on tensors without values, with which it is captured; ")
