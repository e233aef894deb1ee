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
    assert f"RuntimeError: {told}." in " ".join(reason_of(caught.value).split())
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
