"""Gated linear unit: an activation of one projection times another, and its gradients.

    g = min(gate_scale * gate, gate_limit)          u = clamp(up, -up_limit, up_limit) + up_offset
    y = scale * act(g) * u                          act: see `activations`

`layout` says where the two are: "split" in two tensors, "packed" in the halves of one, "interleaved" in the
even and odd columns of one; `gate_first` which of the two is the gate. One tensor in, one gradient out: halves
are neither copied nor joined.

Source: Shazeer 2020, "GLU Variants Improve Transformer"; transformers `LlamaMLP`, `Phi3MLP`, `GptOssExperts`.

Saved for backward: gate and up, or the one tensor that holds both. Backward recomputes the activation, and
writes its gradients to new tensors, or over what nobody reads afterwards (`in_place`).

Numerics: all in fp32, rounded once at the end; stock models round act(gate) to their dtype before the product.
NaN passes through clamps, and no gradient does where one cut something off, as in torch; where a
value equals its limit, it depends on the version of torch whether one does.
"""

from fxopt.kernels.glu.form import LAYOUTS, Form
from fxopt.kernels.glu.launches import launch_backward, launch_forward
from fxopt.kernels.glu.op import glu
from fxopt.kernels.glu.reference import glu_reference

__all__ = ["LAYOUTS", "Form", "glu", "glu_reference", "launch_backward", "launch_forward"]
