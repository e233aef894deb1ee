"""Lazy logits: nothing is computed until somebody reads, and what is read is what stock gives."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32

from fxopt.capture import torch_lowering
from fxopt.capture.installation import Installation
from fxopt.capture.lazy import LazyLogits
from fxopt.errors import FxoptError, StaleLogitsError


def keep_logits(gm: Any, *, region: str, lazy_outputs: bool) -> None:
    """Give the loss a linear of its own and mark the logits' one as kept, as a rewritten head does."""
    if not lazy_outputs:
        return
    for node in list(gm.graph.nodes):
        if node.target is torch._C._nn.linear:
            with gm.graph.inserting_after(node):
                own = gm.graph.node_copy(node)
            node.meta["kept"] = "test"
            for user in list(node.users):
                if user.op != "output":
                    user.replace_input_with(node, own)
            node.replace_all_uses_with(node)
    gm.recompile()


def make_lazy_twins(twins):
    model, stock = twins()
    Installation(model, None, keep_logits, torch_lowering.plain_backend, partial=False).install()
    return model, stock


@pytest.fixture(scope="module")
def kept_twins(twins):
    """Twins that are captured once, and that each test gets as if they were new."""
    return make_lazy_twins(twins)


@pytest.fixture
def lazy_twins(kept_twins):
    model, stock = kept_twins
    model.load_state_dict(stock.state_dict())
    for each in kept_twins:
        each.train().zero_grad(set_to_none=True)
    return kept_twins


IDS = torch.randint(1, 256, (2, 16), generator=torch.Generator().manual_seed(0))


def test_training_computes_no_logits(lazy_twins):
    model, stock = lazy_twins
    out, expected = model(input_ids=IDS, labels=IDS), stock(input_ids=IDS, labels=IDS)
    assert type(out.logits) is LazyLogits
    assert torch.equal(out.loss, expected.loss)
    out.loss.backward()
    expected.loss.backward()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert out.logits.is_lazy


def test_form_casts_detach_and_slices_stay_lazy(lazy_twins):
    model, stock = lazy_twins
    logits, expected = model(input_ids=IDS, labels=IDS).logits, stock(input_ids=IDS, labels=IDS).logits
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == expected.shape
    assert (logits.dtype, logits.device, logits.ndim) == (expected.dtype, expected.device, 3)
    assert logits.size(-1) == 256
    assert len(logits) == 2
    assert logits.requires_grad
    derived = [
        logits.float(),
        logits.to(torch.bfloat16),
        logits.detach(),
        logits[:, :-1],
        logits[..., :5].half(),
    ]
    assert all(type(each) is LazyLogits for each in derived)
    assert not logits.detach().requires_grad
    assert derived[3].shape == (2, 15, 256)
    assert derived[4].dtype is torch.float16
    assert "not computed" in repr(logits)
    assert logits.is_lazy
    assert torch.equal(derived[1].materialize(), expected.to(torch.bfloat16))
    assert torch.equal(derived[4].materialize(), expected[..., :5].half())


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.argmax(-1),
        lambda t: t + 1,
        lambda t: torch.softmax(t, -1),
        lambda t: t.sum(),
        lambda t: torch.cat([t, t]),
        lambda t: torch.nn.functional.cross_entropy(t.reshape(-1, 256), IDS.reshape(-1)),
        lambda t: t.detach().clone(),
        lambda t: torch.from_numpy(t.detach().numpy()),
        lambda t: torch.tensor(t.tolist()),
        lambda t: t.cpu(),
        lambda t: t[t > 0],
        lambda t: copy.deepcopy(t.detach()),
        lambda t: pickle.loads(pickle.dumps(t.detach())),
    ],
)
def test_any_other_read_computes_what_stock_gives(lazy_twins, read):
    model, stock = lazy_twins
    ours, theirs = (
        read(model(input_ids=IDS, labels=IDS).logits),
        read(stock(input_ids=IDS, labels=IDS).logits),
    )
    assert type(ours) is torch.Tensor
    assert torch.equal(ours, theirs)


def test_a_loss_of_the_users_own_on_the_logits_has_stock_gradients(lazy_twins):
    model, stock = lazy_twins
    for each in (model, stock):
        (each(input_ids=IDS, labels=IDS).logits.float().square().mean()).backward()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, given):
        ctx.save_for_backward(given)
        return given * given

    @staticmethod
    def backward(ctx, gradient):
        (given,) = ctx.saved_tensors
        return 2 * given * gradient


def test_a_checkpointed_function_of_logits_has_stock_gradients(lazy_twins):
    """A non-reentrant checkpoint counts what is saved within it, and what computes logits runs once."""

    def entropy(logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1).exp().pow(2).sum()

    gradients = []
    for each in lazy_twins:
        output = each(input_ids=IDS, labels=IDS)
        term = torch.utils.checkpoint.checkpoint(entropy, output.logits.float(), use_reentrant=False)
        (output.loss + term).backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_an_autograd_function_of_the_users_loses_no_gradient(lazy_twins):
    """Its `apply` asks no tensor class: it takes lazy logits for a tensor without a gradient function."""
    model, stock = lazy_twins
    out = model(input_ids=IDS, labels=IDS)
    with pytest.raises(FxoptError, match=r"give it outputs\.logits\.clone\(\)"):
        (out.loss + Squared.apply(out.logits).mean()).backward()
    model.zero_grad()
    gradients = []
    for each in (model, stock):
        Squared.apply(each(input_ids=IDS, labels=IDS).logits.clone()).mean().backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    assert all(map(torch.equal, *gradients))


