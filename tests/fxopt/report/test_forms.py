"""The other forms of a report: HTML without a browser, JSON and back, differences, reasons, graphs as Python."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.cli import main
from fxopt.coverage.shrink import tiny_config
from fxopt.errors import FxoptError, UnknownNameError
from fxopt.offline import Setting, report_offline
from fxopt.report import plan, records
from fxopt.report.alignment import align
from fxopt.report.diff import diff_reports
from fxopt.report.figures import layer_figures
from fxopt.report.html import render_html, render_notebook
from fxopt.report.load import load_report, parse_report
from fxopt.report.memory import describe_budget, find_holdings, find_peak, find_saved
from fxopt.report.records import MODEL_REGION, Fallback, RegionRecord, Report, Site
from fxopt.report.text import WIDTH
from fxopt.report.units import format_bytes

Explained = Callable[[str], Report]
SLOW = tuple(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "qwen3_moe", "qlora"))


def test_the_file_is_self_contained_and_small(report_of: Explained, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report_of("llama").save_html(path)
    text = path.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//|[\w./-]+\.(js|css|png))""", text)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket", text)
    assert len(text) < 400_000


def test_all_texts_are_escaped(hostile: Report) -> None:
    report = hostile
    text = render_html(report)
    assert "<script>alert(" not in text
    assert "<img src=x" not in text
    assert text.count("</script>") == 3
    assert "<img src=x" not in render_notebook(report)


def test_no_text_steers_the_terminal(tmp_path: Path) -> None:
    sites = (site("glu", module="\x1b[2Ja"), site("rope", "unmatched"))
    report, bare = Report("\x1b[31mTiny\r\u202e\ud800", sites), Report("Tiny")
    for text in (str(report), str(diff_reports(report, bare)), report.why_not("rope")):
        assert not re.search(r"[^\S\n ]|[\x1b\u202e\ud800]", text)
    assert r"\x1b[31mTiny" in str(report)
    assert r"\u202e\ud800" in str(report)
    report.save_html(tmp_path / "odd.html")
    assert "Tiny" in (tmp_path / "odd.html").read_text(encoding="utf-8")


def test_html_holds_what_the_text_holds(report_of: Explained) -> None:
    report = report_of("llama")
    text = render_html(report)
    for site in report.sites:
        assert site.location in text
    for figure in layer_figures(report):
        assert f"{figure.ops_before} → {figure.ops_after}" in text
        assert re.search(rf"{figure.layers} +{figure.ops_before} +{figure.ops_after} ", str(report))
    assert "def block(" in text


@pytest.mark.parametrize("name", ["llama", *SLOW])
def test_text_fits_its_columns(report_of: Explained, name: str) -> None:
    assert max(map(len, str(report_of(name)).splitlines())) <= WIDTH == 100


def test_guards_and_captures_are_told(report_of: Explained) -> None:
    block, model = report_of("llama").regions
    assert block.captures == model.captures == 1
    assert any("requires_grad" in guard for guard in block.guards)
    assert all(f"{len(region.guards)}" in str(report_of("llama")) for region in (block, model))


def test_modules_of_the_tail_are_named_from_the_model(report_of: Explained) -> None:
    """On the meta device, too, where the blocks do not run right before it."""
    sites = {(site.pattern, site.module): site.count for site in report_of("llama").sites}
    assert sites["rms_norm", "model.norm"] == 1
    assert sites["linear_cross_entropy", ""] == 1


@pytest.mark.parametrize("name", ["llama", SLOW[1]])
def test_the_parts_of_each_instant_are_its_bytes(report_of: Explained, name: str) -> None:
    (planned,) = report_of(name).plans
    for instant in planned.timeline:
        assert sum(holding.bytes for holding in find_holdings(planned, instant)) == instant.bytes
    place = find_peak(planned)
    assert place is not None
    peak = planned.timeline[place]
    assert (peak.bytes, peak.name) == (planned.peak_bytes, planned.peak_at)
    rests = [find_holdings(planned, instant)[0].bytes - planned.static_bytes for instant in planned.timeline]
    # Both tables of the rotation lie beside the blocks: 16 rows of a head's width, in bfloat16 or float32.
    config = tiny_config(name)
    width = config.hidden_size // config.num_attention_heads
    tables = 2 * 16 * width * (2 if "moe" in name else 4)
    assert rests == [*[tables] * (len(planned.timeline) - 1), 0]
    # What waits at the end of the forward pass is what all regions but the last have saved.
    regions = len(planned.layers) + len(planned.after)
    saved = find_saved(planned, regions - 1)
    assert sum(value.bytes for value in saved) > 0
    assert max(value.blocks for value in saved) >= len(planned.layers) - 1
    assert find_saved(planned, 0) == find_saved(planned, len(planned.timeline) - 1) == ()
    assert find_saved(planned, regions) == saved, "the last piece runs backward right after it ran forward"


