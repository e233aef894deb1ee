"""fxopt: a compiler-style graph-rewriting optimizer for training Hugging Face models."""

from fxopt.errors import (
    FxoptError,
    ProofError,
    StaleLogitsError,
    UnknownNameError,
    UnmatchedError,
    VerifyError,
)
from fxopt.pipeline import ALL, explain, optimize, plan, restore
from fxopt.remat.records import Plan
from fxopt.report.records import Proof, Report, Site
from fxopt.rewriting.pattern import Match, Mismatch, Pattern

__all__ = [
    "ALL",
    "FxoptError",
    "Match",
    "Mismatch",
    "Pattern",
    "Plan",
    "Proof",
    "ProofError",
    "Report",
    "Site",
    "StaleLogitsError",
    "UnknownNameError",
    "UnmatchedError",
    "VerifyError",
    "explain",
    "optimize",
    "plan",
    "restore",
]
__version__ = "0.1.0"
