"""Whatever a forward does around the call of its backbone is done once, and what runs as it is there is told."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.capture.torch_dynamo import isolate
from tests.models.backbones import CLASSES, WIDTH, Output, Trunk, batch_of


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
    assert all("the backbone is called in a try or with statement" in reason for reason in found_reasons)


class Trying(Wrapped):
    """A model that looks at its logits where Dynamo cannot go on behind that."""

    def forward(self, batch: dict[str, torch.Tensor]) -> Output:
        x = self.trunk(batch["ids"], batch["images"])
        try:
            logits = self.head(x)
            if logits.isnan().any():
                raise ValueError("not a number")
            loss = loss_of(logits, batch["labels"])
        except ZeroDivisionError:
            loss = x.sum()
        return Output(loss=loss, logits=logits)


class Outer(nn.Module):
    """A model within another, as one with adapters is: its class does not tell what runs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: dict[str, torch.Tensor]) -> Output:
        return self.inner(batch)


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def test_what_dynamo_passes_over_is_told_of_every_model_of_the_class(tools: Any) -> None:
    for _ in range(2):
        model = Trying("").train()
        stock = copy.deepcopy(model)
        fxopt.optimize(model)
        ours, theirs = model(batch_of()), stock(batch_of())
        assert tools.relative(ours.loss.detach(), theirs.loss.detach()) < 1e-5
        report = fxopt.explain(model)
        (note,) = (note for note in report.notes if note.startswith("around the Trunk trunk"))
        assert "this runs as stock, but for what it calls: forward from test_backbone_ways.py:" in note
        assert "depends on the values of a tensor" in note
        assert report.fallbacks == (), "the loss was captured"
    for inner, is_told in ((Trying, True), (type("Inheriting", (Trying,), {}), True), (Wrapped, False)):
        model = Outer(inner("")).train()
        fxopt.optimize(model)
        model(batch_of())
        told = [note for note in fxopt.explain(model).notes if note.startswith("around the Trunk")]
        assert bool(told) == is_told, inner
    model = Trying("").train()
    fxopt.optimize(model)
    model(batch_of())
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not a number"):
        model(batch_of())


class Masking(nn.Module):
    """A model without images that takes a mask or scales."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(), nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(
        self,
        ids: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
    ) -> Output:
        x = self.trunk(ids)
        for factor in (mask, scales):
            x = x if factor is None else x * factor[..., None]
        logits = self.head(x)
        return Output(loss=loss_of(logits, labels), logits=logits)


def test_one_tensor_given_twice_beside_other_arguments_than_before(tools: Any) -> None:
    """Dynamo, asked why it captures anew, fails with a KeyError of the argument that is not there."""
    model = Masking().train()
    stock = copy.deepcopy(model)
    fxopt.optimize(model)
    ids, ones = torch.randint(CLASSES, (2, 12)), torch.ones(2, 12)
    first = dict(ids=ids, labels=ids.clone(), mask=ones)
    for batch in (first, dict(ids=ids, labels=ids, scales=ones), dict(ids=ids, labels=ids), first):
        ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
        assert tools.relative(ours.loss, theirs.loss) < 1e-5
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert all(site.status == "rewritten" for site in report.sites)
