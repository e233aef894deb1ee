"""RMSNorm of the last dimension in every spelling that Hugging Face models use, and its gradients.

With x in fp32 (fp64 stays fp64), per group of H / groups columns, written in the order of the model:

    x  = x * act(gate)                        gate_before
    x  = x - mean(x)                          centre
    n  = x * rsqrt(mean(x^2) + eps)
    n  = round n to the dtype of x            cast_first, as in Llama; not, as in Gemma
    y  = n * (offset + weight)
    y  = y * act(gate)                        a gate that is not gate_before
    y  = round y to out_dtype                 default: the promotion of the dtypes of x and weight

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; transformers `LlamaRMSNorm`,
`GemmaRMSNorm`, `CohereLayerNorm`, `MambaRMSNormGated`, `Qwen3NextRMSNormGated`.

Saved for backward: x, weight, gate, and `statistics`, fp32 [1, rows * groups]: the reciprocal roots; [2, ...]
when centred: the means after them.

Numerics: all arithmetic in fp32; the only roundings are the two above. Backward treats roundings as the
identity. The gradient of weight is summed in fp32, per program and then over programs, in a fixed order.

The backward op takes an optional `dskip`, of the shape of x: a gradient that reaches x beside the norm. It is
added to that of x in fp32, before the rounding. The kernels also add a skip in front; see `add_rms_norm.py`.
"""

from fxopt.kernels.rms_norm.launches import launch_backward, launch_forward
from fxopt.kernels.rms_norm.op import rms_norm
from fxopt.kernels.rms_norm.reference import rms_norm_reference

__all__ = ["launch_backward", "launch_forward", "rms_norm", "rms_norm_reference"]
