"""The reason of a site that was left, or rewritten in part: its own form's, what was expected, what is there, where."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.patterns import CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, RMS_NORM
from fxopt.report.records import Report, Site
from fxopt.rewriting.pattern import Call, Match

Compute = Callable[[Any, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.a, self.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.base, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight, self.number = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(1))
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.compute(self, x)


class Tower(nn.Module):
    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Block(compute) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def mish_gate(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.down(F.mish(m.gate(x)) * m.up(x))


def dropped_gate(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.down(F.dropout(F.silu(m.gate(x)), 0.1) * m.up(x))


def swish_gate(m: Any, x: torch.Tensor) -> torch.Tensor:
    gate = m.gate(x)
    return m.down(gate * torch.sigmoid(m.number * gate) * m.up(x))


def read_gate(m: Any, x: torch.Tensor) -> torch.Tensor:
    gate = F.silu(m.gate(x))
    out = m.down(gate * m.up(x))
    return out + gate.mean()


def mish_alone(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.down(F.mish(m.up(x)))


def eps_outside(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.weight * (x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-6))


def of_a_part(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.weight * (x * torch.rsqrt(x[..., :4].pow(2).mean(-1, keepdim=True) + 1e-6))


def of_length_one(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.base(m.weight * F.normalize(x, dim=-1))


def unbiased(m: Any, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return m.weight * centred / torch.sqrt(x.var(-1, keepdim=True) + 1e-6) + m.weight


def turned(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def tables(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(x.shape[1]).float()[:, None] * torch.ones(8)
    return angles.cos(), angles.sin()


def doubled_sine(m: Any, x: torch.Tensor) -> torch.Tensor:
    cos, sin = tables(x)
    q = m.base(x)
    return q * cos - turned(q) * sin * 2


def two_tensors(m: Any, x: torch.Tensor) -> torch.Tensor:
    cos, sin = tables(x)
    return m.base(x) * cos + turned(m.other(x)) * sin


def minus_adapter(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.base(x) - m.b(m.a(x)) * 2.0


def scaled_by_weight(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.base(x) + m.b(m.a(x)) * torch.sigmoid(m.number)


def report_on(model: nn.Module, *args: Any, **options: Any) -> Report:
    fxopt.optimize(model, **options)
    result = model(*args)
    (result[0] if isinstance(result, tuple) else result).sum().backward()
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    return report


def line_of(function: Callable[..., Any], text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    (place,) = (number for number, line in enumerate(lines) if text in line)
    return f"test_reasons.py:{first + place}"


@pytest.mark.parametrize(
    ("compute", "form", "reason"),
    [
        (mish_gate, "glu", "expected mul or cast or silu or gelu or pow or relu or sigmoid, got mish"),
        (
            dropped_gate,
            "glu",
            "expected mul or cast or silu or gelu or pow or relu or sigmoid, got dropout(0.1)",
        ),
        (swish_gate, "glu", "alpha: expected a number, got placeholder "),
        (mish_alone, "activation", "expected one of erf, gelu, pow, relu, sigmoid, silu, tanh, got mish"),
        (eps_outside, "rms_norm", "under sqrt: expected add, got mean"),
        (of_a_part, "rms_norm", "x: expected placeholder l_args_0_ as elsewhere, got getitem"),
        (of_length_one, "rms_norm", "expected rms_norm, got normalize"),
        (unbiased, "layer_norm", "correction of var: expected 0, got 1"),
        (doubled_sine, "rope", "expected add or sub above mul, got mul"),
        (two_tensors, "rope", "q: expected linear (linear) as elsewhere, got linear_1 (linear)"),
        (
            minus_adapter,
            "lora_linear",
            "expected one of add, cast, getitem, linear, lora_linear, mul, got sub",
        ),
        (scaled_by_weight, "lora_linear", "scale: expected a number, got sigmoid"),
    ],
)
def test_the_pattern_of_the_form_itself_says_what_it_expected(
    compute: Compute, form: str, reason: str
) -> None:
    report = report_on(Tower(compute), torch.randn(2, 4, 8))
    (site,) = report.sites
    assert (site.pattern, site.status, site.count) == (form, "unmatched", 2)
    assert site.reason.startswith(f"{form}: ")
    assert reason in site.reason
    assert [miss.pattern for miss in report.mismatches if miss.anchor == form] == [form]
    assert " ".join(site.reason.removeprefix(f"{form}: ").split()) in " ".join(report.why_not(form).split())


class Attending(nn.Module):
    """A block whose attention is torch's module, which projects and attends in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = self.attention(x, x, x, need_weights=False)[0]
        return x + self.out(attended)


