"""Heads and losses of whole models against stock: what peers' trackers have as bugs."""

from __future__ import annotations

import pytest
import torch

import fxopt

BATCH = (2, 24)


def check_heads(model) -> None:
    """The one loss of the model is rewritten to the op without logits."""
    heads = [site for site in fxopt.explain(model).sites if "cross_entropy" in site.pattern]
    assert [(site.op, site.status) for site in heads] == [("linear_cross_entropy", "rewritten")]
    assert fxopt.explain(model).fallbacks == ()


def check_steps(ours, theirs, tools, factor: float = 1.0) -> None:
    assert tools.relative(ours.loss, theirs.loss) < 1e-5
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert tools.relative(ours.gradients[name], factor * gradient) < 1e-4, name


HEADS = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "bias": ("phi", {}),
    "scale": ("cohere", {}),
    "division": ("granite", {"logits_scaling": 4.0}),
    "softcap": ("gemma2", {}),
    "z-loss": ("bamba", {"z_loss_coefficient": 0.1, "attn_layer_indices": [0, 1, 2]}),
}


QUICK = ("tied", "softcap")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in HEADS]
)
def test_heads_of_all_kinds(name, twins, tools):
    arch, overrides = HEADS[name]
    model, stock = twins(arch, overrides=overrides)
    for padded in ("left", "right"):
        batch = tools.make_batch(BATCH, padded=padded, device="cpu")
        check_steps(tools.run_step(model, batch), tools.run_step(stock, batch), tools)
    check_heads(model)
    assert model.config.tie_word_embeddings == (name in ("tied", "scale", "softcap"))


def test_the_z_loss_of_a_model_is_not_left_out(twins, tools):
    arch, overrides = HEADS["z-loss"]
    model, _ = twins(arch, overrides=overrides)
    without = tools.make_model(arch, **{**overrides, "z_loss_coefficient": 0.0})
    batch = tools.make_batch(BATCH, padded="left", device="cpu")
    with torch.no_grad():
        logits = without(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    z_loss = 0.1 * logits.logsumexp(-1).square().mean()
    difference = tools.run_step(model, batch).loss - tools.run_step(without, batch).loss
    torch.testing.assert_close(difference.float(), z_loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainable", ["trunk", "head", pytest.param("embedding", marks=pytest.mark.slow)])
def test_gradients_for_exactly_what_is_trained(trainable, twins, tools):
    model, stock = twins("llama")
    for each in (model, stock):
        for name, parameter in each.named_parameters():
            is_trunk = "lm_head" not in name and "embed" not in name
            parameter.requires_grad_(
                {"trunk": is_trunk, "head": "lm_head" in name, "embedding": "embed" in name}[trainable]
            )
    batch = tools.make_batch(BATCH, padded="left", device="cpu")
    check_steps(tools.run_step(model, batch), tools.run_step(stock, batch), tools)
    check_heads(model)


def run_backward(model, batch, times: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss * scale
    for turn in range(times):
        loss.backward(retain_graph=turn + 1 < times)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_backward_again_and_a_scaled_loss(twins, tools):
    """A tied embedding gathers the gradients of both its uses, in each pass."""
    model, stock = twins("llama", overrides={"tie_word_embeddings": True})
    batch = tools.make_batch(BATCH, padded="none", device="cpu")
    for times, scale in ((2, 1.0), (1, 1024.0), (3, -0.25)):
        ours, theirs = run_backward(model, batch, times, scale), run_backward(stock, batch, times, scale)
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert tools.relative(ours[name], gradient) < 1e-4, (name, times, scale)
    check_heads(model)


@pytest.mark.slow
def test_gradients_accumulate_over_batches(twins, tools):
    model, stock = twins("llama", overrides={"tie_word_embeddings": True})
    for each in (model, stock):
        each.zero_grad(set_to_none=True)
        for padded in ("none", "left", "right"):
            (each(**tools.make_batch(BATCH, padded=padded, device="cpu")).loss / 3).backward()
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert tools.relative(ours.grad, theirs.grad) < 1e-4, name


def test_a_second_derivative_is_an_error_that_says_so(twins, tools):
    model, _ = twins("llama")
    loss = model(**tools.make_batch(BATCH, padded="none", device="cpu")).loss

    def differentiate_twice() -> None:
        (gradient,) = torch.autograd.grad(loss, [model.lm_head.weight], create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises(fxopt.FxoptError, match=r"second derivatives .* are not implemented"):
        differentiate_twice()


@pytest.mark.parametrize("count", [None, pytest.param(torch.tensor(7), marks=pytest.mark.slow)])
def test_a_batch_without_labels_trains_nothing(count, twins, tools):
    """A mean over no token is NaN and a sum 0, as in stock; the gradients are zero either way."""
    model, stock = twins("llama")
    batch = tools.make_batch(BATCH, padded="none", device="cpu")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    if count is not None:
        batch["num_items_in_batch"] = count
    for each in (model, stock):
        each.zero_grad(set_to_none=True)
    ours, theirs = model(**batch).loss, stock(**batch).loss
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    ours.backward()
    theirs.backward()
    for (name, mine), their in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(mine.grad, their.grad), name


def test_logits_to_keep(twins, tools):
    model, stock = twins("llama")
    batch = tools.make_batch(BATCH, padded="left", device="cpu")
    short = {**batch, "labels": batch["labels"][:, -5:], "logits_to_keep": 5}
    check_steps(tools.run_step(model, short), tools.run_step(stock, short), tools)
    for each in (model, stock):
        assert each(**short).logits.shape == (2, 5, 256)
    check_heads(model)
    del batch["labels"]
    with torch.no_grad():
        ours, theirs = (each(**batch, logits_to_keep=3).logits for each in (model, stock))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_model_in_bfloat16_returns_the_dtype_of_stock(twins, tools):
    model, stock = twins("llama")
    batch = tools.make_batch(BATCH, padded="none", device="cpu")
    for dtype in (torch.bfloat16, torch.float16):
        ours, theirs = (each.to(dtype)(**batch) for each in (model, stock))
        assert ours.loss.dtype == theirs.loss.dtype
        assert ours.logits.dtype == theirs.logits.dtype
    check_heads(model)
