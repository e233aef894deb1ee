"""Every kernel compiles for every supported architecture, without a GPU, and keeps its values in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

MOST_STACK_BYTES = 64  # a few spilled values; a tile that does not fit takes hundreds of bytes
KNOWN_STACK_BYTES = {
    ("rms_norm_backward_kernel", 75, "float32"): 192,
    ("layer_norm_backward_kernel", 89, "float32"): 200,
    ("attention_backward_keys_kernel", 100, "bfloat16"): 240,
    ("attention_forward_kernel", 100, "bfloat16"): 200,
}
"""What spills more, and is kept: two norms at rows of 16384 in fp32, whose gradient of the weight alone fills the
registers (narrower rows do not spill), and two tiles of attention that fit on sm_90 and were not tuned on sm_100."""
KNOWN_STACK_BYTES_FROM_TRITON_3_8 = {
    ("layer_norm_backward_kernel", 90, "bfloat16"): 88,
    ("attention_forward_kernel", 90, "bfloat16"): 144,
    ("attention_backward_queries_kernel", 90, "bfloat16"): 104,
}
"""What its compiler spills where the one before did not: a norm at rows of 16384, and attention with a mask
of values and a softcap at once."""
KNOWN_STACK_BYTES_BEFORE_TRITON_3_7 = {
    **{("attention_backward_keys_kernel", arch, "float32"): 312 for arch in (80, 89, 90, 100)},
    ("attention_delta_kernel", 100, "bfloat16"): 96,
    ("extend_rows_kernel", 80, "bfloat16"): 168,
}
"""What its compiler spills where later ones do not: gradients of keys in fp32, and adapters of rank 256."""
TARGETS = [
    (75, "float16"),
    *((arch, "bfloat16") for arch in (80, 89, 90, 100)),
    (90, "float32"),
    *(pytest.param(arch, "float32", marks=pytest.mark.exhaustive) for arch in (75, 80, 89, 100)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), TARGETS)
def test_kernels_compile_and_do_not_spill(arch: int, dtype: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, script, str(arch), dtype], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    names = {line["kernel"] for line in built}
    # Before 8.0 attention runs in plain torch: there its kernels' tiles would take all memory for their stack. So do
    # the narrow products of adapters there, and those in fp32 everywhere.
    narrow = {"extend_rows_kernel", "narrow_products_kernel", "narrow_sum_kernel"}
    narrow |= {"gated_products_kernel", "gated_rows_kernel"}
    is_narrow = arch >= 80 and dtype != "float32"
    long = {"layer_norm_long_backward_kernel"} if dtype != "float32" else set()
    products = {
        "attention_forward_kernel",
        "attention_delta_kernel",
        "attention_backward_keys_kernel",
        "attention_backward_queries_kernel",
    }
    assert names == (products if arch >= 80 else set()) | (narrow if is_narrow else set()) | long | {
        "rms_norm_forward_kernel",
        "rms_norm_backward_kernel",
        "rms_norm_sum_kernel",
        "layer_norm_forward_kernel",
        "layer_norm_backward_kernel",
        "layer_norm_sum_kernel",
        "glu_forward_kernel",
        "glu_backward_kernel",
        "experts_product_kernel",
        "experts_weight_gradient_kernel",
        "experts_bias_gradient_kernel",
        "experts_sum_kernel",
        "experts_unit_backward_kernel",
        "route_forward_kernel",
        "route_backward_kernel",
        "activation_forward_kernel",
        "activation_backward_kernel",
        "cross_entropy_forward_kernel",
        "cross_entropy_backward_kernel",
        "linear_cross_entropy_forward_kernel",
        "linear_cross_entropy_backward_kernel",
        "dequantize_4bit_kernel",
        "rope_kernel",
        "norm_rope_forward_kernel",
        "norm_rope_backward_kernel",
        "norm_rope_sum_kernel",
        "pack_bits_kernel",
        "drop_items_kernel",
        "join_rows_kernel",
        "mask_intervals_kernel",
        "key_ranges_kernel",
    }
    assert [line for line in built if line["stack_bytes"] > most_stack_bytes(line)] == []


def most_stack_bytes(line: dict[str, Any]) -> int:
    major, minor, *_ = metadata.version("triton").split(".")
    version = int(major), int(minor)
    newer = KNOWN_STACK_BYTES_FROM_TRITON_3_8 if version >= (3, 8) else {}
    older = KNOWN_STACK_BYTES_BEFORE_TRITON_3_7 if version < (3, 7) else {}
    known = KNOWN_STACK_BYTES | newer | older
    return known.get((line["kernel"], line["arch"], line["dtype"]), MOST_STACK_BYTES)
