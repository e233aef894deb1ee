"""Models whose way to their blocks hangs on values, as those with images: captured behind their backbone."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.capture import torch_settings
from fxopt.capture.behind import find_backbone
from fxopt.capture.installation import find_installation
from fxopt.capture.torch_dynamo import isolate
from fxopt.capture.torch_modules import CALL, SLOT
from fxopt.coverage.inputs import make_batch
from fxopt.coverage.shrink import tiny_config
from fxopt.report.records import MODEL_REGION
from tests.models.backbones import CLASSES, WIDTH, Model, Output, batch_of, check, make


def captures_of_model(report: fxopt.Report) -> int:
    (region,) = (region for region in report.regions if region.kind == "model")
    return region.captures


def forms(report: fxopt.Report) -> dict[str, int]:
    found: dict[str, int] = {}
    for site in report.sites:
        assert site.status == "rewritten", site
        found[site.pattern] = found.get(site.pattern, 0) + site.count
    return found


@pytest.mark.parametrize("returned", ["tensor", "tuple"])
def test_head_and_loss_are_captured_behind_the_backbone(returned: str, tools: Any) -> None:
    model, stock = make(returned=returned)
    fxopt.optimize(model)
    for length in (12, 12, 20, 9):
        check(tools, model, stock, batch_of(length))
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert forms(report) == {"rms_norm": 3, "glu": 3, "linear_cross_entropy": 1}
    (note,) = (note for note in report.notes if "behind its Trunk" in note)
    assert "stands in that around the blocks runs stock: what is computed depends on the values" in note
    assert captures_of_model(report) <= 2, "one of a size and one of all"
    assert not {SLOT, CALL} & model.trunk.__dict__.keys()
    batch = batch_of()
    assert torch.allclose(model(**batch).logits, stock(**batch).logits, atol=1e-6)


def test_calls_that_can_be_captured_whole_still_are(tools: Any) -> None:
    model, stock = make()
    fxopt.optimize(model)
    for images in (False, True, False, True):
        check(tools, model, stock, batch_of(images=images))
    assert fxopt.explain(model).fallbacks == ()
    check(tools, model, stock, batch_of(images=False))
    assert forms(fxopt.explain(model))["rms_norm"] == 4, "the last one too"
    assert captures_of_model(fxopt.explain(model)) <= 3, (
        "behind, and whole with leaves that hand on less and more"
    )


@pytest.mark.parametrize(
    "options", [{"before": "random"}, {"before": "state"}, {"again": True}, {"returned": "own"}], ids=str
)
def test_what_stands_before_the_backbone_is_done_once(options: dict[str, Any], tools: Any) -> None:
    model, stock = make(**options)
    fxopt.optimize(model)
    for _ in range(3):
        torch.manual_seed(3)
        ours = tools.run_step(model, batch_of())
        torch.manual_seed(3)
        theirs = tools.run_step(stock, batch_of())
        assert tools.relative(ours.loss, theirs.loss) < 1e-5
        assert tools.relative(ours.gradients["head.weight"], theirs.gradients["head.weight"]) < 1e-4
    assert model.count == stock.count
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert forms(report)["linear_cross_entropy"] == 1


def test_lazy_logits_are_those_of_training_calls_alone(tools: Any) -> None:
    model, stock = make()
    fxopt.optimize(model)
    batch = batch_of()
    for training in (False, True, False):
        model.train(training)
        stock.train(training)
        check(tools, model, stock, batch)
        logits = model(**batch).logits
        assert (type(logits) is torch.Tensor) is not training
        assert torch.allclose(logits + 0, stock(**batch).logits, atol=1e-6)


def test_another_module_in_the_place_of_the_backbone_is_the_backbone(tools: Any) -> None:
    model, stock = make()
    fxopt.optimize(model)
    check(tools, model, stock, batch_of())
    layers, model.trunk = model.trunk.layers, copy.deepcopy(stock.trunk)
    model.trunk.layers = layers
    check(tools, model, stock, batch_of())


def test_a_mistake_in_a_piece_is_raised(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Dynamo passes over a frame of the same code ever after.
    own = type("Mistaken", (Model,), {"forward": isolate(Model.forward)})
    torch.manual_seed(0)
    model = own().train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    installation = find_installation(model)
    assert installation is not None
    behind = installation.model_call.behind  # type: ignore[union-attr]

    def fail(*_: Any) -> Any:
        raise fxopt.FxoptError("a mistake")

    monkeypatch.setattr(behind, "_backend", fail)
    with pytest.raises(fxopt.FxoptError, match="a mistake"):
        model(**batch_of())
    monkeypatch.undo()
    check(tools, model, stock, batch_of())


class Looking(Model):
    """A model that looks at a value between its head and its loss."""

    def forward(
        self, ids: torch.Tensor, images: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> Output:
        logits = self.head(self.trunk(ids, images))
        if logits.detach().isnan().any().item():
            raise ValueError("logits are no numbers")
        return Output(loss=F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1)), logits=logits)


def test_pieces_behind_the_backbone_say_where_they_break(tools: Any) -> None:
    torch.manual_seed(0)
    model = Looking().train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    for length in (12, 12, 9):
        check(tools, model, stock, batch_of(length))
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert forms(report) == {"rms_norm": 3, "glu": 3, "cross_entropy": 1}
    assert "breaks into pieces: what is computed depends on the values of a tensor" in str(report)
    assert not any("no loss" in note for note in report.notes)
    batch = batch_of()
    assert torch.allclose(model(**batch).logits, stock(**batch).logits, atol=1e-6)


def test_hooks_in_the_backbone_run_and_one_on_the_head_sends_calls_to_stock(tools: Any) -> None:
    model, stock = make()
    fxopt.optimize(model)
    seen: list[str] = []
    for each in (model, stock):
        each.trunk.norm.register_forward_hook(lambda *_: seen.append("norm"))
        each.trunk.register_forward_hook(lambda *_: seen.append("trunk"))
    check(tools, model, stock, batch_of())
    assert seen == ["norm", "trunk"] * 2
    assert fxopt.explain(model).fallbacks == ()
    handle = model.head.register_forward_hook(lambda *_: seen.append("head"))
    check(tools, model, stock, batch_of())
    assert seen.count("head") == 1
    (fallback,) = fxopt.explain(model).fallbacks
    assert "a hook sits on the Linear, outside the Trunk trunk; at head (test_backbone.py:" in fallback.reason
    handle.remove()
    check(tools, model, stock, batch_of())
    assert fxopt.explain(model).fallbacks == (fallback,)


def test_a_users_mistake_is_raised_and_the_next_call_is_served(tools: Any) -> None:
    model, stock = make()
    fxopt.optimize(model)
    wrong = batch_of() | {"images": torch.randn(3, WIDTH)}
    with pytest.raises(ValueError, match="as many images as places"):
        model(**wrong)
    check(tools, model, stock, batch_of())
    with pytest.raises(ValueError, match="as many images as places"):
        model(**wrong)
    check(tools, model, stock, batch_of())
    assert fxopt.explain(model).fallbacks == ()


@pytest.mark.parametrize("first", ["wrong", "right"])
@pytest.mark.parametrize("images", [True, False], ids=["with images", "text"])
def test_labels_that_do_not_fit_are_no_obstacle_to_others(
    first: str, images: bool, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a loss that fails in stock too, Dynamo passes over the frame otherwise, in this model and in all others."""
    for _ in range(2):
        model, stock = make()
        fxopt.optimize(model)
        batch = batch_of(images=images)
        if first == "right":
            check(tools, model, stock, batch)
        for _ in range(2):
            with pytest.raises(ValueError, match="to match target batch_size"):
                model(**batch | {"labels": batch["labels"][:, :-1].contiguous()})
        for length in (12, 17):
            check(tools, model, stock, batch_of(length, images=images))
        report = fxopt.explain(model)
        assert report.fallbacks == ()
        assert forms(report)["linear_cross_entropy"] == 1
        assert not any("runs as stock" in note for note in report.notes)
    assert "WON'T CONVERT" not in caplog.text