def test_logits_first_read_without_grad_still_carry_their_gradient(lazy_twins):
    """As where a metric of the user's reads a cast of them before a loss of the user's does."""
    model, stock = lazy_twins
    gradients = []
    for each in (model, stock):
        logits = each(input_ids=IDS, labels=IDS).logits.double()
        with torch.no_grad():
            logits.argmax(-1)
        logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_first_read_without_a_graph_have_theirs_later(mode, lazy_twins):
    model, stock = lazy_twins
    gradients = []
    for each in (model, stock):
        logits = each(input_ids=IDS, labels=IDS).logits
        with mode():
            float(logits.sum())
        logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("step", [torch.Tensor.double, torch.Tensor.float, lambda logits: logits[:, :-1]])
def test_what_is_taken_of_logits_without_grad_has_the_graph_it_has_in_stock(step, lazy_twins):
    model, stock = lazy_twins
    gradients = []
    for each in (model, stock):
        logits = each(input_ids=IDS, labels=IDS).logits
        with torch.no_grad():
            target = step(logits)
        (step(logits) * target).mean().backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    for own, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(own, expected)


def test_accelerates_fp32_conversion_computes_nothing(lazy_twins):
    model, _ = lazy_twins
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=IDS, labels=IDS)
    kept = out.logits
    converted = convert_outputs_to_fp32(lambda: out)()
    assert converted.logits.dtype is torch.float32
    assert type(converted.logits) is LazyLogits
    assert kept.is_lazy


def test_autocast_of_the_step_holds_at_a_later_read(lazy_twins):
    model, stock = lazy_twins
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected = model(input_ids=IDS, labels=IDS).logits, stock(input_ids=IDS, labels=IDS).logits
    assert logits.dtype is torch.bfloat16
    assert torch.equal(logits.materialize(), expected)


def test_reading_after_an_optimizer_step_says_so(lazy_twins):
    model, _ = lazy_twins
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(StaleLogitsError, match="read after the head's weight changed"):
        out.logits.sum()


@pytest.mark.parametrize(
    "is_trained", [pytest.param(False, marks=pytest.mark.slow), True], ids=["new", "trained before"]
)
def test_evaluation_and_no_grad_give_plain_tensors(is_trained, twins):
    """A capture for training does not serve evaluation, though neither head nor loss reads the mode."""
    model, stock = make_lazy_twins(twins)
    if is_trained:
        assert type(model(input_ids=IDS, labels=IDS).logits) is LazyLogits
    model.eval(), stock.eval()
    out, expected = model(input_ids=IDS, labels=IDS), stock(input_ids=IDS, labels=IDS)
    assert type(out.logits) is torch.Tensor
    assert torch.equal(out.logits, expected.logits)
    model.train()
    with torch.no_grad():
        assert type(model(input_ids=IDS, labels=IDS).logits) is torch.Tensor


@pytest.mark.slow
def test_shapes_follow_the_call_under_dynamic_captures(twins):
    model, stock = make_lazy_twins(twins)
    for shape in ((2, 16), (3, 24), (4, 33)):
        ids = torch.randint(1, 256, shape)
        logits = model(input_ids=ids, labels=ids).logits
        assert type(logits) is LazyLogits
        assert logits.shape == (*shape, 256)
        assert torch.equal(logits.materialize(), stock(input_ids=ids, labels=ids).logits)


@pytest.mark.parametrize("allow_unused", [False, True])
def test_a_gradient_with_respect_to_logits_the_loss_was_computed_without_says_what_to_do(
    lazy_twins, allow_unused
):
    model, _ = lazy_twins
    for read in (False, True):
        out = model(input_ids=IDS, labels=IDS)
        if read:
            out.logits.sum()
        with pytest.raises(
            FxoptError, match=r"this loss was computed without them.*\n.*fxopt\.restore\(model\)"
        ):
            torch.autograd.grad(out.loss, out.logits, allow_unused=allow_unused)
        with pytest.raises((FxoptError, RuntimeError), match=r"without them|does not require grad"):
            out.loss.backward(inputs=[out.logits])  # before torch 2.13 torch's own error


def test_a_gradient_with_respect_to_logits_of_a_loss_on_them_is_stocks(lazy_twins):
    found = []
    for each in lazy_twins:
        logits = each(input_ids=IDS, labels=IDS).logits
        wide = logits.float()
        loss = wide[:, 1:].square().mean() + each(input_ids=IDS, labels=IDS).loss
        found.append(torch.autograd.grad(loss, (logits, wide)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", ["eval", pytest.param("head not rewritten", marks=pytest.mark.slow)])
def test_logits_that_are_computed_carry_the_losss_gradient(twins, install, mode):
    model, stock = twins()
    install(model)
    found = []
    for each in (model, stock):
        each.train(mode != "eval")
        out = each(input_ids=IDS, labels=IDS)
        out.logits.retain_grad()
        (gradient,) = torch.autograd.grad(out.loss, out.logits, retain_graph=True)
        out.loss.backward()
        found.append((gradient, out.logits.grad, each.lm_head.weight.grad, each.model.norm.weight.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7)
