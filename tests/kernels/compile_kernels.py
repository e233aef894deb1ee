"""Compile kernels without a GPU: `python compile_kernels.py ARCH DTYPE...` prints one JSON line per kernel.

A program of its own, since it needs Triton without the interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fxopt.kernels import cross_entropy, glu, linear_cross_entropy, rms_norm
from fxopt.kernels.attention import kernels, launches, masks
from fxopt.kernels.launch import num_warps_for

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INTEGERS = re.compile(r".*_stride$|^num_.*|^blocks_per_row$|^ignore_index$|^queries_per_row$")
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
WIDTHS = (128, 3584, 4096, 8192, 16384, 18944)
ODD_WIDTH = 1001
DEFAULT_STAGES = 3

Build = tuple[Any, dict[str, Any], dict[str, str], int | tuple[int, int], bool]
"""Kernel, constants, types of pointers not of the model's dtype, warps (and stages), floating-point fusion."""


def rms_norm_builds() -> Iterator[Build]:
    fp32 = {"p_statistics": "*fp32", "p_partial": "*fp32"}
    plain = dict(GROUPS=1, HAS_WEIGHT=True, GATE="", GATE_BEFORE=False, CENTRE=False)
    forms = [(width, plain) for width in (*WIDTHS, ODD_WIDTH)]
    forms += [(4096, plain | dict(CENTRE=True)), (4096, plain | dict(HAS_WEIGHT=False))]
    forms += [(4096, plain | dict(GATE="silu", GATE_BEFORE=before)) for before in (True, False)]
    for width, form in forms:
        rows, columns = rms_norm._tile(width, rms_norm.TILE_ELEMENTS)
        form = form | dict(WIDTH=width, BLOCK_ROWS=rows, BLOCK_COLUMNS=columns)
        warps = num_warps_for(rows * columns)
        gated = form["GATE"] != ""
        keep = columns <= rms_norm.MOST_KEPT_COLUMNS
        backward = form | dict(NEED_X=True, NEED_WEIGHT=form["HAS_WEIGHT"], NEED_GATE=gated, KEEP_WEIGHT=keep)
        yield rms_norm.rms_norm_forward_kernel, form | dict(CAST_FIRST=True), fp32, warps, True
        yield rms_norm.rms_norm_backward_kernel, backward | dict(STAGES=1), fp32, warps, True
        yield rms_norm.rms_norm_backward_kernel, backward | dict(STAGES=3), fp32, warps, True
    yield rms_norm.rms_norm_sum_kernel, dict(BLOCK_ROWS=64, BLOCK_COLUMNS=64), fp32, 8, True


def glu_builds() -> Iterator[Build]:
    for act in glu.ACTIVATIONS:
        form = dict(ACT=act, BLOCK=glu.BLOCK)
        yield glu.glu_forward_kernel, form, {}, glu.NUM_WARPS, True
        yield glu.glu_backward_kernel, form | dict(NEED_GATE=True, NEED_UP=True), {}, glu.NUM_WARPS, True


def cross_entropy_builds() -> Iterator[Build]:
    types = dict.fromkeys(("p_losses", "p_lse", "p_dloss", "p_divisor"), "*fp32") | {"p_labels": "*i64"}
    for softcap in (False, True):
        form = dict(HAS_SOFTCAP=softcap, BLOCK_COLUMNS=cross_entropy.BLOCK_COLUMNS)
        warps = num_warps_for(cross_entropy.BLOCK_COLUMNS)
        forward = form | dict(HAS_SMOOTHING=softcap)
        yield cross_entropy.cross_entropy_forward_kernel, forward, types, warps, False
        yield cross_entropy.cross_entropy_backward_kernel, form, types, warps, False
        forward = forward | dict(BLOCK_COLUMNS=linear_cross_entropy.BLOCK_COLUMNS, WITH_GRADIENT=True)
        warps = num_warps_for(linear_cross_entropy.BLOCK_COLUMNS)
        yield linear_cross_entropy.linear_cross_entropy_forward_kernel, forward, types, warps, False
    form = dict(BLOCK=linear_cross_entropy.SCALE_BLOCK)
    yield linear_cross_entropy.linear_cross_entropy_backward_kernel, form, types, 8, True


