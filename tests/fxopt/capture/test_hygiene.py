"""What Dynamo does silently when left alone, each met by a test."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.capture import torch_lowering, torch_settings
from fxopt.capture.installation import Installation
from fxopt.report.records import MODEL_REGION


@pytest.mark.slow
def test_nine_models_in_one_process_are_all_captured(build, install, assert_same_step):
    """Dynamo's limit of 8 captures per code object is shared by all instances of a class."""
    for _ in range(9):
        model = build(num_hidden_layers=2)
        installation = install(model)
        assert_same_step(model, build(num_hidden_layers=2))
        assert not installation.ledger.fallbacks
        assert [c.region for c in installation.ledger.captures].count("model.layers") == 1


class Modes(nn.Module):
    """A block that computes otherwise for each number it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mode: str) -> torch.Tensor:
        return self.linear(x) * len(mode)


class ModesModel(nn.Module):
    """Two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Modes() for _ in range(2))

    def forward(self, x: torch.Tensor, mode: str) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, mode)
        return x.square().mean()


def test_forms_beyond_the_limit_run_stock_and_are_counted_with_the_reason(
    install, assert_same_step, monkeypatch
):
    monkeypatch.setattr(torch_settings, "RECOMPILE_LIMIT", 4)
    model = ModesModel()
    stock = copy.deepcopy(model)
    installation = install(model)
    x = torch.randn(4, 8, requires_grad=True)  # so that both blocks share their captures
    for number in range(1, 4):
        assert_same_step(model, stock, lambda m, n=number: m(x, "m" * n))
    assert not installation.ledger.fallbacks
    for number in range(4, 8):
        assert_same_step(model, stock, lambda m, n=number: m(x, "m" * n))
    counts = {
        region: count
        for (region, reason), count in installation.ledger.fallbacks.items()
        if "the calls took too many forms, each of which needs a capture of its own" in reason
    }
    assert counts, installation.ledger.fallbacks
    assert len(installation.ledger.captures) <= 2 * torch_settings.RECOMPILE_LIMIT


@pytest.mark.slow
def test_a_second_identical_model_makes_captures_of_its_own(build, install):
    first, second = build(), build()
    installations = [install(first), install(second)]
    ids = torch.randint(1, 256, (2, 16))
    for model in (first, second):
        model(input_ids=ids, labels=ids).loss.backward()
    for installation in installations:
        assert {c.region for c in installation.ledger.captures} == {MODEL_REGION, "model.layers"}
        assert set(installation.ledger.served) == {MODEL_REGION, *(f"model.layers.{i}" for i in range(3))}