def test_attention_in_one_call_with_its_projections_is_a_site_that_was_left() -> None:
    report = report_on(nn.Sequential(Attending(), Attending()), torch.randn(2, 4, 8))
    (site,) = report.sites
    assert (site.pattern, site.status, site.count) == ("attention", "unmatched", 2)
    assert site.location == line_of(Attending, "attended = ")
    assert site.reason == "attention: expected scaled_dot_product_attention, got multi_head_attention_forward"
    assert report.why_not("attention").startswith("attention: 0 of 2 sites rewritten\n")


def test_an_error_names_no_line_where_none_is_known() -> None:
    layers = (nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True) for _ in range(2))
    inputs = {"input": torch.randn(2, 4, 8)}
    with pytest.raises(fxopt.UnmatchedError, match=r"(?m)^at 0\.self_attn$"):
        fxopt.optimize(nn.Sequential(*layers), strict=True, example_inputs=inputs)


def test_a_reader_on_another_line_is_told_with_its_line() -> None:
    (site,) = report_on(Tower(read_gate), torch.randn(2, 4, 8)).sites
    assert site.location == line_of(read_gate, "out = ")
    assert site.reason == f"glu: silu is also read by mean, at {line_of(read_gate, 'gate.mean')}"


def test_a_form_whose_pattern_is_not_given_says_just_that() -> None:
    report = report_on(Tower(eps_outside), torch.randn(2, 4, 8), patterns=("glu",))
    (site,) = report.sites
    assert site.reason == "rms_norm is not among the patterns given"
    text = report.why_not("rms_norm")
    assert text.endswith(f"({site.location}) x 2\n  rms_norm is not among the patterns given\n")
    report = report_on(Tower(eps_outside), torch.randn(2, 4, 8), disable=("rms_norm",))
    assert report.why_not("rms_norm").endswith("x 2\n  rms_norm: disabled by the options\n")