def test_the_text_tells_what_holds_the_peak(report_of: Explained) -> None:
    report = report_of("llama")
    (planned,) = report.plans
    assert f"at the peak, in the {planned.peak_at}, live {format_bytes(planned.peak_bytes)}:" in str(report)


def test_what_a_pass_launches_and_saves_is_measured_when_it_is_shown() -> None:
    report = fxopt.explain(nn.Sequential(Odd(), Odd()), {"input": torch.randn(2, 3, 8)})
    assert all(graph.work_after is None for graph in report.graphs)
    (figure, *_) = layer_figures(report.measured())
    assert figure.kernels is not None
    assert figure.saved is not None
    assert figure.kernels[1] < figure.kernels[0]
    assert figure.saved[1] < figure.saved[0]
    for form in (str(report), render_html(report.measured())):
        assert str(figure.kernels[0]) in form
        assert format_bytes(figure.saved[1]) in form
    assert parse_report(report.to_json()) == report.measured()


def test_a_notebook_shows_it(report_of: Explained) -> None:
    assert (
        report_of("llama")._repr_html_().startswith('<iframe title="fxopt report: LlamaForCausalLM" srcdoc="')
    )


@pytest.mark.parametrize("name", ["llama", *SLOW])
def test_json_comes_back_whole(report_of: Explained, name: str) -> None:
    report = report_of(name)
    again = parse_report(report.to_json())
    assert again == report
    assert str(again) == str(report)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"a.json: not JSON at line 1: .*\ngive a file"),
        ("[]", r"a.json: expected a report of schema 1, got no report\nwrite"),
        ('{"schema": 99}', r"expected a report of schema 1, got 99"),
        ('{"schema": "1"}', r"expected a report of schema 1, got '1'"),
        ('{"schema": true}', r"expected a report of schema 1, got True"),
        ('\ufeff{"schema": 99}', r"expected a report of schema 1, got 99"),
        ('{"schema": 1, "model": "m"}', r"not a whole report: sites is missing\nwrite it anew"),
        ('{"schema": 1, "model": 3}', r"not a whole report: model is 3, expected str"),
    ],
)
def test_bad_json_is_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(FxoptError, match=message):
        load_report(path)
    with pytest.raises(FxoptError, match=r"cannot be read"):
        load_report(tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("graphs",), None, "graphs is None, expected a list"),
        (("sites", 0, "count"), "many", r"sites\[0\].count is 'many', expected int"),
        (("sites", 0, "count"), True, r"sites\[0\].count is True, expected int"),
        (("sites", 0, "status"), "banana", r"is 'banana', expected one of rewritten, refused, unmatched"),
        (("sites", 0), [], r"sites\[0\] is a list, expected an object"),
        (("graphs", 0, "nodes_before", 0, "inputs"), 7, r"nodes_before\[0\].inputs is 7, expected a list"),
        (("plans", 0, "layers", 0), ["a"], r"plans\[0\].layers\[0\] is a list, expected 2 items"),
        (("plans", 0, "step_ms"), "fast", r"plans\[0\].step_ms is 'fast', expected float"),
    ],
)
def test_a_value_of_another_form_is_told(
    report_of: Explained, place: tuple[Any, ...], value: Any, message: str
) -> None:
    fields: Any = json.loads(report_of("llama").to_json())
    holder = functools.reduce(operator.getitem, place[:-1], fields)
    holder[place[-1]] = value
    with pytest.raises(FxoptError, match=message):
        parse_report(json.dumps(fields))