def test_twenty_eight_equal_layers_cost_at_most_three_captures(build, install):
    model = build(num_hidden_layers=28)
    installation = install(model)
    ids = torch.randint(1, 256, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(installation.ledger.captures) <= 3
    assert not installation.ledger.fallbacks


def test_generate_makes_no_capture_and_gives_stock_tokens(twins, install):
    model, stock = twins()
    installation = install(model)
    model.eval(), stock.eval()
    ids = torch.randint(3, 256, (1, 7))
    tokens = [m.generate(ids, max_new_tokens=12, do_sample=False) for m in (model, stock)]
    assert torch.equal(*tokens)
    assert not installation.ledger.captures
    assert not installation.ledger.fallbacks


def test_a_hook_added_inside_after_capture_fires_and_is_counted(twins, install, assert_same_step):
    model, stock = twins()
    installation = install(model)
    assert_same_step(model, stock)
    seen: list[str] = []
    inner = model.model.layers[1].mlp.gate_proj
    handle = inner.register_forward_hook(lambda module, args, output: seen.append("forward"))
    assert_same_step(model, stock)
    assert seen == ["forward"]
    reasons = {reason for region, reason in installation.ledger.fallbacks}
    assert any(
        reason.startswith(
            "a hook sits on the Linear inside: calls of this block run stock; at mlp.gate_proj (test_hygiene.py:"
        )
        for reason in reasons
    )
    handle.remove()
    before = sum(installation.ledger.fallbacks.values())
    assert_same_step(model, stock)
    assert sum(installation.ledger.fallbacks.values()) == before


def test_full_backward_hooks_inside_fire(twins, install, assert_same_step):
    model, stock = twins()
    install(model)
    assert_same_step(model, stock)
    seen: list[tuple[int, ...]] = []
    model.model.layers[0].mlp.register_full_backward_hook(lambda m, gi, go: seen.append(tuple(go[0].shape)))
    assert_same_step(model, stock)
    assert seen == [(2, 16, 64)]


def test_hooks_on_a_block_fire_around_the_compiled_block(twins, install, assert_same_step):
    model, stock = twins()
    installation = install(model)
    assert_same_step(model, stock)
    seen: list[str] = []
    block = model.model.layers[1]
    block.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    block.register_forward_hook(lambda m, args, output: seen.append("post"))
    block.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    captures = len(installation.ledger.captures)
    assert_same_step(model, stock)
    assert seen == ["pre", "post", "backward"]
    assert not any(region == "model.layers" for region, _ in installation.ledger.fallbacks)
    assert len(installation.ledger.captures) - captures <= 1
    assert "forward" not in block.__dict__


def test_a_hook_that_changes_the_blocks_output_is_obeyed(twins, install, assert_same_step):
    model, stock = twins()
    install(model)
    for each in (model, stock):
        each.model.layers[0].register_forward_hook(lambda m, args, output: output * 0.5)
    assert_same_step(model, stock)


def test_transformers_own_capturing_hooks_do_not_stop_later_steps(twins, install, assert_same_step):
    """After one call with output_hidden_states, transformers leaves idle hooks on layers for good."""
    model, stock = twins()
    installation = install(model)
    ids = torch.randint(1, 256, (2, 16))
    states = [m(input_ids=ids, labels=ids, output_hidden_states=True).hidden_states for m in (model, stock)]
    assert len(states[0]) == len(states[1]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    before = dict(installation.ledger.fallbacks)
    assert_same_step(model, stock)
    assert installation.ledger.fallbacks == before


@pytest.mark.parametrize("use_reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradient_checkpointing_recomputes_and_is_captured(twins, install, assert_same_step, use_reentrant):
    model, stock = twins()
    installation = install(model)
    for each in (model, stock):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same_step(model, stock)
    assert not installation.ledger.fallbacks
    for each in (model, stock):
        each.gradient_checkpointing_disable()
    assert_same_step(model, stock)
    assert not installation.ledger.fallbacks


class MutatingBlock(nn.Module):
    """A block that rescales a buffer after computing with a function of it, which is what it saves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("scale", torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) * torch.sigmoid(self.scale)
        self.scale.mul_(0.5)
        return x + y.tanh()


class MutatingModel(nn.Module):
    """Two mutating blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MutatingBlock() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def test_a_block_that_mutates_what_it_read_keeps_right_gradients(install, assert_same_step):
    torch.manual_seed(0)
    model = MutatingModel()
    stock = copy.deepcopy(model)
    install(model)
    x = torch.randn(4, 16)
    for _ in range(2):
        assert_same_step(model, stock, lambda m: m(x))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), stock.buffers(), strict=True))


def test_num_items_as_an_int_settles_after_two_captures(twins, install, assert_same_step):
    model, stock = twins()
    installation = install(model)
    ids = torch.randint(1, 256, (2, 16))
    for count in (20, 21, 23, 29, 31):
        assert_same_step(
            model, stock, lambda m, n=count: m(input_ids=ids, labels=ids, num_items_in_batch=n).loss
        )
    assert [c.region for c in installation.ledger.captures].count(MODEL_REGION) <= 2
    assert [c.region for c in installation.ledger.captures].count("model.layers") == 1
    assert not installation.ledger.fallbacks


class Embedded(nn.Module):
    """Blocks after an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return x.sum()


SHAPES = ((2, 16), (3, 24), (4, 40), (5, 33), (2, 17))


def test_changing_shapes_settle_on_dynamic_captures(install, assert_same_step):
    model = Embedded()
    stock = copy.deepcopy(model)
    installation = install(model)
    for shape in SHAPES:
        ids = torch.randint(1, 256, shape)
        assert_same_step(model, stock, lambda m, ids=ids: m(ids))
    assert [c.region for c in installation.ledger.captures].count("blocks") <= 2
    assert not installation.ledger.fallbacks


@pytest.mark.slow
def test_changing_shapes_of_a_language_model_settle_on_dynamic_captures(twins, install, assert_same_step):
    model, stock = twins()
    installation = install(model)
    for shape in SHAPES:
        ids = torch.randint(1, 256, shape)
        assert_same_step(model, stock, lambda m, ids=ids: m(input_ids=ids, labels=ids).loss)
    assert [c.region for c in installation.ledger.captures].count("model.layers") <= 2
    assert not installation.ledger.fallbacks


def test_a_cache_object_in_training_runs_stock_and_is_counted(build, install):
    model = build()
    installation = install(model)
    ids = torch.randint(1, 256, (2, 16))
    out = model(input_ids=ids, labels=ids, use_cache=True)
    assert out.past_key_values is not None
    assert any("DynamicCache" in reason for _, reason in installation.ledger.fallbacks)
    assert any("use_cache=True" in note for note in installation.ledger.notes)


class Decoder(nn.Module):
    """A model within another, which hands its cache on."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, past=None):
        found = self.model(input_ids=ids, past_key_values=past)
        return found.logits, found.past_key_values


