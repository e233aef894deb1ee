"""Compile kernels without a GPU: `python compile_kernels.py ARCH DTYPE...` prints one JSON line per kernel.

A program of its own, since it needs Triton without the interpreter.
"""

from __future__ import annotations

import dataclasses
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

from fxopt.kernels import activation, dequantize_4bit
from fxopt.kernels.activations import ACTIVATIONS
from fxopt.kernels.attention import backward as attention_backward
from fxopt.kernels.attention import backward_queries, launches, masks, plans
from fxopt.kernels.attention import forward as attention_forward
from fxopt.kernels.cross_entropy import kernels as cross_entropy
from fxopt.kernels.experts import launches as experts
from fxopt.kernels.glu import launches as glu
from fxopt.kernels.glu.form import Form, passes_at_limit
from fxopt.kernels.launch import MOST_WARPS, num_warps_for
from fxopt.kernels.layer_norm import launches as layer_norm
from fxopt.kernels.linear_cross_entropy import kernels
from fxopt.kernels.lora_linear import dropped, extend, gated_products, gated_rows, joined, one_read
from fxopt.kernels.norm_rope import launches as norm_rope
from fxopt.kernels.rms_norm import launches as rms_norm
from fxopt.kernels.rope import launches as rope
from fxopt.kernels.route import Form as Routing
from fxopt.kernels.route import kernels as route
from fxopt.kernels.route import op as route_op

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INTEGERS = re.compile(
    r".*_stride$|^num_.*|^tail_.*|^rank$|.*_rank$|^blocks_per_row$|^group_size$|^ignore_index$|^queries_per_row$"
)
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
WIDTHS = (128, 2048, 3584, 4096, 8192, 16384, 18944)
ODD_WIDTH = 1001
DEFAULT_STAGES = 3

Build = tuple[Any, dict[str, Any], dict[str, str], int | tuple[int, int], bool]
"""Kernel, constants, types of pointers not of the model's dtype, warps (and stages), floating-point fusion."""


def rms_norm_builds() -> Iterator[Build]:
    fp32 = {"p_statistics": "*fp32", "p_partial": "*fp32"}
    plain = dict(GROUPS=1, HAS_SKIP=False, HAS_WEIGHT=True, GATE="", GATE_BEFORE=False, CENTRE=False)
    forms = [(width, plain | dict(HAS_SKIP=skip)) for width in (*WIDTHS, ODD_WIDTH) for skip in (False, True)]
    forms += [(4096, plain | dict(CENTRE=True)), (4096, plain | dict(HAS_WEIGHT=False))]
    forms += [(2048, plain | dict(HAS_SKIP=skip)) for skip in (False, True)]
    forms += [
        (width, plain | dict(GATE="silu", GATE_BEFORE=before))
        for width in (ODD_WIDTH, 2048, 4096)
        for before in (True, False)
    ]
    forms += [(4096, plain | dict(GATE="sigmoid", GATE_BEFORE=True, CENTRE=True))]
    for width, form in forms:
        rows, columns = rms_norm.tile_of(width, rms_norm.TILE_ELEMENTS)
        form = form | dict(WIDTH=width, BLOCK_ROWS=rows, BLOCK_COLUMNS=columns)
        gated = form["GATE"] != ""
        keep = columns <= rms_norm.MOST_KEPT_COLUMNS
        backward = form | dict(NEED_X=True, NEED_WEIGHT=form["HAS_WEIGHT"], NEED_GATE=gated, KEEP_WEIGHT=keep)
        has_skip = backward.pop("HAS_SKIP")
        backward |= dict(HAS_DH=has_skip, NEED_SKIP=has_skip and width == ODD_WIDTH)
        reads_one = not gated and not has_skip
        per_thread = rms_norm.FORWARD_ELEMENTS if reads_one else rms_norm.FORWARD_ELEMENTS_BESIDE
        early = not reads_one or columns <= rms_norm.MOST_EARLY_COLUMNS
        forward = form | dict(CAST_FIRST=True, EARLY=early)
        most = rms_norm.MOST_FORWARD_WARPS if reads_one else MOST_WARPS
        forward_warps = num_warps_for(rows * columns, per_thread, most)
        yield rms_norm.rms_norm_forward_kernel, forward, fp32, forward_warps, True
        for rows, _, warps, most_stages in rms_norm.backward_tiles_of(width, gated=gated):
            for stages in (1, most_stages):
                kernel, stage = rms_norm.rms_norm_backward_kernel, dict(BLOCK_ROWS=rows, STAGES=stages)
                yield kernel, backward | stage, fp32, warps, True
    sums = dict(BLOCK_ROWS=rms_norm.SUM_ROWS, BLOCK_COLUMNS=rms_norm.SUM_COLUMNS)
    yield rms_norm.rms_norm_sum_kernel, sums, fp32, 4, True