def test_a_proof_of_no_finite_error_is_written_as_json_and_comes_back() -> None:
    proof = records.Proof(False, "float32", "cpu", math.inf, 1e-7, "y", (), ())
    report = Report("Tiny", sites=(records.Site("glu", "", 1, "refused", "mlp", "tiny.py:1", "no", proof),))
    text = report.to_json()
    assert json.loads(text, parse_constant=pytest.fail)["sites"][0]["proof"]["error"] == "inf"
    assert parse_report(text) == report
    again = parse_report(text.replace('"inf"', '"nan"')).sites[0].proof
    assert again is not None
    assert math.isnan(again.error)


def test_a_field_that_a_later_version_writes_is_skipped(report_of: Explained) -> None:
    fields: Any = json.loads(report_of("llama").to_json())
    fields["colour"] = fields["sites"][0]["colour"] = fields["plans"][0]["colour"] = "blue"
    assert parse_report(json.dumps(fields)) == report_of("llama")


def test_the_page_names_every_field() -> None:
    page = (Path(__file__).parents[3] / "docs" / "report.md").read_text()
    values = (*vars(records).values(), *vars(plan).values())
    kinds = [kind for kind in values if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)} - {"measure"}  # not written
    assert len(kinds) > 8
    assert sorted(name for name in names if f"`{name}`" not in page) == []


@pytest.mark.parametrize("name", ["llama", *SLOW])
def test_alignment_is_by_provenance(report_of: Explained, name: str) -> None:
    for graph in report_of(name).graphs:
        aligned = align(graph)
        assert [cell.before for cell in aligned.cells if cell.before] == list(graph.nodes_before)
        after = [cell.after for cell in aligned.cells if cell.after]
        assert sorted(after, key=lambda n: n.name) == sorted(graph.nodes_after, key=lambda n: n.name)
        for cell in aligned.cells:
            if cell.before and cell.after:
                origins = (*cell.after.origins, cell.after.name)
                assert cell.before.name in origins
        assert {cell.pattern for cell in aligned.cells} - {""} == {
            node.pattern for node in graph.nodes_after
        } - {""}


def test_figures_count_what_computes(report_of: Explained) -> None:
    graph = next(graph for graph in report_of("llama").graphs if graph.region != MODEL_REGION)
    by_name = {node.name: node for node in graph.nodes_before}
    linears = [node for node in by_name.values() if node.op == "linear"]
    assert len(linears) == 7
    assert all(node.kind == "op" for node in linears)
    query = linears[0]
    assert query.type == "f32[2, 16, 64]"
    assert query.bytes == 2 * 16 * 64 * 4
    views = [node for node in by_name.values() if node.op in (".view", ".transpose")]
    assert views
    assert all(node.kind == "view" and node.bytes == 0 for node in views)


class Odd(nn.Module):
    """What a norm would divide is another tensor than what it measures; the gate is a usual one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.tanh() * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def test_why_not_shows_how_far_it_came_and_both_graphs() -> None:
    report = fxopt.explain(nn.Sequential(Odd(), Odd()), {"input": torch.randn(2, 3, 8)})
    text = report.why_not("rms_norm")
    assert text.startswith("rms_norm: 0 of 2 sites would be rewritten\n")
    assert re.search(r"unmatched at 0 \(test_forms.py:\d+\) x 2", text)
    assert re.search(r"rms_norm: [2-9] nodes matched, then:\n +x: expected .*, got ", text), text
    assert re.search(r"mean1 = mean\(pow1.* \| ", text), text
    assert re.search(r" \| > \w+", text), text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "nothing was left out" in report.why_not("glu")
    assert "no site of this form" in report.why_not("rope")
    with pytest.raises(UnknownNameError, match=r"why_not: unknown name 'rop', expected one of .*rope"):
        report.why_not("rop")
    with pytest.raises(UnknownNameError, match=r"why_not: unknown name 3, expected one of .*rope"):
        report.why_not(3)  # pyright: ignore[reportArgumentType]


class NeverCalled(nn.Module):
    """Reads the parts of its blocks, which run as no block does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer[0](x)  # pyright: ignore[reportIndexIssue]
        return x