@pytest.mark.parametrize(
    "within", [pytest.param(False, marks=pytest.mark.slow), True], ids=["alone", "within another"]
)
def test_evaluation_with_gradients_has_the_cache_that_stock_has(within, twins):
    """Who decodes by hand without no_grad hands it on; calls in training have none."""
    model, stock = (Decoder(each).eval() for each in twins())
    fxopt.optimize(model if within else model.model)
    ids = torch.randint(1, 256, (1, 8), generator=torch.Generator().manual_seed(0))
    logits = []
    for each in (model, stock):
        _, past = each(ids)
        logits.append(each(ids[:, :1], past)[0])
    torch.testing.assert_close(*logits)
    report = fxopt.explain(model if within else model.model)
    assert any("DynamicCache" in fallback.reason for fallback in report.fallbacks)
    assert model.train()(ids)[1] is None


@pytest.mark.slow
def test_a_call_with_a_cache_leaves_the_calls_without_one_served(twins, install, assert_same_step):
    model, stock = twins()
    installation = install(model)
    ids = torch.randint(1, 256, (2, 16))
    model(input_ids=ids, labels=ids, use_cache=True)
    counted = installation.ledger.fallbacks.total()
    for _ in range(2):
        assert_same_step(model, stock)
    assert installation.ledger.fallbacks.total() == counted
    assert MODEL_REGION in installation.ledger.served
    assert MODEL_REGION not in installation.ledger.refused


def test_positions_that_begin_anew_mean_what_they_mean_in_stock(twins, install, assert_same_step):
    """With a cache, which stock builds unasked, transformers attends across them; without one it does not."""
    model, stock = twins()
    installation = install(model)
    ids = torch.randint(1, 256, (2, 12))
    for lengths, given in (((5, 7), {"use_cache": False}), ((12,), {}), ((5, 7), {})):
        assert not installation.ledger.fallbacks
        positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
        batch = {"input_ids": ids, "labels": ids, "position_ids": positions, **given}
        assert_same_step(model, stock, lambda m, batch=batch: m(**batch).loss)
    assert installation.ledger.fallbacks, "the last call had a cache"
    assert any("use_cache=False keeps them apart" in note for note in installation.ledger.notes)


class Wrapper(nn.Module):
    """A model within another, which gives it what it likes."""

    def __init__(self, model, *, opens):
        super().__init__()
        self.model, self.opens = model, opens

    def forward(self, input_ids, **batch):
        if self.opens:
            batch = {name: value.clone() for name, value in batch.items()}  # all are tensors
        return self.model(input_ids=input_ids, **batch).loss


