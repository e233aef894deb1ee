"""The experts of a mixture: of each token's chosen experts a gated unit between two products, summed by weight.

    a_s = x_t W1_e + b1_e            e the expert of choice s, t = s // K its token, K choices a token
    y_t = sum over its K choices of  weight_s * (glu(a_s) W2_e + b2_e)

Choices are sorted by expert on the device, so that each expert's rows are one group and each product one grouped
product. An id that names no expert (it is as large as their number, or larger) adds nothing. `glu` is the unit of
`fxopt.kernels.glu`, gate and up in the halves or in every other column of a_s.

Source: Shazeer et al. 2017, "Outrageously Large Neural Networks"; transformers `MixtralExperts`, `GptOssExperts`,
`integrations/moe.py`.

Saved for backward: x, a ([S, 2 I], S = T K), the weights, and three vectors of S integers. Stock saves besides the
rows of x in order, the activated gate, the unit, the result of the second product, and the latter again in order.
Backward recomputes the unit; the gradient of a choice's weight is that of its unit's row with the unit
itself, <dy_t W2_e^T, glu(a_s)>, so no result of the second product is needed.

Numerics: products in the weights' dtype with sums in fp32, a rounded to it, the unit in fp32 and rounded to it; the
sum over a token's choices in fp32, rounded once to the result's dtype. Every sum has a fixed order: gradients of
the weights are the same in each run.

Grouped products run by torch's `grouped_mm` in bfloat16 on devices of compute capability 9 and 10, where it has
a kernel of its own that reads the groups' ends on the device, else by the Triton kernel here, which gathers rows
of x itself and adds the bias. Nothing waits for the device.
"""

from fxopt.kernels.experts.op import experts
from fxopt.kernels.experts.order import Order, order_of
from fxopt.kernels.experts.reference import experts_reference

__all__ = ["Order", "experts", "experts_reference", "order_of"]
