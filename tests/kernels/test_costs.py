"""What ops say of themselves to plans: products counted where they are computed, memory where it is held."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import flop_registry

from fxopt.kernels.launch import DECLARED

ROWS, K, N, RANK = 4096, 512, 1024, 16
BESIDE = 64
"""The columns that an adapter of that rank takes in longer rows."""
CODE_TENSORS = 4


def lora_arguments(coded: bool, **gradients: bool):
    """Return the arguments of the op on meta, where a GPU is planned for; of its backward with gradients named."""

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    weight = empty(N * K // 2, 1, dtype=torch.uint8) if coded else empty(N, K)
    codes = [empty(N * K // 64, dtype=torch.uint8), empty(256), empty(N * K // 64 // 256), empty()]
    lists = [empty(ROWS, K)], [weight], [None], [empty(RANK, K)], [empty(N, RANK)]
    coding = (codes, ["nf4:64"], [N]) if coded else ([None] * CODE_TENSORS, [""], [N])
    form = [0], [0], [1.0]
    if not gradients:
        return (*lists, *coding, *form, torch.bfloat16)
    needs = [gradients.get(name, False) for name in ("x", "weight", "bias", "a", "b")]
    return [empty(ROWS, N)], *lists, *coding, *form, needs


def counted(op, arguments):
    return flop_registry[op](*arguments, out_val=None)


def test_a_backward_op_counts_the_gradients_that_it_computes():
    op, base, factor = torch.ops.fxopt.lora_linear_backward, 2 * ROWS * K * N, 2 * ROWS * RANK
    assert counted(torch.ops.fxopt.lora_linear, lora_arguments(True)) == base + factor * (K + N)
    alone = counted(op, lora_arguments(True, a=True, b=True))
    assert alone == factor * (N + K + K + N), "dY B, x A^T, and the gradients of A and B"
    assert counted(op, lora_arguments(True, x=True)) == base + factor * (N + K)
    assert counted(op, lora_arguments(False, x=True, weight=True)) == 2 * base + factor * (N + K)


def test_memory_for_itself_is_that_of_longer_rows_and_decoded_weights():
    forward = DECLARED[torch.ops.fxopt.lora_linear.default]
    backward = DECLARED[torch.ops.fxopt.lora_linear_backward.default]
    longer = 2 * (K + BESIDE) * (ROWS + N)
    assert forward.workspace(*lora_arguments(True)) == longer
    assert backward.workspace(*lora_arguments(True, x=True)) == 2 * N * K, "sums move less: N = 2 K"
    assert backward.workspace(*lora_arguments(True, a=True, b=True)) == 0, "rows below one_read's threshold"


def test_bytes_moved_are_those_of_decoding_and_of_the_adapters():
    forward = DECLARED[torch.ops.fxopt.lora_linear.default]
    decoding = N * K * 2.5
    assert forward.moved(*lora_arguments(True)) == decoding + 2 * (ROWS * K + ROWS * (K + BESIDE))
    backward = DECLARED[torch.ops.fxopt.lora_linear_backward.default]
    assert backward.moved(*lora_arguments(True, a=True, b=True)) == 2 * ROWS * (N + K), "nothing is decoded"


def test_launches_are_those_of_each_form():
    forward = DECLARED[torch.ops.fxopt.lora_linear.default]
    backward = DECLARED[torch.ops.fxopt.lora_linear_backward.default]
    assert forward.launches(*lora_arguments(True)) == 3, "longer rows, a longer weight, their product"
    assert backward.launches(*lora_arguments(True, a=True, b=True)) == 4, "dY B, x A^T, and both gradients"
    assert backward.launches(*lora_arguments(True, x=True)) == 4, (
        "the weight decoded, dY W, dY B and its product with A"
    )
    assert backward.launches(*lora_arguments(False, x=True, weight=True)) == 4, (
        "no decoding, one more gradient"
    )


def test_the_head_holds_wide_sums_of_a_weights_gradient_where_there_are_many_chunks():
    op = DECLARED[torch.ops.fxopt.linear_cross_entropy.default]
    h, weight = (torch.empty(rows, 64, dtype=torch.bfloat16, device="meta") for rows in (1024, 512))
    chunk = 128 * 512 * 2

    def workspace(rows, need_weight):
        return op.workspace(h[:rows], weight, chunk, True, need_weight, False)

    beside = 128 * (512 + 2 * 64) * 2
    assert workspace(1024, False) == workspace(512, True) == beside
    assert workspace(1024, True) == beside + 512 * 64 * 4


def test_attention_holds_dq_in_fp32_and_where_heads_share_keys_dk_and_dv_of_each_head():
    op = torch.ops.fxopt.attention_backward.default

    def workspace(key_heads, keys, softcap=0.0):
        def empty(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="meta")

        q, out, dout = (empty(2, 8, 256, 64) for _ in range(3))
        k, v = (empty(2, key_heads, keys, 64) for _ in range(2))
        lse = empty(2, 8, 256, dtype=torch.float32)
        form = True, 0.125, softcap, True
        return DECLARED[op].workspace(
            q, k, v, None, None, None, None, *form, out, lse, dout, [True] * 3 + [False]
        )

    of_q = 4 * 2 * 8 * 256 * (64 + 1)
    assert workspace(8, 512) == of_q
    assert workspace(2, 512) == of_q + 2 * (2 * 8 * 512 * 64) * 2
    assert workspace(2, 512, softcap=30.0) == of_q
