"""Reasons that concern a place in the user's model end with it: the path of a module, and a line of a file."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.capture import places
from fxopt.capture.installation import find_installation

NOT_CALLED = (
    "no block was called, as where they are skipped, wrapped after fxopt.optimize, or called by their forward"
)


class Box:
    """What no graph can be given."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(
        self, x: torch.Tensor, box: Any = None, shared: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        if shared is not None:
            shared.pop("taken", None)
        return x + self.inner(x)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.box: Box | None = None
        self.skips, self.num_blocks, self.hands_on = False, 3, False

    def forward(self, x: torch.Tensor, box: Box | None = None) -> torch.Tensor:
        if self.skips:
            return x * self.layers[0].inner[0].weight.sum()
        shared = {"taken": x, "kept": x} if self.hands_on else None
        for layer in self.layers[: self.num_blocks]:
            x = layer(x, self.box, shared)  # the call
        return x.tanh()


def line_of(function: Any, text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    (place,) = (number for number, line in enumerate(lines) if text in line)
    return f"test_places.py:{first + place}"


def reasons_of(model: nn.Module) -> dict[str, str]:
    return {fallback.region: fallback.reason for fallback in fxopt.explain(model).fallbacks}


def step(model: nn.Module, *args: Any) -> None:
    model(torch.randn(2, 8, requires_grad=True), *args).sum().backward()


def test_an_argument_that_no_graph_takes_is_told_with_the_line_of_the_call() -> None:
    model = fxopt.optimize(Tower())
    model.box = Box()
    step(model)
    assert reasons_of(model)["layers"] == f"argument 1 is a Box; at {line_of(Tower.forward, '# the call')}"
    model = fxopt.optimize(Tower())

    def call() -> torch.Tensor:
        return model(torch.randn(2, 8), Box())

    call().sum().backward()
    here = line_of(call, "Box()")
    assert reasons_of(model) == {"(model)": f"argument 1 is a Box; at {here}"}


def test_a_hook_is_told_with_its_module_and_its_own_line() -> None:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None: ...

    model = fxopt.optimize(Tower())
    model.layers[1].inner[0].register_forward_hook(hook)
    step(model)
    place = f"inner.0 (test_places.py:{hook.__code__.co_firstlineno})"
    assert reasons_of(model) == {
        "layers": f"a hook sits on the Linear inside: calls of this block run stock; at {place}",
        "(model)": "a hook sits on a Linear of a block and may keep what the forward reads: "
        f"the calls run stock around the compiled blocks; at {place}",
    }


def test_a_region_whose_calls_all_ran_stock_is_listed_as_stock_with_the_reason_until_one_is_served() -> None:
    model = fxopt.optimize(Tower())
    handle = model.layers[1].inner[0].register_forward_hook(lambda *_: None)
    step(model)
    blocks, tail = fxopt.explain(model).regions
    assert (blocks.status, blocks.reason) == ("captured", "")
    assert (tail.status, tail.reason) == ("stock", reasons_of(model)["(model)"])
    handle.remove()
    step(model)
    assert [(region.status, region.reason) for region in fxopt.explain(model).regions] == [
        ("captured", "")
    ] * 2
    model = fxopt.optimize(Tower())
    model.box = Box()
    step(model)
    blocks = fxopt.explain(model).regions[0]
    assert (blocks.status, blocks.reason) == ("stock", reasons_of(model)["layers"])


@pytest.mark.parametrize(
    ("setting", "reason", "of"),
    [
        ({"skips": True}, f"what stands after the blocks was not captured: {NOT_CALLED}", Tower),
        ({"hands_on": True}, "a block takes something out of a mapping it is given", Block),
    ],
)
def test_what_keeps_the_model_from_capture_is_told_with_the_forward(
    setting: Any, reason: str, of: type
) -> None:
    model = fxopt.optimize(Tower())
    for name, value in setting.items():
        setattr(model, name, value)
    step(model)
    told = reasons_of(model)["(model)"]
    assert reason in told
    assert told.endswith(f"; at {line_of(of.forward, 'def forward')}")


def test_a_class_and_a_module_that_another_package_patched_are_told_with_the_line() -> None:
    scope: dict[str, Any] = {"__name__": "other_kernels"}
    exec(compile("\n\ndef forward(self, x):\n    return x.tanh()", "kernels.py", "exec"), scope)
    kind = type("Patched", (nn.Module,), {"forward": scope["forward"], "__module__": __name__})
    model = fxopt.optimize(nn.Sequential(kind(), kind()))
    installation = find_installation(model)
    assert installation is not None
    (note,) = installation.ledger.notes
    assert note.startswith("Patched was patched by other_kernels")
    assert note.endswith("; at kernels.py:3")


@contextlib.contextmanager
def scoped() -> Iterator[None]:
    yield


def test_what_pythons_library_wraps_has_its_own_line() -> None:
    assert places.line_of(scoped) == f"test_places.py:{inspect.getsourcelines(inspect.unwrap(scoped))[1]}"


def test_what_a_user_wraps_has_the_line_of_the_wrapper() -> None:
    @functools.wraps(scoped)
    def wrapper() -> Any:
        return scoped()

    assert places.line_of(wrapper) == f"test_places.py:{wrapper.__code__.co_firstlineno}"
