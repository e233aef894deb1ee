"""Why something could not be captured, in plain words and with the line of the model's source."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from typing import Any

from torch import fx

from fxopt.capture import torch_dynamo, torch_errors
from fxopt.graph.view import FRAME, location_in, own_location_in
from fxopt.sentences import first_sentence

PLAIN_WORDS = (
    (
        r"data.dependent|Tensor\.item|GuardOnDataDependent|generic_jump",
        "what is computed depends on the values of a tensor",
    ),
    (
        r"op returned non-Tensor[\s\S]*call_block",
        "a block returns something else than a tensor or a tuple of tensors",
    ),
    (
        r"Missing `as_proxy\(\)`[\s\S]*UserDefinedObjectVariable\((\w+)\)",
        r"a block is given an object that no graph can hold, as a key/value cache is (use_cache=False): a \1",
    ),
    (
        r"Missing `as_proxy\(\)`",
        "a block is given an object that no graph can hold, as a key/value cache is (use_cache=False)",
    ),
    (
        r"Skip calling [\s\S]*Behind\._call_backbone",
        "the backbone is called in a try or with statement, behind which Dynamo cannot go on",
    ),
    (r"recompile.limit", "the calls took too many forms, each of which needs a capture of its own"),
    (
        r"when making fake tensor call",
        "what is called fails on tensors without values, with which it is captured",
    ),
)
"""Torch's words for what a user would say otherwise: theirs follow, so that they can be looked up."""
ADVICE = re.compile(r"\s*Consider annotating your code using torch\._check\*\(\)\.")
"""What Dynamo puts before what it has to say."""
FAILED_CALL = re.compile(
    r"Dynamo failed to run FX node with fake tensors: .*?: got (\w+)\((['\"])(.*?)\2,?\)", re.DOTALL
)
"""An op's error in Dynamo's words: after the op and its arguments, sizes and all, as Python writes the error."""
NOISE = re.compile(r" at 0x[0-9a-f]+| \(unhinted: [^\n]*?\)(?=\.|$)")
"""Addresses, and an expression told a second time."""
RESUMED = re.compile(r"torch_dynamo_resume_in_(.+)_at_(\d+)")
"""How Dynamo names what it makes of the rest of a function behind a break."""
SYMBOL = re.compile(r"\b(zuf|zf|u)\d+\b")
"""How torch writes a value that it does not know: with a number that differs from capture to capture."""

MISTAKES = (AssertionError, ArithmeticError, AttributeError, LookupError, TypeError)
"""What fxopt never raises on purpose where it works on a graph."""


def reason_of(error: BaseException, raised_in: Iterable[tuple[str, int]] = ()) -> str:
    """Return what a Dynamo error says, and the innermost line of the model's source.

    `raised_in` are frames below those Dynamo knows of: it ends where fxopt runs a block on stand-ins.
    """
    if torch_errors.is_of_backend(error):
        text = _name(error)
    else:
        text = str(torch_errors.telling(error)) or type(error).__name__
    return _say(text, location_in([*frames_told(error), *raised_in]))


def reason_of_failure(error: BaseException) -> str:
    """Return what an error says that was raised where a graph is compiled."""
    return _say(_name(error), "")


def _name(error: BaseException) -> str:
    cause = torch_errors.root_cause(error)
    own = own_location_in(frames_of(cause)) if isinstance(cause, MISTAKES) else ""
    return (f"fxopt itself failed, at {own}: " if own else "") + f"{type(cause).__name__}: {cause}"


def reason_of_break(gm: fx.GraphModule) -> str:
    """Return why `gm` ends before its region does, and the innermost line of the model's source, or ""."""
    found = torch_dynamo.find_break(gm)
    if found is None:
        return ""
    reason, stack = found
    return _say(reason, location_in(_frames(stack)))


def reason_of_frame(frame: Any) -> str:
    """Return which function Dynamo passed over and why, from what `torch_dynamo.frames_passed_over` tells of it."""
    where = location_in([(frame.fail_user_frame_filename or "", frame.fail_user_frame_lineno or 0)])
    reason = _say(frame.fail_reason or frame.fail_type, where)
    if frame.co_name is None:
        return reason
    resumed = RESUMED.fullmatch(frame.co_name)
    name, line = (resumed[1], int(resumed[2])) if resumed else (frame.co_name, frame.co_firstlineno)
    begin = location_in([(frame.co_filename, line)])
    return f"{name}{f' from {begin} on' if begin else ''}: {reason}"


def _frames(lines: Iterable[str]) -> list[tuple[str, int]]:
    return [(found[1], int(found[2])) for line in lines if (found := FRAME.match(line.strip()))]


def frames_told(error: BaseException) -> list[tuple[str, int]]:
    """Return the files and lines of the model's stack that a Dynamo error tells."""
    return _frames(str(error).splitlines())


def frames_of(error: BaseException) -> list[tuple[str, int]]:
    """Return the files and lines that `error` has come through so far."""
    return [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]


def _say(text: str, location: str) -> str:
    """Return the first sentence of `text` and its explanation, after plain words where there are some."""
    found = ((re.search(pattern, text, re.IGNORECASE), words) for pattern, words in PLAIN_WORDS)
    plain = next((match.expand(words) for match, words in found if match is not None), "")
    text = FAILED_CALL.sub(_error_of, ADVICE.sub("", text, count=1))
    parts = (plain, *(_tidy(first_sentence(part)) for part in (text, text.partition("Explanation:")[2])))
    return "; ".join((*filter(None, parts), *([f"at {location}"] if location else [])))


def _error_of(found: re.Match[str]) -> str:
    told = found[3].replace(r"\n", "\n").replace(r"\'", "'").replace(r"\"", '"')
    return f"{found[1]}: {told}"


def _tidy(sentence: str) -> str:
    """Return `sentence` as a clause that others follow: the same text for all captures that fail alike."""
    return SYMBOL.sub("value", NOISE.sub("", sentence)).removesuffix(".")
