"""fxopt: a compiler-style graph-rewriting optimizer for training Hugging Face models."""

from typing import TYPE_CHECKING, Any

from fxopt.bisection import Culprits, bisect
from fxopt.errors import (
    FxoptError,
    ProofError,
    RanksDifferError,
    StaleLogitsError,
    UnknownNameError,
    UnmatchedError,
    VerifyError,
)
from fxopt.explaining import explain, trace
from fxopt.pipeline import ALL, optimize
from fxopt.report.plan import Plan
from fxopt.report.records import Proof, Report, Site
from fxopt.restoring import restore
from fxopt.rewriting.authoring import pattern
from fxopt.rewriting.pattern import Match, Mismatch, Pattern
from fxopt.surveying import plan

if TYPE_CHECKING:
    from fxopt.capture.callback import TrainerCallback

__all__ = [
    "ALL",
    "Culprits",
    "FxoptError",
    "Match",
    "Mismatch",
    "Pattern",
    "Plan",
    "Proof",
    "ProofError",
    "RanksDifferError",
    "Report",
    "Site",
    "StaleLogitsError",
    "TrainerCallback",
    "UnknownNameError",
    "UnmatchedError",
    "VerifyError",
    "bisect",
    "explain",
    "optimize",
    "pattern",
    "plan",
    "restore",
    "trace",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `TrainerCallback`, and transformers' trainer with it, when it is first asked for."""
    if name == "TrainerCallback":
        from fxopt.capture.callback import TrainerCallback

        return TrainerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
