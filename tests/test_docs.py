"""Every Python example in the docs and in the docstrings runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fxopt

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
PATH = re.compile(
    r"(?<![\w./-])((?:fxopt|patterns|kernels|tests|benchmarks|docs)/[\w./<>]*)(?:::(\w+))?"
    r"|`((?!\.venv)[\w./<>-]*(?:/|\.py|\.md|\.toml))`"
)
"""A path from the root or, in backquotes, also from `fxopt/` or the page's folder; and a name in that file."""


def module_names() -> list[str]:
    files = [path for folder in ("fxopt", "patterns", "kernels") for path in (ROOT / folder).rglob("*.py")]
    names = set[str]()
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "fxopt" else ("fxopt", *parts)
        names.add(".".join(parts).removesuffix(".__init__"))
    return sorted(names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of one page run one after the other, in one module."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    module = types.ModuleType("docs_page")  # Dynamo looks the globals of a function up in its module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in BLOCK.finditer(text):
        line = text[: block.start(1)].count("\n")
        source = "\n" * line + block.group(1)  # so that a traceback names the page's own line
        exec(compile(source, str(page), "exec"), module.__dict__)


TUTORIAL, EXAMPLE = ROOT / "docs" / "adding_a_pattern.md", ROOT / "examples" / "soft_norm.py"


def test_the_tutorials_example_is_the_code_of_its_page() -> None:
    in_file = {line.strip() for line in EXAMPLE.read_text().splitlines()}
    blocks = [block.group(1) for block in BLOCK.finditer(TUTORIAL.read_text())]
    starts = ("class Block(nn.Module):", "def soft_norm(", "@triton.jit", "class SoftNorm(")
    for start in starts:
        (code,) = [block[block.index(start) :] for block in blocks if f"\n{start}" in f"\n{block}"]
        lines = [line.strip() for line in code.partition("\ntorch.manual_seed")[0].splitlines()]
        assert [line for line in lines if line not in in_file] == []


@pytest.mark.slow
def test_the_tutorials_example_prints_its_table() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--device", "cpu"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ways = ("stock", "torch.compile", "fxopt without it", "fxopt with it")
    found = re.findall(rf"^  ({'|'.join(ways)}) +\d+\.\d+ +-?\d+\.\d+ +\d+\.\d+", done.stdout, re.MULTILINE)
    assert found == [*ways, *ways]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCED.sub("", page.read_text())
    missing = [target for target in LINK.findall(text) if not (page.parent / target).exists()]
    assert missing == []


def find_missing_paths(text: str, folder: Path) -> list[str]:
    missing: list[str] = []
    for named, symbol, short in PATH.findall(text):
        path = (named or short).replace("<name>", "activation").rstrip(".")
        file = next((root / path for root in (ROOT, ROOT / "fxopt", folder) if (root / path).exists()), None)
        if file is None or (symbol and not re.search(rf"^{symbol}\b", file.read_text(), re.MULTILINE)):
            missing.append(named or short)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_named_in_the_text_exist(page: Path) -> None:
    assert find_missing_paths(page.read_text(), page.parent) == []


def test_a_path_that_is_gone_is_found() -> None:
    text = "see `fxopt/graph/anchors.py`, `gone/`, patterns/__init__.py::NONE and `report/`, `kernels/<name>.py`."
    assert find_missing_paths(text, ROOT) == ["fxopt/graph/anchors.py", "gone/", "patterns/__init__.py"]


@pytest.mark.parametrize("name", module_names())
def test_docstring_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    results = doctest.testmod(module, optionflags=flags, verbose=False)
    assert results.failed == 0, f"{name}: {results.failed} of {results.attempted} examples failed"


@pytest.mark.parametrize("name", ["optimize", "explain", "restore", "trace"])
def test_public_functions_have_an_example(name: str) -> None:
    assert ">>>" in (inspect.getdoc(getattr(fxopt, name)) or ""), f"fxopt.{name} shows no example"
