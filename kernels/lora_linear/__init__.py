"""Linear layers of one input with low-rank adapters: y_j = x W_j^T + bias_j + sum of scale_i * (x_i A_i^T) B_i^T.

Source: LoRA (Hu et al., 2021). Several layers may share x (q, k and v; gate and up); an adapter belongs to one of
them and reads x, or an input of its own (x after dropout). A weight is dense, or four-bit codes that are decoded
within the op into memory that lives as long as one product.
Saved for backward: x and the adapters' own inputs, W or its codes, A and B; nothing of the products. x A^T is
computed again.
Numerics: products accumulate in fp32. Where that moves fewer bytes (`extended`), base and adapters are one product,

    y = [x | scale x A^T] [W | B]^T        dX = [dY | scale dY B] [W ; A]

rounded once; scale x A^T is rounded as x A^T alone would be. Elsewhere the base result is rounded, the adapter's
part is added to it in fp32 within the product with B and the sum is rounded once. Stock also rounds the part before
and after the factor.

The A of all adapters that read one tensor are joined: one product reads it for all. Of a wide gradient, both scale dY B
and dB come from one read (`one_read`), their sums in fp32 and in a fixed order. What reads the value and the gradients
of a gated unit between such layers comes from the kernel that computes these (`gated`), and in forward the value's
product with A from the unit's own kernel (`gated_forward`). Where adapters are wider than x, rows are widened a chunk
at a time, so no whole copy of an activation exists.
"""

from fxopt.kernels.lora_linear import gated, gated_forward
from fxopt.kernels.lora_linear.op import lora_linear
from fxopt.kernels.lora_linear.reference import lora_linear_reference

__all__ = ["gated", "gated_forward", "lora_linear", "lora_linear_reference"]
