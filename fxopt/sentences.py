"""What of another's error text is told: its first sentence, which may take several lines."""

from __future__ import annotations

import re

from fxopt.errors import FxoptError, VerifyError

LONGEST = 400
"""So many characters of a sentence are told at most: the longest of torch's own take about 300."""
GOES_ON = re.compile(r"(?!from user code|user stack|user code|while executing|caused by:)[a-z'\"`]")
"""How a line begins that goes on with the sentence before it: in lower case or with a quote, and no heading."""
END = re.compile(r"(?<!\.)(?<!\.[a-z])[.!?](?=\s|$)")
"""Where a sentence ends: not at three dots, nor in "e.g. this"."""


def first_sentence(text: str) -> str:
    """Return the first sentence of an error's text, over as many lines as it takes.

    >>> first_sentence("one of the variables\\nis gone: it was written to. Hint: do not\\n\\nWhile executing ...")
    'one of the variables is gone: it was written to.'
    >>> first_sentence("no such thing\\n  File 'model.py', line 3")
    'no such thing'
    """
    first, *others = map(str.strip, text.strip().splitlines() or [""])
    told = first
    for line in others:
        if END.search(told) or not GOES_ON.match(line):
            break
        told = f"{told} {line}"
    end = END.search(told)
    if end is not None:
        told = told[: end.end()]
    return told if len(told) <= LONGEST else f"{told[: LONGEST - 1].rstrip()}…"


def sentence_of(error: BaseException) -> str:
    """Return what an error says in one sentence; of fxopt's own the first line, which is made for that."""
    if isinstance(error, FxoptError | VerifyError):
        return str(error).partition("\n")[0]
    return first_sentence(str(error))
