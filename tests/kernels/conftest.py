"""Kernel tests: the same ones in Triton's interpreter on a CPU and, with `-m gpu`, on a GPU; fresh memory holds NaN.

On a CPU the ops run their references, so tests call a kernel file's `launch_forward` and `launch_backward`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy
import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, below at the latest

from fxopt.graph.names import op_name
from fxopt.kernels import launch, layer_norm, rms_norm

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
FLOOR_EPS = {"cpu": 1.0, "cuda": 0.5}
FLOOR_EPS_FLOAT32 = {"cpu": 8.0, "cuda": 4.0}
"""How many eps of its dtype a value may be off beside twice eager's own error, by device in 16 bits and in fp32.

Measured in the interpreter over all four ops, the most that was needed: 0.63 in bf16 (217 values), where the
interpreter truncates and a GPU rounds to nearest, none in fp16 (189), and 2.8 in fp32 (374), from sums in another
order. On a CPU for which numpy takes OpenBLAS's Haswell kernels, attention needed 7.8 in fp32 (the gradient of v, heads
of 256) and 4.7 (that of q with one key, which is 0: terms of size 8 cancel). On a GPU half an eps is one rounding to
nearest.
"""


@pytest.fixture(params=DEVICES)
def op_device(request: pytest.FixtureRequest) -> str:
    """Return a device for the op itself, which runs its reference on a CPU."""
    return request.param


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Return a device that kernels run on."""
    if request.param == "cpu" and not launch.INTERPRETED:
        pytest.skip("Triton was imported without TRITON_INTERPRET=1: kernels cannot run on a CPU")
    if request.param == "cpu" and _interpreter_cannot_loop():
        pytest.skip(
            "the interpreter of Triton 3.6 cannot loop to a tensor's value with NumPy 2.4, expected 3.7"
        )
    return request.param


def _interpreter_cannot_loop() -> bool:
    def numbers(version: str) -> list[int]:
        return [int(part) for part in version.split(".")[:2]]

    return numbers(metadata.version("triton")) < [3, 7] and numbers(numpy.__version__) >= [2, 4]


@pytest.fixture
def wide_sums(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, let a program of a norm's last sums take 16 times as many columns: those of long rows cost the most."""
    if device == "cpu":
        for module in (layer_norm.launches, rms_norm.launches):
            monkeypatch.setattr(module, "SUM_COLUMNS", 256)


@pytest.fixture(scope="session")
def _torchs_own_names() -> None:
    """Have fxopt read the names of torch's functions, which it does once, before others are in their places."""
    graph = fx.Graph()
    own = graph.call_function(torch.empty_like, (graph.placeholder("x"),))
    assert op_name(own) == "empty_like"


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory(_torchs_own_names: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_nan

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    difference = (value.double() - exact.double()).norm().item()
    size = exact.double().norm().item()
    return difference / size if size else difference


@pytest.fixture
def opcheck() -> Callable[..., Any]:
    """Return `torch.library.opcheck` on inputs without gradients: these come from a function around an op."""

    def check_op(op: Any, arguments: tuple[Any, ...], **options: Any) -> Any:
        detached = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
        return torch.library.opcheck(op, detached, **options)

    return check_op


Check = Callable[..., None]


@pytest.fixture
def check() -> Check:
    """Return a check that a value is at most twice as far from fp64 as eager is, plus a few eps of its dtype."""

    def check_value(
        name: str,
        value: torch.Tensor | None,
        eager: torch.Tensor | None,
        exact: torch.Tensor | None,
        rounded_to: torch.dtype | None = None,
    ) -> None:
        if exact is None or eager is None:
            assert value is None, f"{name}: expected none, got a gradient"
            return
        assert value is not None, f"{name}: expected a gradient, got none"
        assert (value.shape, value.dtype) == (eager.shape, eager.dtype), name
        dtype = rounded_to or value.dtype
        floor = FLOOR_EPS_FLOAT32 if dtype == torch.float32 else FLOOR_EPS
        most = 2 * relative_error(eager, exact) + floor[value.device.type] * torch.finfo(dtype).eps
        error = relative_error(value, exact)
        assert error <= most, f"{name}: error {error:.2e}, expected at most {most:.2e}"

    return check_value


@pytest.fixture
def gradients() -> Callable[..., tuple[torch.Tensor, list[torch.Tensor | None]]]:
    """Return a function: the output of `function(*inputs)`, and its gradients for the inputs that require them."""

    def run(
        function: Callable[..., torch.Tensor],
        inputs: list[torch.Tensor | None],
        dy: torch.Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        leaves = [
            None
            if tensor is None
            else tensor.detach()
            .to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
            .requires_grad_(tensor.requires_grad)
            for tensor in inputs
        ]
        y = function(*leaves)
        needed = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        dy = torch.ones_like(y) if dy is None else dy.to(y.dtype)
        found = iter(torch.autograd.grad(y, needed, dy) if needed else ())
        return y.detach(), [
            next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves
        ]

    return run


@pytest.fixture
def joint_targets() -> Callable[..., list[str]]:
    """Return a function: the fxopt ops in AOTAutograd's forward and then backward graph of `function(*inputs)`."""

    def record(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[str]:
        from functorch.compile import aot_function, make_boxed_func

        targets: list[str] = []

        def compiler(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            targets.extend(str(node.target) for node in gm.graph.nodes if "fxopt" in str(node.target))
            return make_boxed_func(gm.forward)

        aot_function(function, fw_compiler=compiler, bw_compiler=compiler)(*inputs).sum().backward()
        return targets

    return record
