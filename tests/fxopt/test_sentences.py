"""What is told of an error's text: one sentence, over as many lines as it takes and no more."""

from __future__ import annotations

import pytest

from fxopt.errors import FxoptError, VerifyError
from fxopt.sentences import LONGEST, first_sentence, sentence_of


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ""),
        (
            "a view was\nwritten to, then\n'read' again. Hint: do not",
            "a view was written to, then 'read' again.",
        ),
        ("it failed\nfrom user code:\n  x + 1", "it failed"),
        ("it failed\n\nand more", "it failed"),
        ("it failed\n[1, 2]\nwhich is more", "it failed"),
        ("it failed\nFile 'model.py', line 3", "it failed"),
        (
            "shapes [2, ...] and e.g. [3] differ in model.py:3",
            "shapes [2, ...] and e.g. [3] differ in model.py:3",
        ),
        ("is it? No", "is it?"),
    ],
)
def test_a_line_is_told_where_it_goes_on_with_the_sentence(text: str, told: str) -> None:
    assert first_sentence(text) == told


def test_what_has_no_end_is_cut() -> None:
    told = first_sentence("no end\n" + "and no end\n" * LONGEST)
    assert len(told) <= LONGEST
    assert told.endswith("…")


@pytest.mark.parametrize("kind", [FxoptError, VerifyError])
def test_of_errors_of_our_own_the_first_line_is_told(kind: type[Exception]) -> None:
    error = kind("norm: expected a tensor, got 1e-06\nat model.py:3\nmend it")
    assert sentence_of(error) == "norm: expected a tensor, got 1e-06"