def test_why_not_claims_nothing_of_what_was_not_captured() -> None:
    why = " ".join(fxopt.explain(NeverCalled(), {"x": torch.randn(2, 3, 8)}).why_not("layer_norm").split())
    assert "no site of this form is in the model" not in why
    assert (
        "whether there is one in what was not captured is not known: 2 of 2 blocks at layers.0, the tail"
        in why
    )
    assert "no block was called" in why


def test_why_not_counts_the_rewrites_of_a_pattern_without_sites() -> None:
    mine = fxopt.pattern(
        lambda x: F.relu(x) ** 2,
        lambda x: x.clamp_min(0) * x.relu(),
        examples=[(torch.randn(4, 8),)],
        name="mine",
    )

    class Squared(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x) ** 2

    model = nn.Sequential(nn.Linear(8, 8), Squared())
    fxopt.optimize(model, patterns=[mine])
    model(torch.randn(2, 8)).sum().backward()
    report = fxopt.explain(model)
    assert report.why_not("mine") == "mine: rewritten 1 time in the captured graphs\nnothing was left out\n"


@pytest.mark.parametrize("name", ["llama", *SLOW[:2]])
def test_code_of_graphs_runs(report_of: Explained, name: str) -> None:
    for graph in report_of(name).graphs:
        namespace: dict[str, object] = {}
        exec(graph.code, namespace)
        assert "not_importable" not in graph.code
        assert "_set_grad_enabled" not in graph.code, "nothing in these hangs on it"
        assert callable(namespace["tail" if graph.region == MODEL_REGION else "block"])


def test_traced_code_computes_the_same() -> None:
    model = nn.Sequential(Odd(), Odd()).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    namespace: dict[str, object] = {}
    exec(fxopt.trace(model, {"input": x}), namespace)
    block = namespace["block"]
    assert callable(block)
    (y,) = block(x, *model[0].parameters())  # in the order of use, which is that of the modules
    torch.testing.assert_close(y, model[0](x))


def test_a_model_of_which_nothing_is_captured_has_no_trace() -> None:
    class Closed(nn.Module):
        @torch.compiler.disable
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input.exp()

    with pytest.raises(FxoptError, match=r"trace: no graph of Closed was captured, .*, got .*\nprint"):
        fxopt.trace(Closed(), {"input": torch.ones(2)})


def site(pattern: str, status: str = "rewritten", count: int = 2, module: str = "layers.0.x") -> Site:
    op = pattern if status == "rewritten" else ""
    return Site(pattern, op, count, status, module, "f.py:1", "" if op else "no reason")  # pyright: ignore[reportArgumentType]


def test_a_diff_tells_lost_gained_and_changed() -> None:
    first = Report(
        "Tiny", (site("glu"), site("rope")), regions=(RegionRecord("model", "", 1, "captured", 1),)
    )
    second = Report(
        "Tiny",
        (site("glu", "unmatched"), site("rope"), site("rms_norm")),
        regions=(RegionRecord("model", "", 1, "stock", 0, "a reason"),),
        fallbacks=(Fallback(MODEL_REGION, "a cache", 3),),
    )
    found = diff_reports(first, second)
    assert found.lost == (
        "glu x 2 at layers.0.x: was rewritten to glu, is unmatched at f.py:1: no reason",
        "model (whole model): captured -> stock, a reason",
        "calls that fell back to stock: 0 -> 3 (a cache)",
    )
    assert found.gained == ("rms_norm x 2 at layers.0.x: is rewritten to rms_norm, was not found",)
    back = diff_reports(second, first)
    assert len(back.lost) == 1
    assert len(back.gained) == 3
    assert str(diff_reports(first, first)) == "no difference\n"


def test_a_diff_tells_figures_that_changed(report_of: Explained) -> None:
    report = report_of("llama")
    graphs = tuple(
        dataclasses.replace(graph, work_after=records.Work(1, 2, 2048)) for graph in report.graphs[:1]
    )
    (planned,) = report.plans
    plans = (dataclasses.replace(planned, peak_bytes=planned.peak_bytes + 2**30),)
    found = diff_reports(
        report, dataclasses.replace(report, graphs=(*graphs, *report.graphs[1:]), plans=plans)
    )
    assert (found.lost, found.gained) == ((), ())
    block, changed_plan = found.changed
    assert re.fullmatch(r"model.layers, capture 0: \d+ kernels -> 3, .* saved -> 2.0 KiB", block)
    assert re.fullmatch(r"plan for .*, budget min, 32 tokens: .* peak -> 1\..* GiB", changed_plan)
    assert diff_reports(report, report).changed == ()


