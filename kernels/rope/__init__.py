"""Rotary position embedding of one or two tensors of heads: pairs of items turned by an angle per token.

    y1 = x1 cos1 - x2 sin1        x1, x2: the two items of a pair; a table holds a cosine and a sine for each
    y2 = x2 cos2 + x1 sin2        item of the output, or one of each per pair (then cos1 = cos2, sin1 = sin2)

A pair is (x[i], x[i + R/2]) or, interleaved, (x[2i], x[2i + 1]), in the R rotated items of a head; these are
its first or its last ones, and the others are passed on. Nothing is assumed about the tables: their two
halves may differ.

Source: Su et al. 2021, "RoFormer"; transformers `LlamaAttention`, `CohereAttention`, `Glm4Attention`,
`GptOssAttention`, `DeepseekV3Attention` and their `apply_rotary_pos_emb`.

Saved for backward: cos and sin, nothing of q and k: backward turns the gradients by the transposed matrix.

Numerics: products and their sum in fp32 (fp64 for fp64), rounded once; stock models in bf16 round three times.
"""

from fxopt.kernels.rope.launches import launch_backward, launch_forward
from fxopt.kernels.rope.op import rope
from fxopt.kernels.rope.reference import rope_reference

__all__ = ["launch_backward", "launch_forward", "rope", "rope_reference"]
