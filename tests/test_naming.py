"""Names: files are where the docs say, and one feature has one name in five places."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import fxopt

ROOT = Path(__file__).parent.parent
NOT_A_FEATURE = {
    "__init__",
    "activations",
    "dropped",
    "launch",
    "launcher",
    "row_loss",
    "expert_units",
    "experts_cases",
    "logits",
    "rotations",
    "attention_cases",
    "rope_cases",
    "route_cases",
    "route_groups",
    "norm_rope_cases",
}
FEATURES = sorted(
    path.stem
    for path in (ROOT / "kernels").iterdir()
    if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.stem not in NOT_A_FEATURE
)
FILES = ("__init__.py", "pipeline.py", "errors.py", "options.py", "cli.py", "py.typed")
PARTS = {
    "capture": ("regions.py", "lowering.py", "torch_dynamo.py"),
    "graph": ("view.py", "canonicalize.py", "anchors/__init__.py", "verify.py"),
    "rewriting": ("pattern.py", "matcher.py", "rewrite.py", "proof.py"),
    "report": ("records.py", "text.py"),
}


def is_in(name: str, text: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None


def test_files_of_the_house_are_in_place() -> None:
    expected = [ROOT / "fxopt" / name for name in FILES]
    expected += [ROOT / "fxopt" / part / name for part, names in PARTS.items() for name in names]
    assert [str(path.relative_to(ROOT)) for path in expected if not path.exists()] == []


def test_every_pattern_is_named_after_its_file() -> None:
    files = {path.stem for path in (ROOT / "patterns").glob("*.py")} - NOT_A_FEATURE
    names = [pattern.name for pattern in fxopt.ALL]
    assert sorted(names) == sorted(files)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_kernel_has_a_pattern_a_test_a_benchmark_and_a_page(feature: str) -> None:
    benchmarks = "\n".join(path.read_text() for path in sorted((ROOT / "benchmarks").rglob("*.py")))
    places = {
        f"patterns/{feature}.py": (ROOT / "patterns" / f"{feature}.py").exists(),
        f"tests/kernels/test_{feature}.py": (ROOT / "tests" / "kernels" / f"test_{feature}.py").exists(),
        f"docs/patterns/{feature}.md": (ROOT / "docs" / "patterns" / f"{feature}.md").exists(),
        "a row in benchmarks/": is_in(feature, benchmarks),
        "a line in docs/index.md": is_in(feature, (ROOT / "docs" / "index.md").read_text()),
    }
    assert [place for place, exists in places.items() if not exists] == []


@pytest.mark.parametrize("feature", FEATURES)
def test_a_kernel_file_defines_its_op(feature: str) -> None:
    assert callable(getattr(importlib.import_module(f"fxopt.kernels.{feature}"), feature, None))


def test_test_files_mirror_the_code() -> None:
    """A test folder is named after what it tests."""
    folders = {path.name for path in (ROOT / "tests" / "fxopt").iterdir() if path.is_dir()} - {"__pycache__"}
    parts = {path.name for path in (ROOT / "fxopt").iterdir() if path.is_dir()}
    assert folders <= parts


def test_no_folder_of_tests_is_a_package() -> None:
    assert [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("__init__.py")] == []
