"""Cross entropy of h W^T + b against labels, without the logits in memory, and its gradients.

    z     = softcap * tanh(scale * (h W^T + b) / softcap)   scale * (h W^T + b) without a softcap
    loss  as in `row_loss`

`chunks` is the method and its memory, `kernels` what it launches, `op` the torch op.

Source: `torch.nn.functional.linear` and `cross_entropy` as transformers' `ForCausalLMLoss` joins them.
"""

from fxopt.kernels.linear_cross_entropy.op import linear_cross_entropy, linear_cross_entropy_reference

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]
