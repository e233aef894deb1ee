"""What the ledger tells of by itself: a region that is captured again and again."""

from __future__ import annotations

import logging

import pytest

from fxopt.capture.ledger import MANY, Ledger


def test_a_region_that_is_captured_again_and_again_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger()
    with caplog.at_level(logging.WARNING, logger="fxopt"):
        for number in range(MANY - 1):
            assert ledger.add_capture("layers", None).number == number
            ledger.add_capture("", None)
        assert not ledger.notes
        assert not caplog.records
        for _ in range(3):
            ledger.add_capture("layers", None)
    (note,) = ledger.notes
    assert note.startswith(f"layers: captured {MANY} times")
    assert "TORCH_LOGS=recompiles" in note
    assert [record.getMessage() for record in caplog.records] == [note]


def test_many_captures_of_pieces_are_told_as_pieces() -> None:
    ledger = Ledger()
    for number in range(MANY):
        ledger.add_capture("layers", None, broken="it prints; at a.py:3" if number % 2 else "")
    (note,) = ledger.notes
    assert f"{MANY // 2} of these are pieces that its forward breaks into (it prints; at a.py:3)" in note
    assert note.endswith("TORCH_LOGS=graph_breaks,recompiles tells what")
    assert "a counter" not in note
