"""AOTAutograd's cache serves graphs that call fxopt's functions, and no other version of fxopt's source."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import fx

from fxopt.capture import caching
from fxopt.kernels.rms_norm import rms_norm

STEP = """
import torch, fxopt
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM
torch.manual_seed(0)
config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, vocab_size=64)
model = fxopt.optimize(AutoModelForCausalLM.from_config(config), lowering="inductor").train()
ids = torch.arange(12)[None] % 64
loss = model(input_ids=ids, labels=ids).loss
loss.backward()
gradients = sum(parameter.grad.double().abs().sum() for parameter in model.parameters())
found = counters["aot_autograd"]
print(*(found[f"autograd_cache_{what}"] for what in ("hit", "miss", "bypass")), loss.item(), gradients.item())
"""


def own(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def test_only_fxopts_functions_are_named():
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)

    gm = fx.symbolic_trace(function)
    relu = next(node for node in gm.graph.nodes if node.op == "call_function")
    for target in (rms_norm, own):
        with gm.graph.inserting_after(relu):
            gm.graph.call_function(target, tuple(gm.graph.find_nodes(op="placeholder")))
    name = f"{rms_norm.__module__}.rms_norm"
    assert caching.find_cacheable(gm) == {name: caching.source_digest()}


def test_the_digest_covers_kernels_and_patterns(monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    monkeypatch.setattr(caching.Path, "read_bytes", lambda path: read.append(path.as_posix()) or b"")
    caching.source_digest.__wrapped__()
    for name in ("fxopt/pipeline.py", "kernels/rope/op.py", "patterns/rope.py", "fxopt/capture/caching.py"):
        assert sum(path.endswith(name) for path in read) == 1, name


@pytest.mark.slow
def test_a_second_process_compiles_no_block_anew(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    results = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
        results.append(done.stdout.split())
    first, second = results
    assert first[:3] == ["0", first[1], "0"]
    assert int(first[1]) >= 3, "two captures of the block, and the head"
    assert second[:3] == [first[1], "0", "0"]
    assert second[3:] == first[3:]