class Head(nn.Module):
    def __init__(self, read: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.tower, self.head, self.read = Tower(lambda m, x: torch.tanh(m.base(x))), nn.Linear(8, 12), read

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(self.tower(x))
        loss = F.cross_entropy(logits.view(-1, 12), labels.view(-1))
        return loss + self.read(logits), logits


def entropy(logits: torch.Tensor) -> torch.Tensor:
    return (logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def loss_site(report: Report) -> Site:
    (site,) = (site for site in report.sites if site.pattern == "linear_cross_entropy")
    assert (site.op, site.status) == ("cross_entropy", "rewritten")
    return site


class Losing(nn.Module):
    def __init__(self, lose: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.tower, self.head, self.lose = Tower(lambda m, x: torch.tanh(m.base(x))), nn.Linear(8, 12), lose
        self.balance = nn.Buffer(torch.rand(12))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.lose(self, self.head(self.tower(x)), labels)


def balanced(m: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.view(-1, 12), labels.view(-1), weight=m.balance)


def viewed(m: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(F.log_softmax(logits, -1).view(-1, 12), labels.view(-1))


def gathered(m: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -F.log_softmax(logits, -1).gather(-1, labels[..., None]).mean()


def one_hot(m: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -(F.one_hot(labels, 12) * logits.log_softmax(-1)).sum(-1).mean()


def soft(m: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -(m.balance.softmax(-1).expand(2, 4, 12) * logits.log_softmax(-1)).sum(-1).mean()


def teacher(m: Any, labels: torch.Tensor) -> torch.Tensor:
    return (F.one_hot(labels, 12) + m.balance).softmax(-1)


def distilled(m: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.kl_div(logits.log_softmax(-1), teacher(m, labels), reduction="batchmean")


def two_terms(m: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.view(-1, 12), labels.view(-1)) + distilled(m, logits, labels)


@pytest.mark.parametrize(
    ("lose", "reason"),
    [
        (balanced, "weight of cross_entropy: expected None, got placeholder "),
        (viewed, "expected cross_entropy, got nll_loss"),
        (gathered, "expected cross_entropy, got gather"),
        (one_hot, "expected cross_entropy, got log_softmax times a one-hot"),
        (soft, "expected cross_entropy, got log_softmax times soft labels"),
        (distilled, "expected cross_entropy, got kl_div"),
    ],
)
def test_a_loss_of_another_form_is_told_by_the_one_thing_that_differs(lose: Any, reason: str) -> None:
    (site,) = report_on(Losing(lose), torch.randn(2, 4, 8), torch.randint(0, 12, (2, 4))).sites
    assert (site.pattern, site.status) == ("linear_cross_entropy", "unmatched")
    assert site.reason.startswith(f"linear_cross_entropy: {reason}")
    assert site.location == line_of(lose, "return ")


def test_the_second_of_two_losses_is_told_beside_the_one_that_is_rewritten() -> None:
    report = report_on(Losing(two_terms), torch.randn(2, 4, 8), torch.randint(0, 12, (2, 4)))
    labelled, distance = report.sites
    assert (labelled.status, distance.status) == ("rewritten", "unmatched")
    assert distance.reason == "linear_cross_entropy: expected cross_entropy, got kl_div"
    assert distance.location == line_of(distilled, "return ")


def biased(m: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = logits + m.balance
    return F.cross_entropy(logits.view(-1, 12), labels.view(-1))


def weighed(m: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = logits * m.balance
    return F.cross_entropy(logits.view(-1, 12), labels.view(-1))


def masked(m: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = logits.masked_fill(m.balance > 2, -1e4)
    return F.cross_entropy(logits.view(-1, 12), labels.view(-1))


def rectified(m: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.relu(logits)
    return F.cross_entropy(logits.view(-1, 12), labels.view(-1))


@pytest.mark.parametrize(
    ("lose", "got"),
    [(biased, "add"), (weighed, "placeholder "), (masked, "masked_fill(-10000.0)"), (rectified, "relu")],
)
def test_a_loss_without_its_head_says_what_stands_between_the_two(lose: Any, got: str) -> None:
    report = report_on(Losing(lose), torch.randn(2, 4, 8), torch.randint(0, 12, (2, 4)))
    site = loss_site(report)
    assert f", got {got}" in site.reason
    assert site.location == line_of(lose, "return ")
    assert site.reason.endswith(f", at {line_of(lose, 'logits = ')}")
    assert "became only cross_entropy" in report.why_not("linear_cross_entropy")


def test_a_loss_without_its_head_says_who_reads_the_logits() -> None:
    x, labels = torch.randn(2, 4, 8), torch.randint(0, 12, (2, 4))
    report = report_on(Head(entropy), x, labels)
    site = loss_site(report)
    assert site.reason == (
        "linear_cross_entropy: linear is also read by softmax, expected only the graph's output, "
        f"at {line_of(entropy, 'softmax')}"
    )
    told = " ".join(str(report).split())
    assert (
        f"Rewritten in part linear_cross_entropy became only cross_entropy at (the model itself) ({site.location})"
        in told
    )
    assert site.reason in told
    why = report.why_not("linear_cross_entropy")
    assert why.startswith("linear_cross_entropy: 1 of 1 sites rewritten, 1 in part\n")
    assert "became only cross_entropy" in why
    assert "is also read by softmax" in why
    disabled = report_on(Head(entropy), x, labels, disable=("linear_cross_entropy",))
    assert loss_site(disabled).reason == "linear_cross_entropy: disabled by the options"


def test_a_head_whose_proof_fails_is_told_beside_the_loss_that_was_taken() -> None:
    def replace(m: Match) -> Call:
        made = LINEAR_CROSS_ENTROPY.replace(m)
        assert isinstance(made, Call)
        return dataclasses.replace(made, kwargs={**made.kwargs, "scale": 2.0})

    wrong = dataclasses.replace(LINEAR_CROSS_ENTROPY, replace=replace)
    x, labels = torch.randn(2, 4, 8), torch.randint(0, 12, (2, 4))
    model = Head(lambda logits: logits.new_zeros(()))
    report = report_on(model, x, labels, patterns=(wrong, CROSS_ENTROPY))
    site = loss_site(report)
    assert site.reason.startswith("linear_cross_entropy: the whole form matches, and is refused: ")
    assert re.search(r": error \d\.\d\de[+-]\d\d, allowed \d\.\d\de[+-]\d\d", site.reason)
    (miss,) = (miss for miss in report.mismatches if miss.pattern == "linear_cross_entropy")
    assert miss.anchor == "linear_cross_entropy"
    assert "refused" in report.why_not("linear_cross_entropy")


def norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.base(m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))


def test_a_form_that_one_of_the_users_own_took_is_not_told_as_taken_in_part() -> None:
    own = dataclasses.replace(RMS_NORM, name="my_norm")
    report = report_on(Tower(norm), torch.randn(2, 4, 8), patterns=(own, RMS_NORM), disable=("rms_norm",))
    (site,) = report.sites
    assert (site.pattern, site.op, site.status, site.reason) == ("rms_norm", "rms_norm", "rewritten", "")
    report = report_on(Tower(norm), torch.randn(2, 4, 8), patterns=(own,))
    assert [site.reason for site in report.sites] == [""]


def test_a_loss_with_its_head_and_norms_taken_with_a_sum_have_no_reason() -> None:
    x, labels = torch.randn(2, 4, 8), torch.randint(0, 12, (2, 4))
    report = report_on(Head(lambda logits: logits.new_zeros(())), x, labels)
    assert {(site.op, site.reason) for site in report.sites} == {("linear_cross_entropy", "")}
    assert "Rewritten in part" not in str(report)