def layer_norm_builds(dtype: str) -> Iterator[Build]:
    fp32 = {"p_statistics": "*fp32", "p_partial": "*fp32"}
    for width in (*WIDTHS, ODD_WIDTH):
        rows, columns = rms_norm.tile_of(width, rms_norm.TILE_ELEMENTS)
        form = dict(HAS_WEIGHT=True, WIDTH=width, BLOCK_ROWS=rows, BLOCK_COLUMNS=columns)
        forward_warps = num_warps_for(rows * columns, rms_norm.FORWARD_ELEMENTS, rms_norm.MOST_FORWARD_WARPS)
        for biased in (True, False):
            forward = form | dict(HAS_BIAS=biased, EARLY=columns <= rms_norm.MOST_EARLY_COLUMNS)
            yield layer_norm.layer_norm_forward_kernel, forward, fp32, forward_warps, True
        rows, columns, warps, most_stages = layer_norm.backward_tile_of(width)
        form |= dict(BLOCK_ROWS=rows)
        keep = columns <= layer_norm.MOST_KEPT_COLUMNS
        for trainable in (True, False):
            needs = dict(NEED_X=True, NEED_WEIGHT=trainable, NEED_BIAS=trainable)
            if trainable and not keep and columns >= width and dtype != "float32":
                pieces = dict(HAS_WEIGHT=True, WIDTH=width, BLOCK_COLUMNS=columns) | needs
                pieces |= dict(PIECES=layer_norm.LONG_PIECES)
                yield layer_norm.layer_norm_long_backward_kernel, pieces, fp32, layer_norm.LONG_WARPS, False
                continue
            backward = form | needs | dict(KEEP_WEIGHT=keep, RELOAD=not keep and trainable)
            for stages in (1, most_stages):
                kernel = layer_norm.layer_norm_backward_kernel
                yield kernel, backward | dict(STAGES=stages), fp32, warps, True
    sums = dict(BLOCK_ROWS=rms_norm.SUM_ROWS, BLOCK_COLUMNS=rms_norm.SUM_COLUMNS)
    yield layer_norm.layer_norm_sum_kernel, sums | dict(NEED_WEIGHT=True, NEED_BIAS=True), fp32, 4, True


def glu_builds() -> Iterator[Build]:
    forms = [Form(act) for act in ACTIVATIONS]
    limits = dict(alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0)
    forms += [Form("sigmoid_alpha", **limits, layout=layout) for layout in ("split", "interleaved")]
    forms += [Form(act, layout="interleaved", gate_first=False) for act in ("gelu", "gelu_tanh")]
    for form in forms:
        for block in (glu.BLOCKS[0], 512) if form.act == "sigmoid_alpha" else glu.BLOCKS[:1]:
            constants, warps = form.constants() | dict(BLOCK=block), glu.num_warps_for_block(block)
            yield glu.glu_forward_kernel, constants, {}, warps, True
            for need_y in (False, True):
                backward = constants | dict(
                    NEED_GATE=True, NEED_UP=True, NEED_Y=need_y, PASSES_AT_LIMIT=passes_at_limit()
                )
                yield glu.glu_backward_kernel, backward, {}, warps, True


