"""Layer normalization of the last dimension, and its gradients.

With x in fp32 (fp64 stays fp64):

    n = (x - mean(x)) * rsqrt(mean((x - mean(x))^2) + eps)
    y = round (n * weight + bias) to out_dtype          default: the dtype of x

Source: Ba, Kiros and Hinton 2016, "Layer Normalization"; `torch.nn.functional.layer_norm`. The mean-centred
norm of Cohere, without a bias and with roundings of its own, is an attribute of rms_norm.

Saved for backward: x, weight, and `statistics`, fp32 [2, rows]: the reciprocal roots, then the means.

Numerics: all arithmetic in fp32, one rounding at the end. The gradients of weight and bias are summed in fp32,
per program and then over programs, in a fixed order.
"""

from fxopt.kernels.layer_norm.launches import launch_backward, launch_forward
from fxopt.kernels.layer_norm.op import layer_norm
from fxopt.kernels.layer_norm.reference import layer_norm_reference

__all__ = ["launch_backward", "launch_forward", "layer_norm", "layer_norm_reference"]
