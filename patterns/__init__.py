"""The pattern library; `ALL` is the ordered tuple of patterns: where two could match, the first does."""

from fxopt.patterns.attention import ATTENTION
from fxopt.patterns.cross_entropy import CROSS_ENTROPY
from fxopt.patterns.glu import GLU
from fxopt.patterns.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from fxopt.patterns.rms_norm import RMS_NORM

ALL = (RMS_NORM, GLU, ATTENTION, LINEAR_CROSS_ENTROPY, CROSS_ENTROPY)

__all__ = ["ALL", "ATTENTION", "CROSS_ENTROPY", "GLU", "LINEAR_CROSS_ENTROPY", "RMS_NORM"]
