"""The public surface, frozen: a change here is a change for every user, and is made on purpose."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

import pytest

import fxopt

ROOT = Path(__file__).parent.parent
PUBLIC = {
    "ALL",
    "Culprits",
    "FxoptError",
    "Match",
    "Mismatch",
    "Pattern",
    "Plan",
    "Proof",
    "ProofError",
    "Report",
    "Site",
    "RanksDifferError",
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
}
PARAMETERS = {
    "optimize": {
        "model": inspect.Parameter.empty,
        "patterns": "ALL",
        "disable": (),
        "lowering": "auto",
        "verify": "on",
        "strict": False,
        "partial": True,
        "cuda_graphs": "auto",
        "memory_budget": "auto",
        "plan": None,
        "max_host_memory": None,
        "example_inputs": None,
    },
    "explain": {"model": inspect.Parameter.empty, "example_inputs": None},
    "plan": {
        "model": inspect.Parameter.empty,
        "memory_budget": "auto",
        "example_inputs": None,
        "patterns": "ALL",
        "disable": (),
        "lowering": "auto",
        "max_host_memory": None,
    },
    "restore": {"model": inspect.Parameter.empty},
    "trace": {"model": inspect.Parameter.empty, "example_inputs": None},
}


def test_public_names_are_frozen() -> None:
    assert set(fxopt.__all__) == PUBLIC
    assert len(fxopt.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_exist_and_are_documented(name: str) -> None:
    value = getattr(fxopt, name)
    assert name == "ALL" or inspect.getdoc(value)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_signatures_are_frozen(name: str) -> None:
    parameters = inspect.signature(getattr(fxopt, name)).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    expected = {key: fxopt.ALL if value == "ALL" else value for key, value in PARAMETERS[name].items()}
    assert defaults == expected


def test_options_are_given_by_name() -> None:
    first, *options = inspect.signature(fxopt.optimize).parameters.values()
    assert first.name == "model"
    assert {option.kind for option in options} == {inspect.Parameter.KEYWORD_ONLY}


def test_pattern_names_are_unique() -> None:
    names = [pattern.name for pattern in fxopt.ALL]
    assert len(names) == len(set(names))


def test_the_version_is_the_distributions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert fxopt.__version__ == project["version"]
