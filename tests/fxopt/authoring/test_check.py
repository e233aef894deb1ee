"""The proofs of a pattern as a command, its bad input, and the skeleton."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fxopt
from fxopt.authoring.check import Finding, check_pattern
from fxopt.authoring.files import load_patterns
from fxopt.authoring.reach import find_reach
from fxopt.authoring.skeleton import write_skeleton
from fxopt.cli import main
from fxopt.errors import FxoptError
from fxopt.patterns import CROSS_ENTROPY, GLU
from fxopt.rewriting.user_files import module_of_file

ROOT = Path(__file__).parents[3]


def growth(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x) - 1


def decay(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x) - 2


def failures(pattern: fxopt.Pattern) -> list[Finding]:
    return [finding for finding in check_pattern(pattern) if not finding.holds]


X = (torch.randn(4, 8),)
GOOD = fxopt.pattern(growth, torch.expm1, [X], near_misses=[(decay, X, "expected 1, got 2")])


def test_a_good_pattern_passes_and_every_kind_is_checked() -> None:
    findings = check_pattern(GOOD)
    assert [str(finding) for finding in findings if not finding.holds] == []
    kinds = [finding.kind for finding in findings]
    assert kinds == ["example", "gradients", "whole", "sizes", "spellings", "mutations", "near miss"]
    (spelled,) = [finding.detail for finding in findings if finding.kind == "spellings"]
    assert int(spelled.split()[0]) > 8


def writing(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x).mul_(2)


def test_an_example_without_gradients_of_its_own_is_told() -> None:
    (failed,) = failures(fxopt.pattern(writing, lambda x: torch.tanh(x) * 2, [X]))
    assert failed.kind == "example"
    assert re.search(
        r"writing \(test_check.py:\d+\): expected it to run, got RuntimeError: .*; write to nothing that backward",
        failed.detail,
    )


def test_a_near_miss_that_matches_is_told() -> None:
    mine = fxopt.pattern(growth, torch.expm1, [X], near_misses=[(growth, X, "anything")])
    (failed,) = failures(mine)
    assert re.search(
        r"growth \(test_check.py:\d+\): expected to be left alone, got rewritten; narrow", failed.detail
    )


def test_a_near_miss_of_another_reason_is_told() -> None:
    mine = fxopt.pattern(growth, torch.expm1, [X], near_misses=[(decay, X, "the moon")])
    (failed,) = failures(mine)
    assert "expected the reason 'the moon', got 'b of sub: expected 1, got 2'" in failed.detail


def broken(x: torch.Tensor) -> torch.Tensor:
    return x.no_such_method()  # pyright: ignore


def branching(x: torch.Tensor) -> torch.Tensor:
    return x.exp() if x.sum() > 0 else x.cos()


def test_a_near_miss_that_cannot_be_captured_is_told() -> None:
    mine = fxopt.pattern(growth, torch.expm1, [X], near_misses=[(branching, X, "anything")])
    (failed,) = failures(mine)
    assert re.search(
        r"branching \(test_check.py:\d+\): cannot be captured, expected .*; branch on no value", failed.detail
    )


def test_a_function_of_torchs_own_may_be_a_near_miss() -> None:
    mine = fxopt.pattern(growth, torch.expm1, [X], near_misses=[(torch.exp, X, "expected sub above exp")])
    assert failures(mine) == []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            broken,
            r"broken \(test_check.py:\d+\): expected it to run, got AttributeError: .*; mend the function",
        ),
        (torch.add, r"add: expected it to run, got TypeError: .*; mend the function, or give arguments"),
        (
            lambda x, y: x,
            r"<lambda> \(test_check.py:\d+\): expected 2 arguments \(x, y\), got 1; give a value",
        ),
    ],
)
def test_what_a_pattern_yields_and_does_not_run_is_told(function: Any, message: str) -> None:
    for field in ("examples", "near_misses", "mutations"):
        case = ("mine", (function, X), "reason") if field == "near_misses" else ("mine", (function, X))
        mine = dataclasses.replace(GOOD, **{field: lambda device, case=case: [case]})
        assert any(re.search(message, failed.detail) for failed in failures(mine)), field


def yielding_less(device: torch.device) -> Any:
    yield "mine", (decay,)


def raising(device: torch.device) -> Any:
    yield "mine", (growth, X)
    raise KeyError("gone")


@pytest.mark.parametrize(
    ("cases", "got"),
    [
        (yielding_less, r"got \(str, tuple\)"),
        (raising, r"got KeyError: 'gone'"),
        (lambda device: 3, r"got TypeError: 'int' object is not iterable"),
    ],
)
def test_cases_of_another_form_are_told(cases: Any, got: str) -> None:
    for field in ("examples", "near_misses", "mutations"):
        told = [failed.detail for failed in failures(dataclasses.replace(GOOD, **{field: cases}))]
        form = r"expected \(name, \(function, arguments\)" + (", reason" if field == "near_misses" else "")
        place = r"\(test_check.py:\d+\)"
        expected = rf"^{cases.__name__} {place}: {form}\), {got}; yield that$"
        assert any(re.search(expected, line) for line in told), (field, told)


def test_spellings_that_canonicalization_keeps_apart_are_not_asked_for() -> None:
    """What is returned is a view of the product: without it, memory that stock has apart would be shared."""

    def top(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x * 2, -1)[..., :4]

    mine = fxopt.pattern(top, lambda x: torch.softmax(x * 2, -1)[..., :4], [X])
    findings = check_pattern(mine)
    assert [str(finding) for finding in findings if not finding.holds] == []
    (spelled,) = [finding.detail for finding in findings if finding.kind == "spellings"]
    assert re.fullmatch(
        r"\d+ other spellings rewritten too; \d+ not asked for, since canonicalization leaves them longer",
        spelled,
    )
    assert int(spelled.split()[0]) > 8


def test_an_example_that_does_not_match_is_told() -> None:
    mine = dataclasses.replace(GOOD, examples=lambda device: [("other", (decay, X))])
    failed = failures(mine)[0]
    assert re.search(
        r"decay \(test_check.py:\d+\): expected one rewrite, got none: .*expected 1, got 2; mend",
        failed.detail,
    )


@pytest.mark.parametrize(
    ("replacement", "sizes"),
    [
        (lambda x: torch.expm1(x), r"\[4, 7\] and \[1012, 1032\] too"),
        (lambda x: torch.expm1(x).reshape(4, 8), r"\[4, 8\] alone: with more rows it is another form"),
        (
            lambda x: torch.expm1(x) if x.numel() < 99 else x,
            r"\[4, 7\] alone: with more rows it is another form",
        ),
    ],
)
def test_the_sizes_that_a_replacement_was_proven_at_are_told(replacement: Any, sizes: str) -> None:
    found = check_pattern(fxopt.pattern(growth, replacement, [X]))
    assert [str(finding) for finding in found if not finding.holds] == []
    (told,) = [finding.detail for finding in found if finding.kind == "sizes"]
    assert re.fullmatch(f"proven at x: {sizes}", told), told


def test_a_wrong_rewrite_of_a_mutation_fails() -> None:
    """Without proofs to refuse it, a pattern whose search is too wide would be caught here."""
    wide = fxopt.Pattern("wide", GOOD.search, lambda match: fxopt_call(match), examples=GOOD.examples)
    assert failures(wide)


def fxopt_call(match: fxopt.Match) -> object:
    from fxopt.rewriting.pattern import call

    return call(torch.exp, match["x"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    [GLU, pytest.param(CROSS_ENTROPY, marks=pytest.mark.exhaustive)],
    ids=lambda pattern: pattern.name,
)
def test_the_librarys_own_examples_are_rewritten(pattern: fxopt.Pattern) -> None:
    """Each fifth of them: `tests/patterns/` has all, and the command tries other spellings and sizes of each."""
    findings = check_pattern(
        dataclasses.replace(pattern, examples=lambda device: list(pattern.examples(device))[::5])
    )
    wanted = ("example", "whole", "near miss", "mutations")
    assert [str(f) for f in findings if f.kind in wanted and not f.holds] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\nraise ValueError('no')", r"mine.py:2: cannot be imported: ValueError: no\nmend"),
        ("def (", r"mine.py:1: cannot be imported: SyntaxError: .*\nmend"),
        ("import no_such_module", r"mine.py:1: cannot be imported: ModuleNotFoundError"),
        ("\0", r"mine.py: cannot be imported: SyntaxError: .*null bytes\nmend"),
        ("\nimport sys\nsys.exit(3)", r"mine.py:3: cannot be imported: SystemExit: 3\nmend"),
        (
            "\n\nimport other_of_mine",
            r"mine.py:3: cannot be imported: SyntaxError: .*other_of_mine.py, line 1",
        ),
        ("x = 1", r"mine.py: defines no pattern, expected at least one at its top level\nwrite MINE"),
    ],
)
def test_bad_files_are_told(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    (tmp_path / "other_of_mine.py").write_text("def (")
    with pytest.raises(SystemExit) as exit_info:
        main(["check-pattern", str(path)])
    assert exit_info.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_files_of_one_name_and_one_that_an_import_would_find_have_modules_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    paths = [tmp_path / folder / "same" / "odd_file.py" for folder in "abc"] + [tmp_path / "wave.py"]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"NUMBER = {number}")
    modules = []
    for path in paths:
        module, run = module_of_file(path, "a number")
        run()
        modules.append(module)
    assert [module.NUMBER for module in modules] == [0, 1, 2, 3]
    assert len({module.__name__ for module in modules}) == 4
    assert all(sys.modules.pop(module.__name__) is module for module in modules)
    assert "NUMBER" not in vars(importlib.import_module("wave"))


@pytest.mark.parametrize("name", ["random", "torch", "typing"])
def test_a_file_called_like_a_module_of_others_takes_no_ones_place(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.py"
    path.write_text(
        "import torch, fxopt\ndef growth(x):\n    return torch.exp(x) - 1\n"
        "MINE = fxopt.pattern(growth, torch.expm1, [(torch.randn(4, 8),)])\n"
    )
    before = sys.modules[name]
    (mine,) = load_patterns(path)
    assert sys.modules[name] is before
    assert mine.name == "growth"


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(FxoptError, match=r"gone\.py: no such Python file"):
        load_patterns(Path("gone.py"))


@pytest.mark.slow
def test_the_skeleton_passes_its_own_tests(tmp_path: Path) -> None:
    paths = write_skeleton("soft_size", tmp_path)
    assert {path.name for path in paths} == {
        "soft_size_kernel.py", "soft_size_pattern.py", "test_soft_size.py", "soft_size_benchmark.py", "soft_size.md",
    }  # fmt: skip
    ruff = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F,E9", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ruff.returncode == 0, ruff.stdout
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "soft_size")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        command, cwd=tmp_path / "soft_size", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, "the kernels run in the interpreter, or on the device"


def test_the_skeletons_kernels_equal_its_reference_in_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the skeleton's own tests run the kernels on the device")
    write_skeleton("other_size", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "other_size"))
    import importlib

    kernel = importlib.import_module("other_size_kernel")
    x, dy = torch.randn(2, 3, 700)
    torch.testing.assert_close(kernel.launch_forward(x, 0.7), kernel.other_size_reference(x, 0.7))
    torch.testing.assert_close(kernel.launch_backward(dy, x, 0.7), kernel.plain_backward(dy, x, 0.7))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Bad-Name", r"got 'Bad-Name'\ntry"),
        ("class", r"got 'class'\ntry"),
        ("größe", r"expected a name of a-z, 0-9 and _ that Python can import, got 'größe'\ntry"),
        ("test_norm", r"expected a name that pytest takes for no test, got 'test_norm'\nuse"),
        ("glu", r"glu is a pattern of the library already"),
        ("torch", r"torch means something else in the files that would be written, expected a new name\nuse"),
    ],
)
def test_bad_names_are_told(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(FxoptError, match=message):
        write_skeleton(name, tmp_path)
    write_skeleton("mine", tmp_path)
    with pytest.raises(FxoptError, match=r"is there already, expected a new folder\ngive"):
        write_skeleton("mine", tmp_path)


def main_without_exit(*arguments: str) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code in (0, None)


@pytest.mark.slow
def test_the_reach_over_model_types_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch, fxopt\n"
        "def rotate(x):\n    half = x.shape[-1] // 2\n"
        "    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)\n"
        "def mean_square(x):\n    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)\n"
        "MINE = fxopt.pattern(mean_square, lambda x: mean_square(x), [(torch.randn(4, 8),)])\n"
    )
    main_without_exit("check-pattern", str(path), "--over", "llama", "--over", "gpt2")
    printed, progress = capsys.readouterr()
    assert re.search(r"llama: mean_square x 9 \(modeling_llama.py:\d+\)", printed)
    assert "gpt2: mean_square x 0" in printed
    assert "mean_square: found in 1 of 2 models, of 2 types" in printed
    assert "2/2" in progress


@pytest.mark.slow
def test_a_model_that_ends_its_process_or_is_unknown_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import multiprocessing, os, signal, torch, fxopt\n"
        "if multiprocessing.parent_process() is not None:\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
        "def growth(x):\n    return torch.exp(x) - 1\n"
        "MINE = fxopt.pattern(growth, torch.expm1, [(torch.randn(4, 8),)])\n"
    )
    main_without_exit("check-pattern", str(path), "--over", "llama")
    printed = capsys.readouterr().out
    assert "llama: not tried: the process ended with code -11 while matching" in printed
    assert "growth: found in 0 of 1 models, of 1 types; 1 not tried" in printed
    with pytest.raises(
        FxoptError, match=r"--over: unknown model type 'lamma', expected .* nearest are llama,"
    ):
        list(find_reach(path, ["lamma"]))
    with pytest.raises(FxoptError, match=r"--over: unknown task 'x' of llama, expected .*causal-lm"):
        list(find_reach(path, ["llama:x"]))


def test_an_unknown_model_type_is_told_before_any_proof(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text("raise SystemExit('the file was read before the name')\n")
    with pytest.raises(SystemExit) as exit_info:
        main(["check-pattern", str(path), "--over", "lamma"])
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "--over: unknown model type 'lamma'" in printed.err
