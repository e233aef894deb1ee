"""What is installed is what lies in the checkout, whichever way it is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fxopt
import fxopt.kernels
import fxopt.patterns

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP_FOLDERS = {"fxopt.patterns": "patterns", "fxopt.kernels": "kernels"}


def packages_on_disk() -> set[str]:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "fxopt").rglob("__init__.py")
        if path.parent.name not in TOP_FOLDERS.values()
    }
    for name, folder in TOP_FOLDERS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join((name, *path.parent.relative_to(ROOT / folder).parts)))
    return found


def folder_of(package: str) -> Path:
    """Return where the sources of `package` lie: patterns and kernels are top-level folders."""
    for name, folder in TOP_FOLDERS.items():
        if package == name or package.startswith(f"{name}."):
            return ROOT / package.replace(name, folder, 1).replace(".", "/")
    return ROOT / package.replace(".", "/")


def source_files() -> set[str]:
    """Return the path in the wheel of every Python file of every package, and of the data beside them."""
    found = set[str]()
    for name in packages_on_disk():
        found |= {f"{name.replace('.', '/')}/{path.name}" for path in folder_of(name).glob("*.py")}
    for folder in ("fxopt/report/assets", "fxopt/authoring/skeleton"):
        found |= {f"{folder}/{path.name}" for path in (ROOT / folder).iterdir()}
    return found | {"fxopt/py.typed"}


def copy_sources(target: Path, *, links: bool) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("fxopt", "patterns", "kernels"):
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=ignore)
    if not links:
        for link in TOP_FOLDERS.values():
            (target / "fxopt" / link).unlink()


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    base = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env={**base, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_declared_packages_are_the_folders() -> None:
    # A forgotten subpackage works in an editable install and is missing from the wheel.
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_constraints_pin_one_version_of_all_that_is_asked_for() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, filter(is_pin, lines))}
    exact = {name: [(each.operator, each.version) for each in pin.specifier] for name, pin in pins.items()}
    assert {name for name, found in exact.items() if [operator for operator, _ in found] != ["=="]} == set()
    project = PROJECT["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        asked = Requirement(text)
        ((_, version),) = exact[canonicalize_name(asked.name)]
        assert asked.specifier.contains(version), f"{text}: constraints.txt pins {version}"
    assert (exact["torch"], exact["triton"]) == ([("==", "2.13.0")], [("==", "3.7.1")])


def is_pin(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#")


def test_ci_runs_what_a_user_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^make test test-all$", script, re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_two_links_lead_to_the_folders() -> None:
    for folder in TOP_FOLDERS.values():
        link = ROOT / "fxopt" / folder
        assert link.is_symlink()
        assert os.readlink(link) == f"../{folder}"


def test_all_parts_come_from_one_place() -> None:
    """A second worktree under the editable install of a first would run the first one's code."""
    origins = {Path(str(module.__file__)).resolve() for module in (fxopt, fxopt.patterns, fxopt.kernels)}
    here = {ROOT / "fxopt/__init__.py", ROOT / "patterns/__init__.py", ROOT / "kernels/__init__.py"}
    installed = all("site-packages" in origin.parts for origin in origins)
    assert origins == here or installed, (
        f"fxopt is imported from {sorted(map(str, origins))}, expected this checkout, {ROOT}: "
        "run `make setup` here, and this checkout's own .venv/bin/pytest"
    )


@pytest.mark.parametrize("links", [True, False], ids=["links", "links_lost"])
def test_the_wheel_holds_every_module(tmp_path: Path, links: bool) -> None:
    source = tmp_path / "source"
    source.mkdir()
    copy_sources(source, links=links)
    run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source, cwd=tmp_path
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == source_files()


def test_the_distribution_declares_its_command_and_backend(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    copy_sources(source, links=True)
    run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source, cwd=tmp_path
    )
    (wheel,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    text = archive.read(entry_points).decode()
    assert "fxopt = fxopt.cli:main" in text
    assert "[torch_dynamo_backends]\nfxopt = fxopt.backend:backend" in text
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_a_worktree_runs_its_own_code(tmp_path: Path) -> None:
    """An uninstalled copy, run from its root, finds its own packages although another is installed."""
    copy_sources(tmp_path, links=True)
    code = "import fxopt.patterns as p, fxopt.kernels as k; print(p.__file__, k.__file__)"
    for origin in run(sys.executable, "-c", code, cwd=tmp_path).split():
        assert Path(origin).resolve().is_relative_to(tmp_path.resolve()), origin


def test_git_carries_the_links() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "fxopt/patterns", "fxopt/kernels"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not in a git checkout")
    modes = [line.split()[0] for line in listed.stdout.splitlines()]
    assert modes == ["120000", "120000"], "git holds the two links as something else than links"


def test_an_editable_install_is_live_and_keeps_kernels_private(tmp_path: Path) -> None:
    source, environment = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    copy_sources(source, links=True)
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    parent = next(path for path in sys.path if path.endswith("site-packages"))
    (added,) = (environment / "lib").glob("python*/site-packages")
    (added / "parent.pth").write_text(f"{parent}\n")  # pip, setuptools and torch of this environment
    install = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--ignore-installed", "--quiet")
    run(python, *install, "-e", source, cwd=tmp_path)

    (source / "kernels" / "made_later.py").write_text("VALUE = 1\n")
    code = (
        "import importlib.util, fxopt.kernels.made_later as made; print(made.VALUE, made.__file__);"
        "spec = importlib.util.find_spec('kernels'); print(spec and spec.origin)"
    )
    value, origin, kernels = run(python, "-c", code, cwd=tmp_path).split()
    assert value == "1"
    assert Path(origin).resolve().is_relative_to(source.resolve())
    assert not kernels.startswith(str(source)), "the checkout's kernels/ can be imported as `kernels`"


def test_tests_of_one_group_go_to_one_worker_of_pytest(tmp_path: Path) -> None:
    """What is slow to start is started once: pytest-xdist names groups by what is private of pytest."""
    lines = [
        "import os",
        "import pytest",
        "",
        "@pytest.mark.xdist_group('one')",
        "@pytest.mark.parametrize('n', range(6))",
    ]
    lines += [
        "def test_it(n):",
        f"    open({str(tmp_path)!r} + '/' + os.environ['PYTEST_XDIST_WORKER'], 'a').close()",
    ]
    tests = tmp_path / "test_group.py"
    tests.write_text("\n".join(lines))
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "2",
        "--dist",
        "loadgroup",
        "-p",
        "no:cacheprovider",
        str(tests),
    ]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert len(list(tmp_path.glob("gw*"))) == 1
