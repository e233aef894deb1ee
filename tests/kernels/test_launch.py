"""Where kernels cannot run: the reason is said once, and plain torch and plain fx take their place."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxopt.capture import lowering, torch_lowering
from fxopt.kernels import launch

ROOT = Path(__file__).resolve().parent.parent.parent
CACHED = (launch.find_obstacle, launch.is_available, launch._can_launch, launch.warn_once)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A GPU that is seen and never used; what was found out of the machine's own is forgotten, before and after."""

    def forget() -> None:
        for function in CACHED:
            function.cache_clear()

    forget()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "HAS_TRITON", True)
    yield monkeypatch
    forget()


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 0), torch.float32, r"Old GPU has compute capability \(7, 0\), expected \(7, 5\) or newer"),
        ((7, 5), torch.bfloat16, "Old GPU has no bfloat16 instructions; float16 works on it"),
        ((7, 5), torch.float16, None),
        ((8, 0), torch.bfloat16, None),
    ],
)
def test_a_gpu_too_old_is_said_once_with_the_reason(
    gpu: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, reason: str | None
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    if reason is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert launch._can_launch(0, dtype)
        return
    with pytest.warns(
        RuntimeWarning, match=f"fxopt kernels: not used, plain torch runs instead: {reason}"
    ) as told:
        assert [launch._can_launch(0, dtype), launch._can_launch(0, dtype)] == [False, False]
    assert len(told) == 1


def test_without_triton_one_warning_serves_all_dtypes_and_ops(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(launch, "HAS_TRITON", False)
    with pytest.warns(RuntimeWarning, match="plain torch runs instead: Triton is not installed") as told:
        assert not any(launch._can_launch(0, dtype) for dtype in launch.KERNEL_DTYPES)
    assert len(told) == 1


@pytest.mark.parametrize("why", ["no Triton", "too old", None])
def test_auto_is_plain_fx_where_no_kernel_can_run(gpu: pytest.MonkeyPatch, why: str | None) -> None:
    gpu.setattr(lowering, "is_on_gpu", lambda gm: True)
    if why == "no Triton":
        gpu.setattr(launch, "HAS_TRITON", False)
    elif why == "too old":
        gpu.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    expected = torch_lowering.inductor_backend if why is None else torch_lowering.plain_backend
    assert lowering.choose_lowering("auto", gm) == (expected, "")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # any import of it fails, and no spec is found
import torch
import fxopt
from fxopt.kernels import launch
from transformers import LlamaConfig, LlamaForCausalLM

assert not launch.HAS_TRITON
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=2, vocab_size=64)
stock = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, pad_token_id=0, **sizes)).train()
ids = torch.randint(1, 64, (2, 8))
expected = stock(input_ids=ids, labels=ids).loss
model = fxopt.optimize(stock)
loss = model(input_ids=ids, labels=ids).loss
loss.backward()
torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
report = fxopt.explain(model)
assert {site.status for site in report.sites} == {"rewritten"}, report
assert not report.fallbacks
"""


@pytest.mark.slow  # a process of its own imports everything
def test_without_triton_everything_is_rewritten_and_runs_on_reference_ops() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
