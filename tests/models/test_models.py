"""Whole models against stock: expected sites, losses, all gradients, bytes saved, and no fallback."""

from __future__ import annotations

import collections

import pytest
import torch

import fxopt

LAYERS = 3
SITES = {
    "llama": {"rms_norm": 2 * LAYERS + 1, "glu": LAYERS, "attention": LAYERS, "linear_cross_entropy": 1},
    "qwen2": {"rms_norm": 2 * LAYERS + 1, "glu": LAYERS, "attention": LAYERS, "linear_cross_entropy": 1},
    "gemma2": {"rms_norm": 4 * LAYERS + 1, "glu": LAYERS, "attention": LAYERS, "linear_cross_entropy": 1},
    "olmo2": {"rms_norm": 4 * LAYERS + 1, "glu": LAYERS, "attention": LAYERS, "linear_cross_entropy": 1},
    "single_level": {
        "rms_norm": 2 * LAYERS + 1,
        "glu": LAYERS,
        "attention": LAYERS,
        "linear_cross_entropy": 1,
    },
}
"""Counted by hand in the models' sources: per block, and one norm and one loss after them."""
SHAPES = ((2, 24), (3, 17), (1, 40))
"""The first is the one captured; the others are unseen at capture."""

NOISE = 1.1
"""Two standard errors of the ratio of two means over six draws that scatter by 10 % each."""


def count_sites(report: fxopt.Report) -> dict[str, int]:
    """Return the rewritten sites per pattern; anything else fails."""
    counts: collections.Counter[str] = collections.Counter()
    for site in report.sites:
        assert site.status == "rewritten", f"{site.pattern} at {site.module} ({site.location}): {site.reason}"
        counts[site.pattern] += site.count
    return dict(counts)


@pytest.mark.parametrize("arch", SITES)
def test_fp32_steps_equal_stock_and_every_site_is_rewritten(arch, device, twins, tools):
    model, stock = twins(arch, device)
    for shape in SHAPES:
        for padded in ("none", "left", "right"):
            batch = tools.make_batch(shape, padded=padded, device=device)
            ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
            assert tools.relative(ours.loss, theirs.loss) < 1e-5
            assert ours.gradients.keys() == theirs.gradients.keys()
            for name, gradient in theirs.gradients.items():
                assert tools.relative(ours.gradients[name], gradient) < 1e-4, (name, shape, padded)
    report = fxopt.explain(model)
    assert count_sites(report) == SITES[arch]
    assert report.fallbacks == ()
    assert all(site.proof is not None and site.proof.passed for site in report.sites)


@pytest.mark.parametrize("arch", SITES)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.gpu)], ids=["bf16", "fp16"]
)
def test_autocast_is_no_further_from_fp32_than_stock(arch, dtype, device, tools):
    if dtype is torch.float16 and device == "cpu":
        pytest.skip("float16 autocast with scaled losses is a GPU matter; the GPU variant runs under -m gpu")
    model = fxopt.optimize(tools.make_model(arch).to(device))
    for shape in SHAPES[:2]:
        ours, theirs = tools.mean_distances(model, dtype, device, autocast=True, arch=arch, shape=shape)
        assert ours <= theirs * NOISE
    assert fxopt.explain(model).fallbacks == ()


@pytest.mark.parametrize("arch", SITES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_weights_train_within_stocks_own_error(arch, dtype, device, tools):
    model = fxopt.optimize(tools.make_model(arch).to(device, dtype))
    ours, theirs = tools.mean_distances(model, dtype, device, autocast=False, arch=arch)
    assert ours <= theirs * NOISE
    assert fxopt.explain(model).fallbacks == ()


@pytest.mark.parametrize("arch", SITES)
def test_fewer_bytes_are_saved_for_backward(arch, device, twins, tools):
    model, stock = twins(arch, device)
    batch = tools.make_batch((2, 24), padded="none", device=device)
    tools.run_step(model, batch)  # Dynamo captures nothing while hooks on saved tensors are set
    assert tools.saved_bytes(model, batch) < tools.saved_bytes(stock, batch)
    assert fxopt.explain(model).fallbacks == ()


def test_frozen_weights_get_no_gradient_and_the_rest_is_right(twins, tools):
    model, stock = twins("llama")
    for each in (model, stock):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("norm" not in name and "lm_head" not in name and "embed" not in name)
    batch = tools.make_batch((2, 24), padded="none", device="cpu")
    ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert tools.relative(ours.gradients[name], gradient) < 1e-4, name
    assert fxopt.explain(model).fallbacks == ()


def test_a_trainable_head_on_a_frozen_trunk_is_trained(twins, tools):
    model, stock = twins("llama")
    for each in (model, stock):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("lm_head" in name)
    batch = tools.make_batch((2, 24), padded="none", device="cpu")
    ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
    assert ours.gradients.keys() == theirs.gradients.keys() == {"lm_head.weight"}
    assert tools.relative(ours.gradients["lm_head.weight"], theirs.gradients["lm_head.weight"]) < 1e-4


def test_num_items_in_batch_divides_the_loss_as_in_stock(twins, tools):
    model, stock = twins("llama")
    batch = tools.make_batch((2, 24), padded="right", device="cpu")
    for count in (torch.tensor(31), 31, torch.tensor(7)):
        ours, theirs = (tools.run_step(m, {**batch, "num_items_in_batch": count}) for m in (model, stock))
        assert tools.relative(ours.loss, theirs.loss) < 1e-5
        assert tools.relative(ours.gradients["lm_head.weight"], theirs.gradients["lm_head.weight"]) < 1e-4
    report = fxopt.explain(model)
    assert count_sites(report)["linear_cross_entropy"] == 1


def test_tied_weights_and_softcap_and_scale(twins, tools):
    for arch, overrides in (
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
    ):
        model, stock = twins(arch, overrides=overrides)
        batch = tools.make_batch((2, 24), padded="none", device="cpu")
        ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
        assert tools.relative(ours.loss, theirs.loss) < 1e-5
        for name, gradient in theirs.gradients.items():
            assert tools.relative(ours.gradients[name], gradient) < 1e-4, (arch, name)
        sites = {s.pattern: s for s in fxopt.explain(model).sites}
        assert sites["linear_cross_entropy"].op == "linear_cross_entropy", arch


def test_nan_and_inf_come_out_as_in_stock(twins, tools):
    for poison in (float("nan"), float("inf")):
        model, stock = twins("llama")
        for each in (model, stock):
            with torch.no_grad():
                each.model.embed_tokens.weight[5, 3] = poison
        batch = tools.make_batch((2, 24), padded="none", device="cpu")
        batch["input_ids"][0, 2] = 5
        ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
        assert torch.equal(ours.loss.isnan(), theirs.loss.isnan())
        assert torch.equal(ours.loss.isinf(), theirs.loss.isinf())
