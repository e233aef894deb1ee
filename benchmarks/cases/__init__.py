"""The kernels that are timed, one file per op."""

from benchmarks.cases import attention, cross_entropy, glu, linear_cross_entropy, rms_norm

ALL = {
    "rms_norm": rms_norm.make_cases,
    "glu": glu.make_cases,
    "attention": attention.make_cases,
    "cross_entropy": cross_entropy.make_cases,
    "linear_cross_entropy": linear_cross_entropy.make_cases,
}