@pytest.mark.parametrize("opens", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_model_within_another_trains_without_a_cache_and_keeps_its_config(opens, twins):
    model, stock = (Wrapper(each, opens=opens) for each in twins())
    fxopt.optimize(model)
    ids = torch.randint(1, 256, (2, 12))

    def assert_same_steps(**batch):
        for each in (model, stock):
            each.zero_grad()
            each(ids, labels=ids, **batch).backward()
        for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
            assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm()

    assert_same_steps()
    report = fxopt.explain(model)
    assert report.fallbacks == ()
    assert {site.status for site in report.sites} == {"rewritten"}
    assert any("use_cache=False" in note for note in report.notes)
    assert model.model.config.use_cache
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    assert_same_steps(position_ids=positions)
    assert fxopt.explain(model).fallbacks, "without a cache the result were another"


class Breaking(nn.Module):
    """A block Dynamo cannot capture whole."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        if x.sum().item() > 1e9:
            return x
        return x + 1


class BreakingModel(nn.Module):
    """Two blocks that break the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Breaking() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def test_a_block_that_breaks_stays_stock_with_reason_and_line(install, assert_same_step):
    model = BreakingModel()
    stock = copy.deepcopy(model)
    installation = install(model)
    x = torch.randn(4, 8)
    assert_same_step(model, stock, lambda m: m(x))
    assert_same_step(model, stock, lambda m: m(x))
    reason = installation.ledger.refused["blocks"]
    assert "test_hygiene.py:" in reason
    assert "ata-dependent" in reason or "item" in reason


def test_a_block_that_fxopt_itself_fails_on_runs_as_stock_and_is_warned_of_once(caplog):
    class Plain(BreakingModel):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    def fail(gm, *, region, lazy_outputs):
        if region == "blocks":
            raise ValueError("planted")

    model, x = Plain(), torch.randn(4, 8)
    stock = model(x)
    Installation(model, None, fail, torch_lowering.plain_backend, partial=False).install()
    for _ in range(2):
        assert torch.equal(model(x), stock)
    (record,) = (record for record in caplog.records if record.name == "fxopt")
    assert record.getMessage().startswith(
        "blocks runs as stock, slower and with more memory: ValueError: planted"
    )


def test_partial_optimizes_the_pieces_of_a_block_that_breaks(install, assert_same_step):
    model = BreakingModel()
    stock = copy.deepcopy(model)
    installation = install(model, partial=True)
    x = torch.randn(4, 8)
    assert_same_step(model, stock, lambda m: m(x))
    assert any(c.region == "blocks" for c in installation.ledger.captures)
    assert "blocks" not in installation.ledger.refused


@pytest.mark.parametrize("steps", [0, 1])
def test_a_model_is_freed_with_its_last_reference(build, install, steps):
    """Dynamo keeps every backend and what it compiled for as long as the process lives; neither may hold a model."""
    model = build()
    installation = install(model)
    ids = torch.randint(1, 256, (2, 8))
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
    alive = [weakref.ref(model), weakref.ref(model.model.layers[0]), weakref.ref(model.lm_head)]
    del installation, model
    gc.collect()
    assert [reference() for reference in alive] == [None, None, None]


def test_hooks_on_saved_tensors_see_nothing_of_the_passes(install):
    """Checkpointing counts what a block saves, and the passes run within the first call of one."""
    torch.manual_seed(0)
    model = BreakingModel()
    for block in model.blocks:
        block.forward = block.linear.forward
    seen: list[torch.Size] = []

    def transform(gm, *, region, lazy_outputs):
        odd = torch.randn(3, 5, requires_grad=True)
        torch.tanh(odd).sum().backward()

    Installation(model, None, transform, torch_lowering.plain_backend, partial=False).install()

    def pack(saved: torch.Tensor) -> torch.Tensor:
        seen.append(saved.shape)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        model(torch.randn(4, 8)).backward()
    assert torch.Size((4, 8)) in seen
    assert torch.Size((3, 5)) not in seen


class Projected(nn.Module):
    """Blocks after a projection, which is the only layer of six features."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return x.sum()


def test_what_stands_in_torchs_place_is_what_stands_there_now(install, monkeypatch):
    own, at_first, later = F.linear, [], []

    def noting(widths):
        def linear(x, *rest):
            widths.append(x.shape[-1])
            return own(x, *rest)

        return linear

    model = Projected()
    monkeypatch.setattr(F, "linear", noting(at_first))
    installation = install(model)
    monkeypatch.setattr(F, "linear", own)
    model(torch.randn(4, 6)).backward()
    assert at_first == []
    assert not installation.ledger.fallbacks
    monkeypatch.setattr(F, "linear", noting(later))
    model(torch.randn(4, 6)).backward()
    assert 6 in later


def test_blocks_are_served_without_a_cache_in_every_call_of_a_model_that_looks_at_values(twins):
    """It is captured in pieces, and its forward does not name the argument that declines the cache."""

    class Looking(Wrapper):
        def forward(self, input_ids, **batch):
            loss = super().forward(input_ids, **batch)
            return loss * 2 if loss.item() > 1e9 else loss

    model, _ = twins()
    looking = fxopt.optimize(Looking(model, opens=False).train())
    ids = torch.randint(1, 256, (2, 12))
    for _ in range(2):
        looking(ids, labels=ids).backward()
    report = fxopt.explain(looking)
    assert report.fallbacks == ()
    assert any("was captured behind its" in note for note in report.notes)
    assert model.config.use_cache
