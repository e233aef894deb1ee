"""RMSNorm of the heads of queries and keys and their rotary embedding, in one pass each way.

    n = rms_norm(x, weight)       over each head, or over all heads of a token; see `kernels/rms_norm`
    y = rope(n, cos, sin)         see `kernels/rope`

Source: transformers `Qwen3Attention`, `Gemma3Attention` (per head), `Olmo2Attention` (over all heads).

Saved for backward: q, k, the weights, cos and sin. The reciprocal roots are computed again: backward reads q and k
anyway, so that costs a sum in registers, while saving them costs one fp32 number per head and token, 1.6 % of a head
of 128 in bf16.

Numerics: rounded where the two ops alone round: the normalized value where `cast_first`, n to `norm_dtype`, y to
`out_dtype`. Backward treats these as the identity and rounds once; the two ops alone round between them. Gradients of
weights are summed in fp32, per program and then over programs, in a fixed order.
"""

from fxopt.kernels.norm_rope.launches import launch_backward, launch_forward
from fxopt.kernels.norm_rope.op import fits, norm_rope
from fxopt.kernels.norm_rope.reference import Form, norm_rope_reference

__all__ = ["Form", "fits", "launch_backward", "launch_forward", "norm_rope", "norm_rope_reference"]
