"""Outputs that transformers collects inside blocks (router logits, hidden states, attentions): blocks stay compiled."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import output_capturing

import fxopt
from fxopt.coverage.shrink import tiny_config

SHAPE = (2, 17)
ROUTED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "jetmoe", "dbrx")
"""jetmoe chooses heads by a router too, so that two of a block are collected; dbrx is captured in pieces."""
QUICK = ("mixtral",)
EXHAUSTIVE = ("qwen3_moe", "olmoe", "granitemoe")
"""Collected as in qwen2_moe."""


def make(arch: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = tiny_config(arch)
    for name, value in fields.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config).train()


def check(tools: Any, model: Any, stock: Any, device: str = "cpu", **asked: Any) -> Any:
    """Return the output of a step that equals stock's: loss, gradients, whatever is collected."""
    batch = {**tools.make_batch(SHAPE, padded="left", device=device), **asked}
    ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
    assert tools.relative(ours.loss, theirs.loss) < 1e-6
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert tools.relative(ours.gradients[name], gradient) < 1e-5, name
    output, expected = model(**batch), stock(**batch)
    for key in ("router_logits", "hidden_states", "attentions"):
        values, references = output.get(key) or (), expected.get(key) or ()
        assert len(values) == len(references), key
        for value, reference in zip(values, references, strict=True):
            assert (value is None) == (reference is None)
            assert value is None or tools.relative(value, reference) < 1e-5, key
    if expected.get("aux_loss") is not None:
        assert tools.relative(output.aux_loss, expected.aux_loss) < 1e-6
    return output


def assert_all_rewritten(model: Any) -> None:
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert report.sites
    assert {site.status for site in report.sites} == {"rewritten"}


@pytest.mark.parametrize(
    "arch",
    [
        arch
        if arch in QUICK
        else pytest.param(arch, marks=pytest.mark.exhaustive if arch in EXHAUSTIVE else pytest.mark.slow)
        for arch in ROUTED
    ],
)
def test_router_logits_and_their_loss_equal_stock_and_all_is_rewritten(arch, device, tools) -> None:
    model = make(arch, output_router_logits=True).to(device)
    stock = copy.deepcopy(model)
    try:
        returned = stock(**tools.make_batch(SHAPE, padded="none", device=device))
        if returned.router_logits is None:  # jetmoe of transformers 5.17, whatever is asked for
            pytest.skip(f"stock {arch} of transformers {transformers.__version__} returns no router logits")
    except (
        AttributeError
    ) as error:  # granitemoe of transformers 5.17 takes the loss of no router for a tensor
        pytest.skip(f"stock {arch} of transformers {transformers.__version__} cannot run: {error}")
    fxopt.optimize(model)
    output = check(tools, model, stock, device)
    assert len(output.router_logits) > 0
    assert float(output.aux_loss) > 0
    assert_all_rewritten(model)


@pytest.mark.slow
def test_the_loss_that_balances_trains_the_routers(tools) -> None:
    """What the tests above rest on: without it the gradients are others."""
    steps: list[Any] = []
    for asked in (False, True):
        model = fxopt.optimize(make("mixtral", output_router_logits=asked, router_aux_loss_coef=1.0))
        steps.append(tools.run_step(model, tools.make_batch(SHAPE, padded="none", device="cpu")))
    name = next(name for name in steps[0].gradients if name.endswith("gate.weight"))
    assert tools.relative(steps[0].gradients[name], steps[1].gradients[name]) > 0.1


def test_logits_stay_lazy_beside_the_loss_that_balances(tools) -> None:
    """That loss counts in place; nothing that computes the logits reads what it writes to."""
    model = fxopt.optimize(make("mixtral", output_router_logits=True))
    output = model(**tools.make_batch(SHAPE, padded="left", device="cpu"))
    assert output.logits.is_lazy


@pytest.mark.slow
def test_what_is_asked_for_may_change_from_call_to_call(tools) -> None:
    model = make("mixtral")
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    for asked in ({}, {"output_router_logits": True}, {}, {"output_hidden_states": True}):
        check(tools, model, stock, **asked)
    assert_all_rewritten(model)


@pytest.mark.parametrize(
    ("checkpointed", "options"),
    [
        pytest.param(True, {}, marks=pytest.mark.slow),
        pytest.param(False, {"memory_budget": "min"}, marks=pytest.mark.slow),
        pytest.param(True, {"memory_budget": None}, marks=pytest.mark.exhaustive),
        pytest.param(False, {}, marks=pytest.mark.exhaustive),
        pytest.param(False, {"memory_budget": None}, marks=pytest.mark.exhaustive),
        pytest.param(True, {"memory_budget": "min"}, marks=pytest.mark.exhaustive),
    ],
)
def test_router_logits_are_collected_once_under_every_plan(options, checkpointed, tools) -> None:
    model = make("mixtral", output_router_logits=True)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stock = copy.deepcopy(model)
    fxopt.optimize(model, **options)
    check(tools, model, stock)
    assert_all_rewritten(model)


@pytest.mark.slow
def test_under_reentrant_checkpointing_the_loss_that_balances_still_trains(tools) -> None:
    """Stock runs such blocks without grad, so that what is collected in them has none and trains no router."""
    stock = make("mixtral", output_router_logits=True)
    model = copy.deepcopy(stock)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    fxopt.optimize(model)
    check(tools, model, stock)
    assert_all_rewritten(model)


