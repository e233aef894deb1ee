"""The command line: its messages, its exit codes, and the demo at a small size."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import fxopt
from fxopt.cli import main
from fxopt.demo.comparison import Comparison, find_failures, largest_difference
from fxopt.demo.corpus import make_batches, read_corpus, train_tokenizer
from fxopt.demo.models import MOST_PARAMETERS, build_small_model
from fxopt.demo.training import Run, count_saved_bytes
from fxopt.report.records import Fallback, Report, Site

REWRITTEN = Report("Tiny", sites=(Site("glu", "glu", 1, "rewritten", "mlp", "tiny.py:1"),))


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    code = exit_info.value.code
    return 0 if code is None else int(code)


def make_run(*losses: float, saved_bytes: int = 10) -> Run:
    return Run(losses, tuple(1.0 for _ in losses), saved_bytes)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "qwen2_moe", "deepseek_v3"])
def test_demo_models_are_small_however_their_configs_name_sizes(arch: str) -> None:
    number = sum(parameter.numel() for parameter in build_small_model(arch, 4096).parameters())
    assert 3_000_000 < number <= MOST_PARAMETERS


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("fxopt 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--arch", "lama"), "unknown model type 'lama'.* llama"),
        pytest.param(
            ("demo", "--arch", "llama4"),
            r"llama4: the smallest model .* has 10\d,\d+ M parameters, expected at most 25 M.*\nchoose another",
            marks=pytest.mark.slow,
        ),
        (("plan", "--arch", "llama", "--4bit"), "--4bit: four-bit weights are not trained"),
        (("plan", "--arch", "llama", "--host-memory", "much"), "--host-memory: expected bytes"),
        (
            ("plan", "--arch", "llama", "--out", "gone/plan.png"),
            "--out: .* no such folder.*\n.*fxopt-plan.png here",
        ),
        (("plan", "--arch", "llama", "--out", "plan.csv"), "--out: .* ends in one of .png.*, got plan.csv"),
        (("plan", "--arch", "llama", "--out", "."), "--out: expected a file to write, got the folder ."),
        (("plan",), "plan: which model is not clear.*got neither"),
        (
            ("plan", "--arch", "llama", "--device", "TPU"),
            "unknown GPU 'TPU', expected one of H100, H200, A100, 4090, L4",
        ),
        (
            ("plan", "--arch", "llama", "--budget", "12 potatoes"),
            "expected bytes, a size like .*, got '12 potatoes'",
        ),
        (
            ("trace", "--arch", "llama", "--set", "hidden_act=nosuch"),
            "llama: cannot be built from this config, .*KeyError: 'nosuch'.*\nchange the config",
        ),
        (("plan", "--arch", "llama", "--budget", "inf"), "expected bytes, a size like .*, got 'inf'"),
        (("demo", "--dtype", "int8"), "unknown name 'int8', expected one of fp32, bf16, fp16"),
        (("demo", "--device", "meta"), "a model on meta has no weights"),
        (
            ("demo", "--device", "nowhere"),
            "'nowhere' cannot be used here, expected a device that torch sees: .*\n.*give cpu",
        ),
        (("demo", "--steps", "1"), "expected at least 2, got 1"),
        (("demo", "--out", "/no/such/folder/plot.png"), "no such folder: /no/such/folder\nmake that folder"),
        (
            ("demo", "--out", "curves.foo"),
            "ends in one of .png, .pdf, .svg, got curves.foo\nit is for a plot: fxopt-demo.png",
        ),
        (("trace",), "trace: which model is not clear, expected a path or hub name, .*, got neither\ntry"),
        (
            ("trace", __file__),
            "test_cli.py: a Python file, expected a folder with .*\nof a model of your own, print",
        ),
        (("report", __file__), "test_cli.py: a Python file, expected a folder with a config.json"),
        (("diff", "/no/a.json", "/no/b.json"), "/no/a.json: cannot be read: .*\ngive a file"),
        (("bisect", "/no/script.py"), "/no/script.py: no such Python file\ngive"),
        (("report",), "expected a path or hub name, or --arch MODEL_TYPE, got neither\ntry"),
        (("report", "x", "--arch", "llama"), "got 'x' and --arch llama\ntry"),
        (
            ("report", "--arch", "qwen2", "--arch", "llama"),
            "got --arch qwen2 and --arch llama\ntry fxopt report --arch qwen2",
        ),
        (("report", "--arch", "t5"), "t5: transformers has no causal language model .*, expected .*\nchoose"),
        (("report", "/no/such/model"), "/no/such/model: no such folder or file"),
        (("report", "nobody/nothing"), "nobody/nothing: no model config found under this hub name"),
    ],
)
def test_mistakes_end_in_one_message_and_exit_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 2
    assert error.startswith("fxopt: ")
    assert re.search(message, error), error


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["", pytest.param("graph_breaks", marks=pytest.mark.exhaustive)])
def test_nothing_of_dynamos_is_printed_before_a_mistake_unless_asked_for(asked: str) -> None:
    command = "from fxopt.cli import main; main(['trace', '--arch', 'gptj', '--set', 'rotary_dim=300'])"
    environment = {**os.environ, "TORCH_LOGS": asked} if asked else os.environ
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "fxopt: model: GPTJForCausalLM, without weights, failed on small inputs" in done.stderr
    assert (len(done.stderr.splitlines()) == 2) == (not asked), done.stderr
    assert ("Traceback" in done.stderr) == bool(asked)


@pytest.mark.slow
def test_a_model_that_asks_for_values_is_traced_as_a_small_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trace", "--arch", "jetmoe") == 0
    code = capsys.readouterr().out
    assert code.startswith(
        "# of a small model of this config with random values, its layers fewer: model: JetMoe"
    )
    assert re.search(r"= torch.rsqrt\(\w+\)  # f32\[2, 16, 1\], modeling_jetmoe.py:\d+", code)
    names: dict[str, Any] = {}
    exec(code, names)
    assert {"block", "tail"} <= set(names)


def test_a_folder_without_a_config_is_said_plainly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", tmp_path) == 2
    assert "no model config found there" in capsys.readouterr().err


@pytest.mark.slow
def test_report_of_a_folder_and_of_a_model_type_are_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig

    def report(*arguments: str | Path) -> dict[str, Any]:
        assert run("report", *arguments, "--json") == 0
        records: dict[str, Any] = json.loads(capsys.readouterr().out)
        for measured in (records, *records["graphs"]):
            for record in measured["passes"]:
                del record["time_ms"]  # a clock's, not the config's
        for region in records["regions"]:
            # Dynamo's guards name objects by where they lie in memory, and the globals they read by number.
            region["guards"] = len(region["guards"])
        return records

    LlamaConfig().save_pretrained(tmp_path)  # what the model type means: its default config
    of_folder, of_type = report(tmp_path), report("--arch", "llama")
    assert of_folder == of_type
    assert of_folder["model"] == "LlamaForCausalLM"
    assert LlamaConfig().num_hidden_layers in {site["count"] for site in of_folder["sites"]}


def test_demo_holds_and_saves_its_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "curves.png"
    assert run("demo", "--steps", "7", "--out", plot) == 0
    output = capsys.readouterr().out
    assert "nothing about speed" in output
    lines = re.findall(r"^optimized: step (\d) of 7, loss ", output, re.M)
    assert lines == ["2", "3", "4", "5", "6", "7"], "no bar moves in a file"
    assert output.rstrip().endswith("fxopt demo: passed")
    assert "not known" not in output, "the report says what each layer launches and saves"
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--dtype", "bf16", "--steps", "2"), marks=pytest.mark.exhaustive),
        ("--arch", "gemma2", "--steps", "6"),
    ],
)
def test_demo_holds_with_other_options(options: tuple[str, ...], tmp_path: Path) -> None:
    assert run("demo", *options, "--out", tmp_path / "curves.png") == 0


@pytest.mark.exhaustive
def test_demo_holds_at_full_length(tmp_path: Path) -> None:
    assert run("demo", "--out", tmp_path / "curves.png") == 0


@pytest.mark.slow
def test_demo_fails_when_the_optimized_model_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(model: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        return model

    monkeypatch.setattr(fxopt, "optimize", spoil)
    monkeypatch.setattr(fxopt, "explain", lambda model: REWRITTEN)
    assert run("demo", "--steps", "2", "--out", tmp_path / "curves.png") == 1
    assert "the losses differ by" in capsys.readouterr().err


def test_failures_name_each_thing_that_does_not_hold() -> None:
    same = Comparison(make_run(2.0, 1.0), make_run(2.0, 1.0))
    assert find_failures(same, REWRITTEN) == []
    bad = Comparison(make_run(2.0, 1.0), make_run(2.0, 1.1, saved_bytes=11))
    report = Report("Tiny", fallbacks=(Fallback("block", "a hook", 3),))
    failures = find_failures(bad, report)
    assert [failure.split()[0] for failure in failures] == ["the", "3", "no", "the"]


def test_a_loss_that_is_nan_in_one_run_fails() -> None:
    comparison = Comparison(make_run(2.0, 1.0), make_run(2.0, float("nan")))
    assert find_failures(comparison, REWRITTEN) != []


def test_in_bf16_the_median_step_is_judged_by_stocks_own_difference_to_fp32() -> None:
    reference, stock = make_run(2.0, 1.0, 1.0), make_run(2.0, 1.01, 1.01)
    tolerance = Comparison(stock, make_run(2.0, 1.02, 1.0), reference).tolerance
    assert tolerance == pytest.approx(2 * largest_difference(stock, reference))
    assert find_failures(Comparison(stock, make_run(2.0, 1.015, 1.5), reference), REWRITTEN) == []
    assert find_failures(Comparison(stock, make_run(2.0, 1.03, 1.03), reference), REWRITTEN) != []
    assert find_failures(Comparison(stock, make_run(2.0, 1.0, float("nan")), reference), REWRITTEN) != []


def test_saved_bytes_count_each_storage_once_and_no_parameters() -> None:
    layer = torch.nn.Linear(8, 8)
    x = torch.ones(4, 8, requires_grad=True)
    with count_saved_bytes(layer) as saved:
        y = layer(x)  # saves x and the weight
        (y.exp() + y[:2].exp().sum()).sum()  # saves both results of exp
    assert saved.total == 4 * (4 * 8 + 4 * 8 + 2 * 8)


def test_counted_bytes_are_not_held_by_what_counts_them() -> None:
    x = torch.ones(4, 8, requires_grad=True)
    with count_saved_bytes(torch.nn.Identity()):
        y = x.exp().exp()  # its graph saves the result that belongs to it
    held = StorageWeakRef(y.untyped_storage())
    del y
    assert held.expired()


def test_tokens_decode_to_the_text() -> None:
    text = read_corpus()[:20_000]
    tokenizer = train_tokenizer(text, 512)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_batches_follow_the_seed() -> None:
    tokens = torch.arange(1000)
    first, again, other = (
        make_batches(tokens, num_batches=2, batch_size=3, length=8, seed=seed) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (3, 8)


def test_a_plan_from_a_config_is_printed_drawn_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)
    config = {"model_type": "llama", "vocab_size": 512, "num_key_value_heads": 2, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "curve.png"
    assert run("plan", tmp_path, "--budget", "min", "--batch", "2", "--seq", "512", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM on H100, lowering inductor, 1024 tokens a call" in printed
    step, parts = re.search(
        r"^step (\d+\.\d) ms: (.*, \d+\.\d ms waiting for launches)$", printed, re.M
    ).groups()
    numbers = [float(number) for number in re.findall(r"(\d+\.\d) ms", parts)]
    assert sum(numbers) == pytest.approx(float(step), abs=0.05 * (len(numbers) + 1)), "each is rounded"
    assert "recomputed" in printed
    assert out.read_bytes().startswith(b"\x89PNG")
    header, *lines = out.with_suffix(".csv").read_text().splitlines()
    assert header.startswith("budget,peak_bytes,residual_bytes,step_ms")
    peaks = [int(line.split(",")[1]) for line in lines]
    times = [float(line.split(",")[3]) for line in lines]
    assert peaks == sorted(peaks)
    assert times == sorted(times, reverse=True)
    assert peaks[0] < peaks[-1]


@pytest.mark.slow
def test_a_plan_with_four_bit_weights_is_made_without_any_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    config = {"model_type": "llama", "vocab_size": 512, "num_key_value_heads": 2, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plans = []
    for more in ((), ("--4bit",), ("--4bit", "--host-memory", "1GiB")):
        out = tmp_path / "curve.png"
        size = ("--budget", "min", "--batch", "2", "--seq", "512", "--out", out)
        assert run("plan", tmp_path, "--lora", *more, *size, "--json") == 0
        plans.append(json.loads(capsys.readouterr().out))
    # per block: q and o 256 x 256, k and v 256 x 128, three of 256 x 512; a scale per 64, one per 256 of these
    weights = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    packed = weights / 2 + weights / 64 + weights / 64 / 256 * 4
    saved = plans[0]["static_bytes"] - plans[1]["static_bytes"]
    assert saved == pytest.approx(2 * weights - packed, rel=0.05)
    assert any(
        "dequantize" in r["op"] or "lora_linear" in r["op"] for r in plans[1]["decisions"][0]["recomputed"]
    )
    assert not any(decision["offloaded_bytes"] for decision in plans[1]["decisions"])
    assert any(decision["offloaded_bytes"] for decision in plans[2]["decisions"])
    assert plans[2]["peak_bytes"] <= plans[1]["peak_bytes"]


def test_a_page_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxopt.offline.report_offline", lambda setting: pytest.fail("the work was done"))
    with pytest.raises(SystemExit) as exit_info:
        main(["report", "--arch", "llama", "--html", str(tmp_path / "gone" / "page.html")])
    assert exit_info.value.code == 2
    assert "page.html: cannot be written: No such file" in capsys.readouterr().err