def attention_builds(arch: int, dtype: str) -> Iterator[Build]:
    types = dict.fromkeys(("p_intervals", "p_reads", "p_ranges"), "*i32")
    types |= dict.fromkeys(("p_lse", "p_delta", "p_dsinks"), "*fp32")
    for is_bool in (True, False):
        form = dict(IS_BOOL=is_bool, HAS_SINKS=False, SAFE=True, BLOCK_KEYS=masks.BLOCK_KEYS)
        kinds = types | ({"p_mask": "*u8"} if is_bool else {})
        yield masks.mask_intervals_kernel, form, kinds, masks.NUM_WARPS, False
    form = dict(KEYS=128, BLOCK_ROWS=masks.BLOCK_ROWS)
    yield masks.key_ranges_kernel, form, types, masks.NUM_WARPS, False
    if arch < 80:
        return
    causal = dict(CAUSAL=True, HAS_MASK=False, READS=False, IS_BOOL=False, HAS_SOFTCAP=False)
    capped = causal | dict(CAUSAL=False, HAS_MASK=True, HAS_SOFTCAP=True)
    for width in (64, 128, 256) if dtype != "float32" else (64,):
        block = dict(WIDTH=width, BLOCK_WIDTH=width, VALUE_WIDTH=width, BLOCK_VALUE=width)
        block |= dict(PRECISION="ieee" if dtype == "float32" else "tf32")
        delta = dict(HAS_SINKS=True, VALUE_WIDTH=width, BLOCK_VALUE=width, QUERIES=launches.DELTA_QUERIES)
        yield kernels.attention_delta_kernel, delta, types, 4, True
        plan = launches.plans_for(width, getattr(torch, dtype), divmod(arch, 10))[0]
        reading = launches.Plan(*[launches.READING[width]] * 3)
        forms = [(causal, plan)]
        if width == 128:
            forms += [(capped, plan), (capped | dict(READS=True), reading)]
        for form, tiles in forms:
            kinds = zip(
                (
                    kernels.attention_forward_kernel,
                    kernels.attention_backward_keys_kernel,
                    kernels.attention_backward_queries_kernel,
                ),
                tiles,
                strict=True,
            )
            for kernel, tile in kinds:
                sizes = form | block | dict(QUERIES=tile.queries, KEYS=tile.keys)
                if kernel is kernels.attention_forward_kernel:
                    sizes["HAS_SINKS"] = form["HAS_SOFTCAP"]
                yield kernel, sizes, types, (tile.warps, tile.stages), True


def compile_one(arch: int, dtype: str, build: Build) -> dict[str, Any]:
    kernel, constants, types, launch, fusion = build
    warps, stages = launch if isinstance(launch, tuple) else (launch, DEFAULT_STAGES)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = types.get(name, f"*{TYPES[dtype]}")
        else:
            signature[name] = "i32" if INTEGERS.match(name) else "fp32"
        if signature[name] not in ("constexpr", "fp32"):
            attributes[index,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {
        "kernel": kernel.__name__,
        "constants": constants,
        "arch": arch,
        "dtype": dtype,
        "warps": warps,
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "shared_bytes": compiled.metadata.shared,
    }


def main() -> None:
    arch, *dtypes = sys.argv[1:]
    for dtype in dtypes:
        builds = (
            *rms_norm_builds(),
            *glu_builds(),
            *cross_entropy_builds(),
            *attention_builds(int(arch), dtype),
        )
        for build in builds:
            print(json.dumps(compile_one(int(arch), dtype, build)), flush=True)


if __name__ == "__main__":
    main()