@pytest.mark.parametrize("asked", [True, pytest.param([1, -1], marks=pytest.mark.slow)])
def test_hidden_states_equal_stock_and_all_is_rewritten(asked, tools) -> None:
    model = make("llama")
    stock = copy.deepcopy(model)
    if asked is not True and not hasattr(output_capturing, "selected_hidden_states"):
        pytest.skip(f"transformers {transformers.__version__} selects no hidden states")
    fxopt.optimize(model)
    assert len(check(tools, model, stock, output_hidden_states=asked).hidden_states) == 5
    assert_all_rewritten(model)


def test_attentions_leave_attention_as_it_is_and_the_report_says_why(tools) -> None:
    model = make("llama")
    model.set_attn_implementation("eager")
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    assert len(check(tools, model, stock, output_attentions=True).attentions) == 4
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    left = {site.pattern: site.reason for site in report.sites if site.status != "rewritten"}
    assert set(left) == {"attention"}
    assert left["attention"].startswith("attention: softmax is also returned")


class Picker(nn.Module):
    """A router of a model's own: what it scores stands second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Linear(width, 4, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.table(x)
        return scores.softmax(-1), scores


class Layer(nn.Module):
    """A block that picks twice, and returns a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.picker = nn.RMSNorm(width), Picker(width)
        self.work = nn.Linear(width, 4 * width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        for _ in range(2):
            shares, _ = self.picker(self.norm(x))
            x = x + (self.work(x).unflatten(-1, (4, -1)) * shares[..., None]).sum(-2)
        return x, None


class PickConfig(PretrainedConfig):
    """Nothing of its own."""

    model_type = "fxopt_pick"


@dataclasses.dataclass
class Picked(transformers.utils.ModelOutput):
    """The loss and what was collected."""

    loss: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    picks: tuple[torch.Tensor, ...] | None = None


class Trunk(PreTrainedModel):
    """Collects under a name of its own."""

    config_class = PickConfig
    _can_record_outputs: ClassVar = {"picks": output_capturing.OutputRecorder(Picker, index=1)}

    def __init__(self, config: PickConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(256, 32)
        self.rungs = nn.ModuleList(Layer(32) for _ in range(3))
        self.post_init()

    @output_capturing.capture_outputs
    def forward(self, input_ids: torch.Tensor, **_: Any) -> Picked:
        x = self.table(input_ids)
        for rung in self.rungs:
            x, _ = rung(x)
        return Picked(last_hidden_state=x)


class Pick(PreTrainedModel):
    """Its loss reads what was collected."""

    config_class = PickConfig

    def __init__(self, config: PickConfig) -> None:
        super().__init__(config)
        self.inner = Trunk(config)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Picked:
        out = self.inner(input_ids, output_picks=True)
        logits = F.linear(out.last_hidden_state, self.inner.table.weight)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten())
        spread = torch.stack([scores.square().mean() for scores in out.picks]).sum()
        return Picked(loss=loss + 0.1 * spread, picks=out.picks)


def test_what_a_model_of_ones_own_collects_from_its_parts_is_collected(device, tools) -> None:
    """Nothing asks for it from outside, so that it is seen only where the model is captured."""
    torch.manual_seed(0)
    stock = Pick(PickConfig()).train().to(device)
    model = fxopt.optimize(copy.deepcopy(stock))
    output = check(tools, model, stock, device)
    assert len(output.picks) == 6
    assert_all_rewritten(model)


def retain_and_step(model: Any, batch: dict[str, Any], name: str) -> tuple[torch.Tensor | None, ...]:
    """Return what gradients the values collected under `name` have kept after a step."""
    output = model(**batch)
    collected = output[name]
    for value in collected:
        value.retain_grad()
    weights = torch.linspace(-1, 1, output.last_hidden_state.numel()).reshape(output.last_hidden_state.shape)
    (output.last_hidden_state * weights).sum().backward()
    return tuple(value.grad for value in collected)


def test_hidden_states_retain_their_gradients(tools) -> None:
    """They are what the blocks were given and returned, no views of these."""
    torch.manual_seed(0)
    stock = transformers.AutoModel.from_config(tiny_config("llama")).train()
    model = fxopt.optimize(copy.deepcopy(stock))
    batch = {"input_ids": torch.randint(0, 100, SHAPE), "output_hidden_states": True}
    ours, theirs = (
        retain_and_step(model, batch, "hidden_states"),
        retain_and_step(stock, batch, "hidden_states"),
    )
    assert len(ours) == len(theirs) == 5
    for gradient, reference in zip(ours, theirs, strict=True):
        assert gradient is not None
        assert reference is not None
        assert tools.relative(gradient, reference) < 1e-5
    assert_all_rewritten(model)


@pytest.mark.slow
def test_attentions_that_retain_their_gradients_are_refused_as_these_would_be_partial() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(tiny_config("llama"), attn_implementation="eager").train()
    fxopt.optimize(model)
    batch = {"input_ids": torch.randint(0, 100, SHAPE), "output_attentions": True}
    with pytest.raises(
        fxopt.FxoptError, match=r"^layers: retain_grad\(\) on a value from inside a compiled region"
    ):
        retain_and_step(model, batch, "attentions")
    fxopt.restore(model)
    assert all(gradient is not None for gradient in retain_and_step(model, batch, "attentions"))
