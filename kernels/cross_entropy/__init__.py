"""Cross entropy of logits [N, V] against labels [N], and its gradient.

The formula, the divisor and what happens to odd labels stand in `row_loss`, which this op applies to given logits.

Source: `torch.nn.functional.cross_entropy`; transformers `ForCausalLMLoss` (denominator), `Gemma2ForCausalLM`
(softcap), `CohereForCausalLM` (scale).

Saved for backward: logits, labels, lse fp32 [2, N] as max z and lse - max z (0 in rows that are not read), divisor
fp32 []. Backward writes the gradient to a new tensor, since logits may be an output of the model.

Numerics: fp32, the loss too; the gradient is rounded once. Ignored rows are not read (but for `z_rows="all"`), and
their gradient is 0 whatever they hold. No host synchronization.
"""

from fxopt.kernels.cross_entropy.op import cross_entropy
from fxopt.kernels.cross_entropy.reference import cross_entropy_reference

__all__ = ["cross_entropy", "cross_entropy_reference"]
