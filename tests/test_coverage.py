"""`fxopt coverage`: tiny configs of all types, rows for whatever goes wrong, and a sample of types against stock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fxopt.cli import main
from fxopt.coverage import row as row_module
from fxopt.coverage.compare import Step, relative, worst_error
from fxopt.coverage.inputs import AUTO_CLASSES, Case, all_cases
from fxopt.coverage.record import Row, versions
from fxopt.coverage.render import find_main, render_json, render_markdown, render_page, summary_line
from fxopt.coverage.row import measure
from fxopt.coverage.run import read_lines, run_cases
from fxopt.coverage.shrink import LAYERS, shrink, tiny_config

DOCUMENT = Path(__file__).parent.parent / "docs" / "coverage.json"
DOCUMENTS = (DOCUMENT, DOCUMENT.with_name("coverage-5.17.json"))
SAMPLE = (
    *(
        "zaya",
        "ernie4_5_moe",
        "gemma2",
        "cohere",
        "apertus",
        "bitnet",
        "nanochat",
        "minicpm3",
        "flex_olmo",
        "qwen4_exp_text",
    ),
    *("gpt_oss", "deepseek_v4", "dots3_note_text", "minimax", "minimax_m3_vl_text", "mamba2", "zamba2"),
    *("bert:masked-lm", "nystromformer:masked-lm", "t5:seq2seq", "whisper:speech-seq2seq", "pixtral:vision"),
    *("clipseg:contrastive", "gemma3:image-text", "cohere2_vision:image-text"),
)
"""25 types that show every normal form: no other type that is captured shows one that these lack."""


QUICK = ("gemma2", "mamba2", "bert:masked-lm")
"""A decoder, one without attention and an encoder, two seconds each; of the others some take nineteen."""


LONG = (
    *("zaya", "ernie4_5_moe", "qwen4_exp_text", "deepseek_v4", "dots3_note_text", "minimax", "zamba2"),
    "cohere2_vision:image-text",
)
"""The slowest of the sample, each of which takes as long as four others: what these alone show is exhaustive."""


def mark_type(name: str) -> Any:
    if name in QUICK:
        return ()
    return pytest.mark.exhaustive if name in LONG else pytest.mark.slow


@pytest.mark.parametrize("name", [pytest.param(name, marks=mark_type(name)) for name in SAMPLE])
def test_a_sample_of_types_is_captured_and_trains_as_stock(name: str) -> None:
    model_type, _, task = name.partition(":")
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    row = measure(Case(model_type, task or "causal-lm"))
    # What stands around the blocks of two stacks is captured by some versions of transformers only.
    whole = ("captured",) if row.task.endswith("-lm") else ("captured", "blocks captured")
    assert row.status in whole, row.reason
    assert row.loss_error is not None
    assert row.loss_error < 1e-5
    assert sum(counts["rewritten"] for counts in row.sites.values()) > 0
    assert all(left["reason"] for left in row.left)


@pytest.mark.slow
def test_at_least_nine_of_ten_causal_language_models_are_built_tiny() -> None:
    cases = [case for case in all_cases() if case.task == "causal-lm"]
    built: list[str] = []
    for case in cases:
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(tiny_config(case.model_type))
        except Exception:
            continue
        if sum(parameter.numel() for parameter in model.parameters()) < 3_000_000:
            built.append(case.model_type)
    assert len(built) >= 0.92 * len(cases), sorted({case.model_type for case in cases} - set(built))


@pytest.mark.parametrize(
    ("model_type", "field"),
    [("gemma3_text", "layer_types"), ("qwen3_next", "layer_types"), ("smollm3", "no_rope_layers")],
)
def test_a_tiny_config_keeps_every_kind_of_layer(model_type: str, field: str) -> None:
    default, tiny = CONFIG_MAPPING[model_type](), tiny_config(model_type)
    assert set(getattr(tiny, field)) == set(getattr(default, field))
    assert len(getattr(tiny, field)) == tiny.num_hidden_layers == LAYERS


def test_a_tiny_mixture_of_experts_has_dense_layers_too() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("deepseek_v3"))
    kinds = {type(layer.mlp).__name__ for layer in model.model.layers}
    assert len(kinds) == 2


def test_shrinking_turns_off_what_draws_random_numbers_and_keeps_ratios() -> None:
    config = transformers.Qwen2Config(attention_dropout=0.1, num_attention_heads=32, num_key_value_heads=8)
    tiny = shrink(config, {"rms_norm_eps": 0.5})
    assert tiny.attention_dropout == 0.0
    assert (tiny.num_attention_heads, tiny.num_key_value_heads) == (4, 2)
    assert tiny.rms_norm_eps == 0.5


def test_errors_are_relative_and_never_hide_what_is_missing() -> None:
    theirs = Step(torch.tensor(1.0), {"a": torch.ones(4), "b": torch.full((4,), 1e-9)})
    ours = Step(torch.tensor(1.0), {"a": torch.ones(4) * 1.01, "b": torch.zeros(4)})
    error, name = worst_error(ours, theirs)
    assert name == "a"
    assert error == pytest.approx(0.01, rel=1e-3)
    assert relative(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
    assert relative(torch.tensor([float("nan")]), torch.tensor([float("nan")])) == 0.0


class Off(nn.Module):
    """A model whose optimized run can be made to differ."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.config = transformers.LlamaConfig()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        x = torch.nn.functional.one_hot(input_ids % 8, 8).to(self.layers[0].weight.dtype)
        for layer in self.layers:
            x = layer(x)
        return {"logits": x.tanh()}