def test_what_fails_within_the_backbone_is_told_of_no_other_call(tools: Any) -> None:
    model, stock = make()
    fxopt.optimize(model)
    for size in (40, 41):
        for layer in model.trunk.layers:
            layer.down.weight.data = torch.randn(WIDTH, size)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(**batch_of())
    for layer, right in zip(model.trunk.layers, stock.trunk.layers, strict=True):
        layer.down.weight.data = right.down.weight.detach().clone()
    other, other_stock = make()
    fxopt.optimize(other)
    for ours, theirs in ((model, stock), (other, other_stock)):
        check(tools, ours, theirs, batch_of())
        assert not any("runs as stock" in note for note in fxopt.explain(ours).notes)


def test_a_piece_that_cannot_be_compiled_says_why(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stock = make()
    fxopt.optimize(model)
    installation = find_installation(model)
    assert installation is not None
    behind = installation.model_call.behind  # type: ignore[union-attr]

    def fail(*_: Any) -> Any:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(behind, "_backend", fail)
    for _ in range(2):
        check(tools, model, stock, batch_of())
    reasons = [fallback.reason for fallback in fxopt.explain(model).fallbacks]
    assert any("no kernel for this" in reason for reason in reasons)
    assert not any("within a try statement" in reason for reason in reasons)


class Counting(Model):
    """A model that reads a number in Python that differs from call to call."""

    def forward(
        self, ids: torch.Tensor, images: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> Output:
        self.count += 1
        logits = self.head(self.trunk(ids, images)) * f"{self.count}".count("1") * (self.count + 0.5)
        return Output(loss=F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1)), logits=logits)


