"""Models whose way to their blocks hangs on values, as those with images: captured behind their backbone."""

from __future__ import annotations

import copy
import dataclasses
import gc
import random
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.capture.behind import find_backbone
from fxopt.capture.installation import find_installation
from fxopt.capture.torch_dynamo import isolate
from fxopt.capture.torch_modules import CALL, SLOT
from fxopt.coverage.inputs import make_batch
from fxopt.coverage.shrink import tiny_config
from fxopt.report.records import MODEL_REGION

WIDTH, CLASSES = 32, 64


@dataclasses.dataclass
class Output:
    """What the model returns."""

    loss: torch.Tensor
    logits: torch.Tensor


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.gain


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = Norm(), nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48)
        self.down = nn.Linear(48, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@dataclasses.dataclass
class Found:
    """What no capture takes apart."""

    last: torch.Tensor


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm = Norm()
        self.returned = "tensor"
        self.count = self.seen = self.counts = 0

    def forward(self, ids: torch.Tensor, images: torch.Tensor | None = None, added: Any = None) -> Any:
        x = self.embed(ids)
        self.seen += self.counts
        if isinstance(added, list):
            added.append(x.mean())
        elif added is not None:
            added += 1
        if images is not None:
            if int((ids == 1).sum()) != images.shape[0]:
                raise ValueError("as many images as places")
            x = x.masked_scatter((ids == 1)[..., None], images)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        self.count += self.returned == "counted"
        return {"tensor": x, "tuple": (x, (ids, None)), "own": Found(x), "counted": (x, self.count)}[
            self.returned
        ]


class Model(nn.Module):
    def __init__(self, returned: str = "tensor", before: str = "", again: bool = False) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(), nn.Linear(WIDTH, CLASSES, bias=False)
        self.trunk.returned, self.before, self.again = returned, before, again
        self.count = 0

    def forward(
        self, ids: torch.Tensor, images: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> Output:
        if images is not None and self.before == "random":
            images = F.dropout(images, 0.5)
        if self.before == "state":
            self.count += 1
        x = self.trunk(ids, images)
        if self.again:
            x = x + self.trunk(ids, images)
        x = x[0] if isinstance(x, tuple) else x.last if isinstance(x, Found) else x
        logits = self.head(x)
        loss = F.cross_entropy(logits.view(-1, CLASSES).float(), labels.view(-1))
        return Output(loss=loss, logits=logits)


def make(**options: Any) -> tuple[Model, Model]:
    torch.manual_seed(0)
    model = Model(**options).train()
    return model, copy.deepcopy(model)


def batch_of(length: int = 12, *, images: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(2, CLASSES, (2, length), generator=generator)
    batch = {"ids": ids, "labels": ids.roll(-1, 1)}
    if images:
        ids[:, 3:5] = 1
        batch["images"] = torch.randn(4, WIDTH, generator=generator)
    return batch


def check(tools: Any, model: Any, stock: Any, batch: dict[str, torch.Tensor], most: float = 1e-4) -> None:
    ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
    assert tools.relative(ours.loss, theirs.loss) < 1e-5
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert tools.relative(ours.gradients[name], gradient) < most, name


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


class Wrapped(nn.Module):
    """A model whose forward does something around its backbone's call."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.trunk, self.head, self.way = Trunk(), nn.Linear(WIDTH, CLASSES, bias=False), way
        self.count, self.nested = 0, False
        self.trunk.counts = int(way == "attribute")
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, batch: dict[str, torch.Tensor], labels: torch.Tensor | None = None) -> Output:
        ids, images = batch["ids"], batch["images"]
        if self.way == "mapping":
            labels = batch.pop("labels")
        if self.way == "scaled":
            images = batch["images"] = images * 0.5
        if self.way == "in place":
            images.mul_(0.5)
        read = self.trunk.seen if self.way == "attribute" else 1
        if self.way == "drawn":
            read = random.uniform(1, 2)
        added: list[torch.Tensor] = []
        if self.way in ("list", "its list", "out", "attribute"):
            out = torch.zeros(()) if self.way == "out" else None
            added = batch["added"] if self.way == "its list" else added  # type: ignore[assignment]
            handed: Any = None if self.way == "attribute" else out if self.way == "out" else added
            x = self.trunk(ids, images, handed)
            factor = read + sum(added) + (0 if out is None else out)
            logits = self.head(x) * factor
            loss = F.cross_entropy(logits.view(-1, CLASSES), batch["labels"].view(-1))
            return Output(loss=loss, logits=logits)
        dropped = F.dropout(images, 0.5) if self.way == "nested graph" else images
        if self.way in ("reentrant", "nested graph"):
            x = checkpoint(self.trunk, ids, dropped, use_reentrant=self.way == "reentrant")
        elif self.way == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                x = self.trunk(ids, images)
        elif self.way == "library":
            x = torch.amp.autocast("cpu", torch.bfloat16)(lambda: self.trunk(ids, images))()
        elif self.way == "finally":
            try:
                x = self.trunk(ids, images)
            finally:
                self.count += 1
        else:
            x = self.trunk(ids, images)
        if self.way == "later" and self.count == 2 and (x.detach() > 0).any():
            x = x * 2
        if self.way == "later":
            self.steps += 1
        if self.way == "after":
            batch["seen"] = x.detach().sum()
            self.kept = x.detach().mean()
            self.trunk.seen += 1
        x = x * read
        logits = self.head(x.float()) + dropped.sum()
        loss = F.cross_entropy(
            logits.view(-1, CLASSES), (batch["labels"] if labels is None else labels).view(-1)
        )
        return Output(loss=loss, logits=logits)


WAYS = (
    "reentrant",
    "nested graph",
    "autocast",
    "mapping",
    "scaled",
    "in place",
    "finally",
    "list",
    "its list",
    "out",
    "attribute",
    "drawn",
    "after",
    "library",
    "later",
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore")
def test_whatever_stands_around_the_backbone_is_done_once(way: str, tools: Any) -> None:
    torch.manual_seed(0)
    # A frame that Dynamo cannot go on in once is passed over for good: each way has a code of its own.
    own = type(f"Wrapped_{way}", (Wrapped,), {"forward": isolate(Wrapped.forward)})
    model = own(way).train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    for step in range(3):
        found = []
        for each in (model, stock):
            if way == "later":
                each.count = step
            torch.manual_seed(step)
            random.seed(step)
            batch: dict[str, Any] = batch_of()
            if way == "its list":
                batch["added"] = []
            each.zero_grad()
            output = each(batch)
            output.loss.backward()
            drawn = torch.cat([torch.rand(1), torch.tensor([random.random()])])
            found.append(
                (output.loss.detach(), {n: p.grad for n, p in each.named_parameters()}, batch, drawn)
            )
        (loss, gradients, given, drawn), (their_loss, theirs, their_batch, their_drawn) = found
        assert tools.relative(loss, their_loss) < (1e-2 if way in ("autocast", "library") else 1e-5)
        assert torch.equal(drawn, their_drawn), "as many random numbers"
        assert given.keys() == their_batch.keys()
        assert all(
            len(given[name]) == len(their_batch[name])
            if isinstance(given[name], list)
            else torch.allclose(given[name], their_batch[name], atol=1e-4)
            for name in given
        )
        assert model.trunk.seen == stock.trunk.seen
        assert (model.count, model.steps) == (stock.count, stock.steps)
        for name, gradient in theirs.items():
            if gradient is None:  # of what is checkpointed reentrantly, whose inputs need none
                assert gradients[name] is None
                continue
            assert tools.relative(gradients[name], gradient) < (
                5e-2 if way in ("autocast", "library") else 1e-4
            ), name
    found_reasons = [fallback.reason for fallback in fxopt.explain(model).fallbacks]
    assert len(found_reasons) == (way == "finally"), "Dynamo goes on behind a call in all but a try statement"
    assert all("nor behind the Trunk trunk" in reason for reason in found_reasons)


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