def measured_with(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> Row:
    monkeypatch.setattr(
        row_module, "build", lambda case, row: (Off().train(), {"input_ids": torch.arange(16)})
    )
    monkeypatch.setattr(row_module.fxopt, "optimize", spoil)
    return measure(Case("llama"))


def test_a_wrong_gradient_is_a_row_that_says_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    optimize = row_module.fxopt.optimize

    def spoil(model: nn.Module) -> nn.Module:
        model.layers[1].weight.register_hook(lambda gradient: gradient * 1.01)
        return optimize(model)

    row = measured_with(monkeypatch, spoil)
    assert row.status == "wrong"
    assert row.gradient_error == pytest.approx(0.01, rel=0.1)
    assert "layers.1.weight is 1.0e-02 off a float64 run" in row.reason


def test_a_missing_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    row = measured_with(monkeypatch, lambda model: model.layers[0].requires_grad_(False))
    assert row.status == "wrong"
    assert row.reason.startswith("2 weights, layers.0.bias first, have a gradient in stock only")


def test_an_error_of_ours_is_a_failed_row_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: nn.Module) -> nn.Module:
        raise RuntimeError("broken on purpose")

    row = measured_with(monkeypatch, spoil)
    assert (row.status, row.reason.split(" at ")[0]) == ("failed", "RuntimeError: broken on purpose")
    assert "test_coverage.py:" in row.reason


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (
            Case("lama"),
            "unknown model type 'lama', expected one that transformers knows; the nearest are llama",
        ),
        (Case("llama", "painting"), "unknown task 'painting', expected one of causal-lm"),
        (Case("vit"), "ViTConfig"),
    ],
)
def test_what_cannot_be_built_is_a_row_with_its_reason(case: Case, reason: str) -> None:
    row = measure(case)
    assert row.status == "not built"
    assert reason in row.reason


def test_a_model_too_large_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_module, "MOST_PARAMETERS", 1000)
    row = measure(Case("llama"))
    assert row.status == "not built"
    assert "parameters, expected 1,000 at most" in row.reason


@pytest.mark.slow
def test_runs_resume_and_a_case_that_takes_too_long_ends_as_a_row(tmp_path: Path) -> None:
    lines = tmp_path / "coverage.jsonl"
    kept = Row("lama", "lama", "causal-lm", "not built", reason="kept from before")
    lines.write_text(json.dumps(versions()) + "\n" + json.dumps(vars(kept)) + '\n{"case": "half a li')
    seen: list[str] = []
    cases = [Case("lama"), Case("nosuch"), Case("llama")]
    options = dict(jobs=1, seconds=1, on_row=lambda row: seen.append(row.case))
    rows = run_cases(cases, lines, resume=True, **options)
    assert [row.case for row in rows] == ["lama", "nosuch", "llama"]
    assert rows[0].reason == "kept from before"
    assert rows[1].status == "not built"
    assert rows[2].status == "timed out"
    assert "still " in rows[2].reason
    assert seen == ["nosuch", "llama"]
    assert set(read_lines(lines)) == {"lama", "nosuch", "llama"}
    lines.write_text(lines.read_text().replace(versions()["torch"], "0.0"))
    assert read_lines(lines) == {}


def test_the_command_writes_its_files_and_strict_fails_on_what_is_not_captured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "coverage.json"

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as exit_info:
            main(
                [
                    "coverage",
                    "--arch",
                    "vit:causal-lm",
                    "--out",
                    str(out),
                    "--jobs",
                    "1",
                    "--resume",
                    *arguments,
                ]
            )
        return int(exit_info.value.code or 0)

    assert run("--strict") == 0  # what cannot be built is no fault of the optimizer's
    assert "1 models: 1 not built; 0 of 0 sites rewritten" in capsys.readouterr().out
    assert "| vit | not built |" in out.with_suffix(".md").read_text()
    wrong = Row("vit", "vit", "causal-lm", "wrong", reason="layers.0 is off")
    out.with_suffix(".jsonl").write_text(json.dumps(versions()) + "\n" + json.dumps(vars(wrong)) + "\n")
    assert run() == 0
    assert run("--strict") == 1
    assert "vit: wrong: layers.0 is off" in capsys.readouterr().err


