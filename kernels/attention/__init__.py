"""Attention: softmax(q k^T scale + mask) v, with grouped heads, softcap and sinks, and its gradients.

    logits = softcap tanh(q k^T scale / softcap), or q k^T scale without a softcap; plus the mask
    out    = exp(logits - lse) v,  lse = log(sum(exp(logits)) + exp(sink))

Sources: Vaswani et al. 2017, "Attention Is All You Need"; Dao 2023, "FlashAttention-2"; transformers
`sdpa_attention_forward`, `eager_attention_forward` of llama, gemma2 (softcap) and gpt_oss (sinks).

Saved for backward: q, k, v, out, the mask (live anyway) and its intervals (int32 [3, rows of the mask]), and lse,
fp32 [B, Hq, Sq]. No [Sq, Sk] matrix is saved anywhere; eager saves two to five per head.

Numerics: logits and softmax in fp32, weights rounded to the model's dtype before they meet the values, sums in
fp32; eager rounds the logits as well. Deterministic.

On a GPU one of several backends runs, chosen by measurement: `chosen_backends()` says which and what each took.
"""

from fxopt.kernels.attention.choice import chosen_backends, find_server
from fxopt.kernels.attention.masks import additive_mask, clear_empty_rows, mask_intervals
from fxopt.kernels.attention.op import attention
from fxopt.kernels.attention.reference import attention_reference

__all__ = [
    "additive_mask",
    "attention",
    "attention_reference",
    "chosen_backends",
    "clear_empty_rows",
    "find_server",
    "mask_intervals",
]
