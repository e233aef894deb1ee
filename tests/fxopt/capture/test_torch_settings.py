"""Fails in plain words when a torch version moves something private of Dynamo's settings that fxopt touches."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from fxopt.capture import torch_dynamo, torch_settings


def test_capture_limits_are_raised_in_scope():
    from torch._dynamo import config

    before = config.recompile_limit
    with torch_settings.capture_scope(torch_settings.make_capture_settings()):
        assert config.recompile_limit == torch_settings.RECOMPILE_LIMIT
    assert config.recompile_limit == before


def test_no_file_is_tokenized_for_log_lines_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import funcname_cache

    read: list[str] = []
    add_file = funcname_cache._add_file
    monkeypatch.setattr(funcname_cache, "_add_file", lambda name: (read.append(name), add_file(name)))
    kept = torch_settings.FUNCTION_NAMES
    assert funcname_cache.cache is kept, "another scope has left its stand-in"
    kept.clear()

    def capture() -> None:
        torch.compile(torch_dynamo.isolate(lambda x: torch.relu(x) + 1), backend="eager")(torch.ones(2))

    with torch_settings.capture_scope(torch_settings.make_capture_settings()):
        capture()
        assert funcname_cache.get_funcname(__file__, 1) is None, "get_funcname reads its names elsewhere"
    assert not read
    assert funcname_cache.cache is kept
    monkeypatch.setattr(torch_settings, "is_artifact_logged", lambda name: name == "trace_call")
    with torch_settings.capture_scope(torch_settings.make_capture_settings()):
        assert funcname_cache.get_funcname(__file__, 1) == "", "get_funcname reads its names elsewhere"
    assert read == [__file__]


def test_modules_whose_tensors_are_left_unlisted_list_them_as_ever():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    parameters, buffers = dict(model.named_parameters("p")), dict(model.named_buffers(recurse=True))
    with torch_settings.tensors_left_unlisted((model, model[0])):
        assert dict(model.named_parameters("p")) == parameters
        assert dict(model.named_buffers(recurse=True)) == buffers
        assert len(list(model.parameters())) == 4
    assert not {"named_parameters", "named_buffers"}.intersection(model.__dict__)


def test_failures_are_silent_in_their_own_thread_alone_and_in_no_other_order() -> None:
    logger, seen = logging.getLogger(torch_settings.LOGGER_OF_FAILURES), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger.addHandler(handler)
    level, first_in, second_in = logger.level, threading.Event(), threading.Event()

    def first() -> None:
        with torch_settings.failures_suppressed(True):
            first_in.set()
            second_in.wait(10)
            logger.warning("first")

    thread = threading.Thread(target=first)
    try:
        thread.start()
        first_in.wait(10)
        logger.warning("nobody suppressed this")
        with torch_settings.failures_suppressed(True):
            second_in.set()
            thread.join()
            logger.warning("second")
        logger.warning("after")
    finally:
        logger.removeHandler(handler)
    assert seen == ["nobody suppressed this", "after"]
    assert logger.level == level
