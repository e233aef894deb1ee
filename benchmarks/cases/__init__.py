"""The kernels that are timed, one file per op."""

from benchmarks.cases import (
    activation,
    add_rms_norm,
    attention,
    cross_entropy,
    dequantize_4bit,
    experts,
    glu,
    layer_norm,
    linear_cross_entropy,
    lora_linear,
    norm_rope,
    rms_norm,
    rope,
    route,
)

ALL = {
    "rms_norm": rms_norm.make_cases,
    "add_rms_norm": add_rms_norm.make_cases,
    "layer_norm": layer_norm.make_cases,
    "rope": rope.make_cases,
    "norm_rope": norm_rope.make_cases,
    "glu": glu.make_cases,
    "experts": experts.make_cases,
    "route": route.make_cases,
    "activation": activation.make_cases,
    "attention": attention.make_cases,
    "dequantize_4bit": dequantize_4bit.make_cases,
    "lora_linear": lora_linear.make_cases,
    "cross_entropy": cross_entropy.make_cases,
    "linear_cross_entropy": linear_cross_entropy.make_cases,
}