def test_more_forms_than_there_may_be_captures_run_on(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Dynamo then notes is a frame without a name."""
    monkeypatch.setattr(torch_settings, "RECOMPILE_LIMIT", 2)
    torch.manual_seed(0)
    model = Counting().train()
    model.trunk.returned = "tensor"
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    for _ in range(6):
        check(tools, model, stock, batch_of())
    reasons = [fallback.reason for fallback in fxopt.explain(model).fallbacks]
    assert any("the calls took too many forms" in reason for reason in reasons)


@pytest.mark.parametrize("budget", ["min", None])
def test_a_plan_is_followed(budget: str | None, tools: Any) -> None:
    model, stock = make()
    fxopt.optimize(model, memory_budget=budget)
    for _ in range(2):
        check(tools, model, stock, batch_of())
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    (plan,) = report.plans
    assert plan.budget == str(budget)


def test_numbers_of_its_own_in_each_call_cost_captures_and_no_more(tools: Any) -> None:
    model, stock = make(returned="counted")
    fxopt.optimize(model)
    for _ in range(4):
        check(tools, model, stock, batch_of())
    assert model.trunk.count == stock.trunk.count
    assert fxopt.explain(model).fallbacks == ()


def test_evaluation_and_restore_are_stock() -> None:
    model, stock = make()
    fxopt.optimize(model)
    batch = batch_of()
    model(**batch).loss.backward()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, stock(**batch).logits)
    fxopt.restore(model)
    assert torch.equal(model(**batch).logits, stock(**batch).logits)
    assert not {SLOT, CALL} & model.trunk.__dict__.keys()


def test_a_model_captured_behind_its_backbone_is_freed_with_its_last_reference() -> None:
    model, _ = make()
    fxopt.optimize(model)
    model(**batch_of()).loss.backward()
    gone = weakref.ref(model.trunk)
    del model
    gc.collect()
    assert gone() is None


def test_the_backbone_stands_beside_other_weights() -> None:
    model, _ = make()
    outer = nn.ModuleDict({"base": nn.Sequential(model)})
    blocks = frozenset(model.trunk.layers)
    assert find_backbone(model, blocks) is model.trunk
    assert find_backbone(outer, blocks) is model.trunk
    assert find_backbone(model.trunk, blocks) is None, "a list of blocks is no module that is called"
    assert find_backbone(model, blocks | {model.head}) is None


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_with_images_has_its_head_fused(adapted: bool, tools: Any) -> None:
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(tiny_config("qwen2_vl")).train()
    batch = make_batch(model, model.config, "image-text")
    if adapted:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        )
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    for _ in range(2):
        check(tools, model, stock, batch)
    ours, theirs = (each(**batch, output_hidden_states=True) for each in (model, stock))
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for value, expected in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.allclose(value, expected, atol=1e-5)
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert forms(report)["linear_cross_entropy"] == 1


def test_a_call_like_one_before_is_not_traced_again(tools: Any) -> None:
    model, stock = make(returned="own")
    fxopt.optimize(model)
    check(tools, model, stock, batch_of())
    before = sum(torch._dynamo.utils.counters["frames"].values())
    for _ in range(3):
        check(tools, model, stock, batch_of())
    assert sum(torch._dynamo.utils.counters["frames"].values()) == before


def test_a_hook_that_is_gone_is_no_obstacle(tools: Any) -> None:
    model, stock = make()
    fxopt.optimize(model)
    handle = model.head.register_forward_hook(lambda *_: None)
    check(tools, model, stock, batch_of())
    handle.remove()
    for _ in range(2):
        check(tools, model, stock, batch_of())
    (fallback,) = fxopt.explain(model).fallbacks
    assert fallback.count == 1
    installation = find_installation(model)
    assert installation is not None
    assert MODEL_REGION in installation.ledger.served


def test_a_call_within_the_backbone_ends_nothing(tools: Any) -> None:
    model, stock = make()
    fxopt.optimize(model)
    for each in (model, stock):

        def look(module: nn.Module, args: Any, output: Any, each: Any = each) -> None:
            if torch.is_grad_enabled():
                with torch.no_grad():
                    each(**batch_of(20))

        each.trunk.norm.register_forward_hook(look)
    for _ in range(2):
        check(tools, model, stock, batch_of())


def test_another_thread_may_evaluate_meanwhile() -> None:
    model, stock = make()
    fxopt.optimize(model)
    expected, batch = stock(**batch_of(9)).logits.detach(), batch_of(9)
    errors: list[BaseException] = []
    done = threading.Event()

    def evaluate() -> None:
        try:
            while not done.is_set():
                with torch.no_grad():
                    assert torch.allclose(model(**batch).logits, expected, atol=1e-5)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=evaluate)
    thread.start()
    for _ in range(2):
        model(**batch_of()).loss.backward()
    done.set()
    thread.join()
    assert errors == []
