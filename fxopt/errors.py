"""Every exception fxopt raises.

User mistakes are `FxoptError`s; "does not apply" is never an exception but a `Mismatch` in the report;
a broken invariant is a `VerifyError` naming the pass that left the graph invalid.
"""

from __future__ import annotations


class FxoptError(ValueError):
    """A mistake in what the user gave: subject, what is wrong, expected and got, and the cure."""


class UnknownNameError(FxoptError):
    """A pattern, lowering or option name that does not exist; the text lists the valid ones, nearest first."""


class ProofError(FxoptError):
    """With `strict=True`: a rewrite whose numeric proof failed."""


class UnmatchedError(FxoptError):
    """With `strict=True`: a known anchor that no pattern took."""


class StaleLogitsError(FxoptError):
    """Lazy logits read after the head's weight changed or moved."""


class RanksDifferError(FxoptError):
    """Ranks that train one model together were given different options, or one of them was not optimized."""


class VerifyError(RuntimeError):
    """An invariant of the graph that a pass broke; the text names the pass."""


class TurnsError(RuntimeError):
    """A loop that was captured for one turn and cannot stand for all; its block is captured in pieces around it."""
