"""The pattern library; `ALL` is the ordered tuple of patterns: where two could match, the first does."""

from fxopt.patterns.activation import ACTIVATION
from fxopt.patterns.add_rms_norm import ADD_RMS_NORM
from fxopt.patterns.attention import ATTENTION
from fxopt.patterns.cross_entropy import CROSS_ENTROPY
from fxopt.patterns.dequantize_4bit import DEQUANTIZE_4BIT
from fxopt.patterns.experts import EXPERTS
from fxopt.patterns.experts_of_all import EXPERTS_OF_ALL
from fxopt.patterns.glu import GLU
from fxopt.patterns.join_lora_linear import JOIN_LORA_LINEAR
from fxopt.patterns.layer_norm import LAYER_NORM
from fxopt.patterns.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from fxopt.patterns.lora_linear import LORA_LINEAR
from fxopt.patterns.norm_rope import NORM_ROPE
from fxopt.patterns.rms_norm import RMS_NORM
from fxopt.patterns.rope import ROPE
from fxopt.patterns.route import ROUTE

ALL = (
    DEQUANTIZE_4BIT,
    LAYER_NORM,
    RMS_NORM,  # before the layers that read its result: the cast that ends a norm is the norm's
    LORA_LINEAR,  # before the sums that end in a norm: a norm may read an adapted layer's own sum
    JOIN_LORA_LINEAR,
    ADD_RMS_NORM,
    ROPE,
    NORM_ROPE,
    ATTENTION,
    GLU,
    ROUTE,
    EXPERTS,  # reads the unit that stands between its products
    EXPERTS_OF_ALL,
    ACTIVATION,
    LINEAR_CROSS_ENTROPY,
    CROSS_ENTROPY,
)

__all__ = [
    "ACTIVATION",
    "ADD_RMS_NORM",
    "ALL",
    "ATTENTION",
    "CROSS_ENTROPY",
    "DEQUANTIZE_4BIT",
    "EXPERTS",
    "EXPERTS_OF_ALL",
    "GLU",
    "JOIN_LORA_LINEAR",
    "LAYER_NORM",
    "LINEAR_CROSS_ENTROPY",
    "LORA_LINEAR",
    "NORM_ROPE",
    "RMS_NORM",
    "ROPE",
    "ROUTE",
]
