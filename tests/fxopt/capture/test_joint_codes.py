"""The pass that gives ops four-bit weights as they are stored: no decoded weight is left, gradients are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import default_partition
from torch._inductor.utils import run_and_get_code

from fxopt.capture import torch_lowering
from fxopt.capture.joint_codes import read_codes
from fxopt.capture.joint_passes import mark_recomputed
from fxopt.kernels.dequantize_4bit import dequantize_4bit
from fxopt.kernels.lora_linear import lora_linear

WIDTHS = (24, 16)
IN_WIDTH = 64


def layers(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, kept: bool
) -> torch.Tensor:
    weights, start = [], 0
    for width in WIDTHS:
        stop = start + width * IN_WIDTH // 64
        weights.append(
            dequantize_4bit(
                packed[start * 32 : stop * 32],
                absmax[start:stop],
                shape=(width, IN_WIDTH),
                blocksize=64,
                quant_type="nf4",
                dtype=torch.float32,
            )
        )
        start = stop
    factors = [b[:width] for width in WIDTHS]
    inputs: dict[str, Any] = dict(owners=[0, 1], scales=[2.0, 0.5])
    q, k = lora_linear(x, weights, [None] * 2, [None] * 2, [a, a * 2], factors, **inputs)
    y = torch.tanh(q).sum(-1) + torch.tanh(k).sum(-1)
    return y + (weights[0].sum() if kept else 0)


@pytest.mark.parametrize("kept", [False, True], ids=["for the ops alone", "read by others too"])
def test_ops_decode_their_weights_themselves(kept: bool) -> None:
    torch.manual_seed(0)
    packed = torch.randint(0, 256, (sum(WIDTHS) * IN_WIDTH // 2, 1), dtype=torch.uint8)
    absmax = torch.rand(sum(WIDTHS) * IN_WIDTH // 64)
    leaves = [
        torch.randn(shape).requires_grad_() for shape in ((3, 5, IN_WIDTH), (4, IN_WIDTH), (max(WIDTHS), 4))
    ]
    counts: list[int] = []
    targets: list[list[str]] = []

    def partition(joint: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        counts.append(read_codes(joint.graph))
        mark_recomputed(joint.graph)
        joint.graph.lint()
        return default_partition(joint, joint_inputs, **options)

    def run_nodes(graph: fx.GraphModule, _: Any) -> Any:
        targets.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=run_nodes, bw_compiler=run_nodes, partition_fn=partition)
    compiled = torch.compile(layers, backend=backend, fullgraph=True)
    found = [
        torch.autograd.grad(function(*leaves, packed, absmax, kept).sum(), leaves)
        for function in (compiled, layers)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert counts == [4], "two layers, forward and backward"
    forward, backward = targets
    assert forward.count("fxopt.dequantize_4bit.default") == kept
    assert backward.count("fxopt.dequantize_4bit.default") == 0
    assert "fxopt.lora_linear.default" in forward
    assert "fxopt.lora_linear_backward.default" in backward


def test_a_weight_decoded_to_another_dtype_is_left() -> None:
    graph = fx.Graph()
    ops: Any = torch.ops.fxopt
    x, packed, absmax, a, b = (graph.placeholder(name) for name in ("x", "packed", "absmax", "a", "b"))
    x.meta["val"] = torch.empty(3, IN_WIDTH, dtype=torch.bfloat16, device="meta")
    arguments = (packed, absmax, None, None, None, [24, IN_WIDTH], 64, "nf4")
    for dtype, expected in ((torch.float32, 0), (torch.bfloat16, 1)):
        weight = graph.call_function(ops.dequantize_4bit.default, (*arguments, dtype))
        lists = ([x], [weight], [None], [a], [b], [None] * 4, [""], [24], [0], [0], [1.0], torch.bfloat16)
        node = graph.call_function(ops.lora_linear.default, lists)
        graph.output(node)
        assert read_codes(graph) == expected
        assert node.args[6] == (["nf4:64"] if expected else [""])
        graph.erase_node(next(iter(reversed(graph.nodes))))
        graph.erase_node(node)


@pytest.mark.slow
def test_inductor_reads_the_codes_where_they_lie() -> None:
    """Codes took the place of a decoded weight, whose layout Inductor would otherwise make a copy of them in."""
    packed = torch.randint(0, 256, (sum(WIDTHS) * IN_WIDTH // 2, 1), dtype=torch.uint8)
    absmax = torch.rand(sum(WIDTHS) * IN_WIDTH // 64)
    leaves = [
        torch.randn(shape).requires_grad_() for shape in ((3, 5, IN_WIDTH), (4, IN_WIDTH), (max(WIDTHS), 4))
    ]
    torch._dynamo.reset()
    compiled = torch.compile(layers, backend=torch_lowering.inductor_backend, fullgraph=True)
    y, code = run_and_get_code(compiled, *leaves, packed, absmax, False)
    assert torch.allclose(y, layers(*leaves, packed, absmax, False))
    text = "".join(code)
    assert "fxopt.lora_linear" in text
    assert not [line for line in text.splitlines() if "empty_strided" in line and "uint8" in line]
