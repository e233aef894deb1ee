"""The routing of a mixture: each token's experts chosen by their scores, and the weights of the chosen ones.

    s = softmax(logits) or sigmoid(logits)      over all experts, or after the choice over the chosen logits
    ids = the K experts with the largest s + bias, of the best groups alone where there are groups
    w_k = scale * s_k / max(sum of s over the K chosen + eps, least)    or scale * s_k

A group's score is its largest s + bias, or the sum of its two largest. `bias` decides the choice alone: it is in no
weight and gets no gradient (DeepSeek-V3's balancing without a loss).

Source: Shazeer et al. 2017, "Outrageously Large Neural Networks"; DeepSeek-AI 2024, "DeepSeek-V3", section 2.1.2;
transformers `MixtralTopKRouter`, `Qwen2MoeTopKRouter`, `DeepseekV3TopkRouter`, `GptOssTopKRouter`.

Saved for backward: the logits and ids ([T, K]). Stock saves the scores of all experts, those chosen, their sum, and
what they are divided to.

Numerics: scores in fp32, rounded to the dtype that stock compares them in, so that those equal in stock are equal
here; of equal ones the first are chosen, as torch does on a GPU. Everything after the choice in fp32, rounded once. On
a CPU torch's own scores and `topk` choose.
"""

from fxopt.kernels.route.form import Form
from fxopt.kernels.route.op import route
from fxopt.kernels.route.reference import route_reference

__all__ = ["Form", "route", "route_reference"]
