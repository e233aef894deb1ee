"""Fused ops and their kernels: one file per op; import them as `fxopt.kernels.<name>`."""