def experts_builds(arch: int, dtype: str) -> Iterator[Build]:
    types = dict.fromkeys(("p_rows", "p_places", "p_ends"), "*i32")
    kind = getattr(torch, dtype)
    stages = 1 if dtype == "float32" else DEFAULT_STAGES
    tile, warps = experts.tile_of(kind, arch // 10, gradient=False)
    for stride in ("w_inner_stride", "w_column_stride"):  # the weight as it is stored, and turned
        for has_bias in (False, True):
            form = tile | {"GATHER": has_bias, "HAS_BIAS": has_bias, "GROUP": experts.BAND, stride: 1}
            form |= dict(BLOCK_EXPERTS=256)
            yield experts.experts_product_kernel, form, types, (warps, stages), True
    tile, warps = experts.tile_of(kind, arch // 10, gradient=True)
    for stride in ("dw_inner_stride", "dw_column_stride"):
        for gather_x in (False, True):
            form = tile | {"GATHER_X": gather_x, "GATHER_D": not gather_x, stride: 1}
            yield experts.experts_weight_gradient_kernel, form, types, (warps, stages), True
    for weighed in (False, True):
        form = dict(GATHER=weighed, HAS_WEIGHTS=weighed)
        form |= dict(BLOCK_ROWS=experts.SUM_ROWS, BLOCK_COLUMNS=experts.SUM_COLUMNS)
        yield experts.experts_bias_gradient_kernel, form, types, experts.SUM_WARPS, True
        form = dict(HAS_WEIGHTS=weighed, HAS_BIAS=weighed, BLOCK_EXPERTS=256, BLOCK=experts.ROW_BLOCK)
        yield experts.experts_sum_kernel, form, types, experts.ROW_WARPS, True
    limits = dict(alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0)
    for unit in (Form("silu", layout="packed"), Form("sigmoid_alpha", **limits, layout="interleaved")):
        form = unit.constants() | dict(PASSES_AT_LIMIT=passes_at_limit(), BLOCK=experts.ROW_BLOCK)
        form |= dict.fromkeys(("NEED_A", "NEED_UNIT", "NEED_WEIGHTS"), True)
        yield experts.experts_unit_backward_kernel, form, types, experts.ROW_WARPS, True


def route_builds() -> Iterator[Build]:
    types = {"p_ids": "*i64", "p_bias": "*fp32"}
    grouped = dict(group_size=32, num_kept=4, group_choices=2, normalizes=True)
    for num_experts, form in (
        (8, Routing("softmax", 2, normalizes=True)),
        (128, Routing("softmax", 4, by_logits=True, scores_after=True)),
        (256, Routing("sigmoid", 8, **grouped)),
        (384, Routing("sqrt_softplus", 6, normalizes=True)),
        (512, Routing("softmax", 10, normalizes=True)),
    ):
        tile = route_op.tile_of(form, num_experts)
        warps = route_op.num_warps_of(tile["BLOCK_GROUPS"] * tile["BLOCK_MEMBERS"])
        both = dict(SCORE=form.score, SCORES_AFTER=form.scores_after, NUM_CHOICES=form.num_choices)
        both |= dict(NORMALIZES=form.normalizes)
        forward = both | tile | dict(BY_LOGITS=form.by_logits, NUM_KEPT=form.num_kept)
        forward |= dict(GROUP_CHOICES=form.group_choices, FILLS_ZERO=False)
        forward |= dict(SCORES_DTYPE="bfloat16", CHOICE_DTYPE="float32", HAS_BIAS=form.group_size > 0)
        yield route.route_forward_kernel, forward, types, warps, False
        experts = tile["BLOCK_GROUPS"] * tile["BLOCK_MEMBERS"]
        backward = both | dict(BLOCK_EXPERTS=experts, BLOCK_CHOICES=tile["BLOCK_CHOICES"])
        warps = route_op.num_warps_of(experts * tile["BLOCK_CHOICES"])
        yield route.route_backward_kernel, backward, types, warps, True


def activation_builds() -> Iterator[Build]:
    for act in ACTIVATIONS:
        form = dict(ACT=act, BLOCK=activation.BLOCK)
        yield activation.activation_forward_kernel, form, {}, activation.NUM_WARPS, True
        yield activation.activation_backward_kernel, form, {}, activation.NUM_WARPS, True


def cross_entropy_builds() -> Iterator[Build]:
    types = dict.fromkeys(("p_losses", "p_lse", "p_dloss", "p_divisor", "p_z_weight"), "*fp32")
    types["p_labels"] = "*i64"
    for everything in (False, True):
        form: dict[str, Any] = dict.fromkeys(("HAS_SOFTCAP", "HAS_Z", "READ_IGNORED"), everything)
        if not everything:
            form["p_z_weight"] = None
        block = dict(BLOCK_COLUMNS=cross_entropy.BLOCK_COLUMNS)
        warps = num_warps_for(cross_entropy.BLOCK_COLUMNS)
        forward = form | block | dict(HAS_SMOOTHING=everything)
        yield cross_entropy.cross_entropy_forward_kernel, forward, types, warps, False
        yield cross_entropy.cross_entropy_backward_kernel, form | block, types, warps, False
        forward = forward | dict(BLOCK_COLUMNS=kernels.BLOCK_COLUMNS, WITH_GRADIENT=True)
        warps = num_warps_for(kernels.BLOCK_COLUMNS, at_most=kernels.MOST_WARPS)
        yield kernels.linear_cross_entropy_forward_kernel, forward, types, warps, False
    yield kernels.linear_cross_entropy_backward_kernel, dict(BLOCK=kernels.SCALE_BLOCK), types, 8, True


def dequantize_4bit_builds() -> Iterator[Build]:
    fp32 = dict.fromkeys(("p_codebook", "p_nested", "p_offset", "p_table"), "*fp32")
    sizes = dict(NESTED_BLOCKSIZE=dequantize_4bit.NESTED_BLOCKSIZE, WORDS=dequantize_4bit.WORDS)
    for nested in (True, False):
        for in_words in (True, False):
            types = fp32 | {
                "p_packed": "*i32" if in_words else "*u8",
                "p_absmax": "*u8" if nested else "*fp32",
            }
            form = sizes | dict(BLOCKSIZE=64, HAS_NESTED=nested, IN_WORDS=in_words)
            for width, padding in ((0, 0), (3584, 48)):
                rows = dict(ROW_WORDS=width // 8, PADDING=padding, BLOCK_TAIL=64 if padding else 1)
                rows |= dict(TAIL_ROWS=dequantize_4bit.TAIL_ROWS)
                warps = dequantize_4bit.NUM_WARPS
                yield dequantize_4bit.dequantize_4bit_kernel, form | rows, types, warps, False


def lora_linear_builds(arch: int, dtype: str) -> Iterator[Build]:
    bits = dict.fromkeys(("p_kept", "p_packed"), "*u8")
    yield dropped.pack_bits_kernel, dict(BLOCK_BYTES=dropped.BLOCK_BYTES), bits, 4, False
    yield dropped.drop_items_kernel, dict(BLOCK=dropped.BLOCK), bits, dropped.NUM_WARPS, False
    for block in (64, joined.MOST_COLUMNS):
        yield joined.join_rows_kernel, dict(BLOCK=block), {}, joined.num_warps_of(block), False
    if dtype == "float32" or arch < 80:  # plain torch there
        return
    for rows in (64, 8192):
        for rank in (16, 48, 256):
            for copy in (True, False):
                tile = extend.tile_of(rows, rank)
                launch = tile.pop("num_warps"), tile.pop("num_stages")
                yield extend.extend_rows_kernel, tile | dict(COPY=copy), {}, launch, True
    types = dict.fromkeys(("p_outer", "p_sums", "p_parts"), "*fp32")
    for rank in (16, one_read.MOST_RANK):
        tile = dict(BLOCK_ROWS=one_read.BLOCK_ROWS, BLOCK_COLUMNS=one_read.BLOCK_COLUMNS, BLOCK_RANK=rank)
        yield one_read.narrow_products_kernel, tile, types, (one_read.NUM_WARPS, one_read.NUM_STAGES), True
    yield one_read.narrow_sum_kernel, dict(BLOCK=one_read.SUM_BLOCK), types, 4, True
    products = dict.fromkeys(
        (f"p_{matrix}_{part}" for matrix in ("unit", "gate", "up") for part in ("outer", "sums")), "*fp32"
    )
    for rank in (16, one_read.MOST_RANK):
        tile = gated_products.tile_of(divmod(arch, 10), rank)
        launch = tile.pop("num_warps"), tile.pop("num_stages")
        tile |= dict(BLOCK_ROWS=gated_products.BLOCK_ROWS, BLOCK_RANK=rank)
        for unit in (Form("silu"), Form("gelu_tanh"), Form("sigmoid_alpha", gate_limit=7.0, up_limit=7.0)):
            constants = unit.constants() | tile | dict(PASSES_AT_LIMIT=passes_at_limit())
            del constants["INTERLEAVED"], constants["GATE_FIRST"]
            yield gated_products.gated_products_kernel, constants, products, launch, True
    for rank in (16, 256):
        tile = gated_rows.tile_of(rank) | dict(BLOCK_WRITTEN=max(rank, 64))
        launch = tile.pop("num_warps"), tile.pop("num_stages")
        for unit in (Form("silu"), Form("gelu_tanh"), Form("sigmoid_alpha", gate_limit=7.0, up_limit=7.0)):
            constants = unit.constants() | tile
            del constants["INTERLEAVED"], constants["GATE_FIRST"]
            yield gated_rows.gated_rows_kernel, constants, {}, launch, True


def rope_builds() -> Iterator[Build]:
    half, interleaved = (
        dict(IN_PAIRS="half", OUT_PAIRS="half"),
        dict.fromkeys(("IN_PAIRS", "OUT_PAIRS"), "interleaved"),
    )
    forms = [
        (32, 128, 128, half, "half"),
        (40, 128, 128, half, "half"),
        (32, 128, 128, half, "single"),
        (32, 64, 16, half, "half"),
        (12, 256, 256, half, "half"),
        (32, 128, 128, interleaved, "interleaved"),
        (32, 128, 64, interleaved, "interleaved"),
        (32, 64, 64, dict(IN_PAIRS="interleaved", OUT_PAIRS="half"), "single"),
    ]
    for heads, size, length, pairs, table in forms:
        shape = rope.tile_of(heads, size, length, table)
        form = pairs | shape | dict(TABLE_PAIRS=table, HALF=length // 2, NUM_PASSED=size - length, START=0)
        for transposed in (False, True):
            if transposed:
                form = form | dict(IN_PAIRS=pairs["OUT_PAIRS"], OUT_PAIRS=pairs["IN_PAIRS"])
            yield (
                rope.rope_kernel,
                form | dict(TRANSPOSED=transposed, SIGN=-1 if transposed else 1),
                {},
                rope.NUM_WARPS,
                True,
            )


def norm_rope_builds() -> Iterator[Build]:
    fp32 = {"p_partial": "*fp32"}
    half = norm_rope.Form(1e-6, 0.0, True, True, torch.bfloat16, "half", "half", 0, 128, 1, [False, False])
    neighbours = dataclasses.replace(half, pairing="interleaved", out_pairing="interleaved")
    forms = [
        ([32, 8], 128, half, 128),
        ([32, 8], 128, half, 64),
        ([8, 4], 256, dataclasses.replace(half, length=256, cast_first=False), 256),
        ([8, 4], 256, dataclasses.replace(half, length=64), 64),
        ([5, 1], 128, neighbours, 128),
        ([32, 32], 128, dataclasses.replace(half, per_head=False), 128),
        ([40, 8], 128, dataclasses.replace(half, per_head=False), 128),
    ]
    for heads, size, form, items in forms:
        for elements in (norm_rope.FORWARD_ELEMENTS, norm_rope.BACKWARD_ELEMENTS):
            is_backward = elements == norm_rope.BACKWARD_ELEMENTS
            tile = norm_rope.tile_of(heads, size, form.length, form.per_head, items, elements)
            warps = tile.pop("num_warps")
            constants = norm_rope.constants_of(form, size, items) | tile | dict(HAS_WEIGHT=True)
            if is_backward:
                yield (
                    norm_rope.norm_rope_backward_kernel,
                    constants | dict(NEED_WEIGHT=True),
                    fp32,
                    warps,
                    True,
                )
            else:
                constants |= dict(CAST_FIRST=form.cast_first, ROUND=True)
                yield norm_rope.norm_rope_forward_kernel, constants, fp32, warps, True
    yield norm_rope.norm_rope_sum_kernel, dict(BLOCK_ROWS=64, BLOCK_COLUMNS=64), fp32, 8, True


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
        yield attention_backward.attention_delta_kernel, delta, types, 4, True
        plan = plans.plans_for(width, getattr(torch, dtype), divmod(arch, 10))[0]
        reading = plans.Plan(*[plans.READING[width]] * 3)
        forms = [(causal, plan)]
        if width == 128:
            forms += [(capped, plan), (capped | dict(READS=True), reading)]
        elif dtype == "float32":
            forms += [(capped, plan)]
        for form, tiles in forms:
            kinds = zip(
                (
                    attention_forward.attention_forward_kernel,
                    attention_backward.attention_backward_keys_kernel,
                    backward_queries.attention_backward_queries_kernel,
                ),
                tiles,
                strict=True,
            )
            for kernel, tile in kinds:
                sizes = form | block | dict(QUERIES=tile.queries, KEYS=tile.keys)
                if kernel is attention_forward.attention_forward_kernel:
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
        if signature[name] not in ("constexpr", "fp32") and not kernel.params[index].do_not_specialize:
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
            *layer_norm_builds(dtype),
            *glu_builds(),
            *experts_builds(int(arch), dtype),
            *route_builds(),
            *activation_builds(),
            *cross_entropy_builds(),
            *dequantize_4bit_builds(),
            *lora_linear_builds(int(arch), dtype),
            *rope_builds(),
            *norm_rope_builds(),
            *attention_builds(int(arch), dtype),
        )
        for build in builds:
            print(json.dumps(compile_one(int(arch), dtype, build)), flush=True)


if __name__ == "__main__":
    main()