def test_the_command_exits_with_1_where_something_was_lost(
    tmp_path: Path, report_of: Explained, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = report_of("llama")
    less = dataclasses.replace(whole, sites=whole.sites[1:])
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, report in zip(paths, (whole, less), strict=True):
        path.write_text(report.to_json())
    codes: list[object] = []
    for pair in (paths, paths[::-1], (paths[0], paths[0])):
        with pytest.raises(SystemExit) as exit_info:
            main(["diff", *map(str, pair)])
        codes.append(exit_info.value.code or 0)
    assert codes == [1, 0, 0]
    printed = capsys.readouterr().out
    assert "Lost" in printed
    assert "\x1b[" not in printed, "no colour without a terminal"


def test_the_command_writes_html(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpt2.html"
    with pytest.raises(SystemExit) as exit_info:
        main(["report", "--arch", "gpt2", "--html", str(path)])
    assert not exit_info.value.code
    assert capsys.readouterr() == ("", f"fxopt report: wrote {path}\n")
    assert "GPT2LMHeadModel" in path.read_text()
    with pytest.raises(SystemExit) as exit_info:
        main(["report", "--arch", "gpt2", "--html", str(tmp_path / "no" / "such.html")])
    assert exit_info.value.code == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_noted() -> None:
    report = report_offline(Setting(None, "gpt2", "auto", batch=256, seq=1024, lora=False, device="L4"))
    assert len(report.plans) == 1
    assert re.search(
        r"does not fit: it needs \d.+ under any plan, and L4 has 2\d\.\d+ GiB free", report.notes[-1]
    )


@pytest.mark.slow
def test_a_step_that_the_model_does_not_take_is_noted_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    report = report_offline(Setting(None, "bert", "auto", batch=1, seq=600, lora=False, device="H100"))
    assert report.plans == ()
    assert report.notes[-1].startswith("no plan was made, and all figures are those of small inputs: model: ")
    assert "failed on the inputs given (input_ids, labels): " in report.notes[-1]
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_is_missing_is_told(report_of: Explained, tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "report.html"
    with pytest.raises(FxoptError, match="save_html: the file cannot be written") as error:
        report_of("llama").save_html(missing)
    assert str(missing) in str(error.value)


@pytest.mark.parametrize(
    ("asked", "limit", "words"),
    [
        ("auto", 77 * 2**30, "memory budget auto: the fastest step within 77.00 GiB"),
        ("min", 2**20, "memory budget min: as little as possible, 1.0 MiB"),
        ("auto", 2**20, "memory budget auto: as little as possible, 1.0 MiB"),
        ("None", None, "memory budget None: the fastest step, whatever it needs"),
        (str(2**30), 2**30, "memory budget 1.00 GiB: the fastest step within 1.00 GiB"),
    ],
)
def test_a_budget_is_told_in_words(report_of: Explained, asked: str, limit: int | None, words: str) -> None:
    (made,) = report_of("llama").plans
    made = dataclasses.replace(made, budget=asked, limit_bytes=limit, smallest_bytes=2**20)
    assert describe_budget(made) == words
    assert str(made).splitlines()[1] == words
    assert words in render_html(dataclasses.replace(report_of("llama"), plans=(made,)))


@pytest.mark.slow
def test_without_a_length_a_step_is_one_that_the_model_takes() -> None:
    setting = Setting(None, "bert", "auto", batch=1, seq=None, lora=False, device="H100")
    (plan,) = report_offline(setting).plans
    assert plan.tokens == 512


def test_a_terminal_of_ipython_shows_the_text(report_of: Explained) -> None:
    shown: list[str] = []
    printer = types.SimpleNamespace(text=shown.append)
    report_of("llama")._repr_pretty_(printer, False)
    assert shown == [str(report_of("llama"))]
