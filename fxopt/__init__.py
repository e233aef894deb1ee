"""fxopt: a compiler-style graph-rewriting optimizer for training Hugging Face models."""

from fxopt.bisection import Culprits, bisect
from fxopt.errors import (
    FxoptError,
    ProofError,
    StaleLogitsError,
    UnknownNameError,
    UnmatchedError,
    VerifyError,
)
from fxopt.pipeline import ALL, explain, optimize, restore, trace
from fxopt.report.records import Proof, Report, Site
from fxopt.rewriting.authoring import pattern
from fxopt.rewriting.pattern import Match, Mismatch, Pattern

__all__ = [
    "ALL",
    "Culprits",
    "FxoptError",
    "Match",
    "Mismatch",
    "Pattern",
    "Proof",
    "ProofError",
    "Report",
    "Site",
    "StaleLogitsError",
    "UnknownNameError",
    "UnmatchedError",
    "VerifyError",
    "bisect",
    "explain",
    "optimize",
    "pattern",
    "restore",
    "trace",
]
__version__ = "0.1.0"
