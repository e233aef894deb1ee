"""Shared by all tests: the same random numbers, no network, and GPU tests skipped where there is no GPU."""

from __future__ import annotations

import gc
import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; tests fetch nothing
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

# pytest listens to loggers that do not propagate, and where somebody listens to this one torch writes each graph down
# as JSON: a fifth of the time of what captures.
logging.getLogger("torch.__trace").propagate = True

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported; kernels then run on a CPU


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "exhaustive" in item.keywords:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


def pytest_collection_finish() -> None:
    """Keep Python's collector of cycles off what imports made, and let it run less often.

    Captures make so many objects that full collections, most of whose walk is over modules, took a tenth of their time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