def test_an_unknown_type_is_an_error_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "coverage.json"
    with pytest.raises(SystemExit) as exit_info:
        main(["coverage", "--arch", "llama", "--arch", "lama:causal-lm", "--out", str(out)])
    assert exit_info.value.code == 2
    assert (
        "--arch: unknown model type 'lama', expected one that transformers knows; the nearest are llama"
        in (capsys.readouterr().err)
    )
    assert list(tmp_path.iterdir()) == []


def test_the_page_comes_from_the_json_alone() -> None:
    row = Row(
        "llama",
        "llama",
        "causal-lm",
        "captured",
        sites={"glu": dict(found=2, rewritten=1, refused=0, unmatched=1)},
    )
    row.left = [
        dict(pattern="glu", status="unmatched", count=1, reason="a | b", location="m.py:1", module="mlp")
    ]
    row.gradient_error, row.loss_error, row.saved_bytes, row.saved_bytes_stock = 1e-6, 0.0, 50, 100
    page = render_markdown(json.loads(render_json([row])))
    assert "| pattern | found | rewritten | refused | unmatched | share |" in page
    assert "| glu | 2 | 1 | 0 | 1 | 50.0% |" in page
    assert "| glu | 1 | 1 | a \\| b | llama m.py:1 |" in page
    assert "| llama | captured | glu 1/2 | 1.0e-06 | 0.50 |" in page
    assert summary_line([row]) == "1 models: 1 captured; 1 of 2 sites rewritten"


def test_every_case_has_a_task_that_is_known() -> None:
    assert {case.task for case in all_cases()} == set(AUTO_CLASSES)
    assert len(set(all_cases())) == len(all_cases())


def test_the_page_sums_up_other_versions_beside_it(tmp_path: Path) -> None:
    main, other = tmp_path / "coverage.json", tmp_path / "coverage-1.2.json"
    main.write_text(render_json([Row("llama", "llama", "causal-lm", "captured")]))
    assert find_main(other) == (main,)
    assert find_main(main) == ()
    assert "## With transformers" not in render_page(main)
    other.write_text(main.read_text().replace(transformers.__version__, "1.2.3"))
    page = render_page(main)
    assert "## With transformers 1.2.3" in page
    assert "[its page](coverage-1.2.md)" in page
    assert "## With transformers" not in render_page(other)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_the_page_in_the_docs_is_the_one_of_the_json(document: Path) -> None:
    assert document.with_suffix(".md").read_text() == render_page(document)


def test_the_sample_shows_every_normal_form_of_the_whole_run() -> None:
    """Of routers each value of each attribute: their attributes come in more combinations than there are types."""
    rows = {row["case"]: row for row in json.loads(DOCUMENT.read_text())["rows"]}
    forms = {form for row in rows.values() if row["status"] == "captured" for form in row["forms"]}
    shown = {form for name in SAMPLE for form in rows[name]["forms"]}
    assert {form for form in forms - shown if not form.startswith("route(")} == set()
    assert _values_of_routers(forms) - _values_of_routers(shown) == set()
    assert len(set(SAMPLE)) == 25


def _values_of_routers(forms: set[str]) -> set[str]:
    routers = (form.removeprefix("route(").removesuffix(")") for form in forms if form.startswith("route("))
    return {value for router in routers for value in router.split(", ")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_the_whole_run_reached_its_figures(document: Path) -> None:
    rows = [Row(**row) for row in json.loads(document.read_text())["rows"]]
    assert {row.status for row in rows}.isdisjoint(("wrong", "failed", "timed out", "out of memory"))
    assert all(left["reason"] for row in rows for left in row.left)
    causal = [row for row in rows if row.task == "causal-lm"]
    built = [row for row in causal if row.status != "not built"]
    assert len(built) >= 0.927 * len(causal)
    assert sum(row.status in ("captured", "blocks captured") for row in built) >= 0.97 * len(built)
    # A block in pieces is another matter: in a loop over tokens each piece is a site with sizes that are not fixed.
    whole = [row for row in rows if not any(region["breaks"] for region in row.regions)]
    assert len(whole) >= 0.95 * len(rows)
    kinds = ("rms_norm", "layer_norm", "rope", "glu", "cross_entropy", "linear_cross_entropy")
    assert share_of(rows, *kinds) >= 0.95
    for pattern in kinds:
        if any(pattern in row.sites for row in whole):
            assert share_of(whole, pattern) >= 0.95, pattern


def share_of(rows: list[Row], *patterns: str) -> float:
    """Return the share of the sites of `patterns` that are rewritten."""
    counts = [row.sites[pattern] for row in rows for pattern in patterns if pattern in row.sites]
    return sum(each["rewritten"] for each in counts) / sum(each["found"] for each in counts)
