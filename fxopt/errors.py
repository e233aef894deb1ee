"""Every exception fxopt raises, and what of another's text is told.

User mistakes are `FxoptError`s; "does not apply" is never an exception but a `Mismatch` in the report;
a broken invariant is a `VerifyError` naming the pass that left the graph invalid.
"""

from __future__ import annotations

import re

NO_SENTENCE = re.compile(
    r"$|File \"|from user code|user stack|traceback|while executing|hint:|explanation:|caused by:|developer debug",
    re.IGNORECASE,
)
"""How a line begins that is not part of the sentence before it."""


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


def first_sentence(text: str) -> str:
    """Return the first sentence of an error's text, over as many lines as it takes.

    >>> first_sentence("one of the variables\\nis gone: it was written to. Hint: do not\\n\\nWhile executing ...")
    'one of the variables is gone: it was written to. Hint: do not'
    """
    lines: list[str] = []
    for line in map(str.strip, text.strip().splitlines()):
        if lines and NO_SENTENCE.match(line):
            break
        lines.append(line)
        if line.endswith((".", "!", "?")):
            break
    return " ".join(lines)
