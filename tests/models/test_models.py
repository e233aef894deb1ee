"""Whole models against stock: expected sites, losses, all gradients, bytes saved, and no fallback."""

from __future__ import annotations

import collections
import itertools
import statistics
from typing import Any

import pytest
import torch

import fxopt

LAYERS = 3


def sites(**per_block: int) -> dict[str, int]:
    """Return the sites of a model: `per_block` in each layer, then one more norm of the blocks' kind and the head."""
    counts = {kind: count * LAYERS for kind, count in per_block.items()}
    (norm,) = (kind for kind in counts if kind.endswith("_norm"))
    return {**counts, norm: counts[norm] + 1, "linear_cross_entropy": 1}


SITES = {
    "llama": sites(rms_norm=2, rope=2, attention=1, glu=1),
    "mistral": sites(rms_norm=2, rope=2, attention=1, glu=1),
    "qwen2": sites(rms_norm=2, rope=2, attention=1, glu=1),
    "qwen3": sites(rms_norm=4, rope=2, attention=1, glu=1),
    "gemma2": sites(rms_norm=4, rope=2, attention=1, glu=1),
    "gemma3_text": sites(rms_norm=6, rope=2, attention=1, glu=1),
    "phi3": sites(rms_norm=2, rope=2, attention=1, glu=1),
    "olmo2": sites(rms_norm=4, rope=2, attention=1, glu=1),
    "granite": sites(rms_norm=2, rope=2, attention=1, glu=1),
    "cohere": sites(rms_norm=1, rope=2, attention=1, glu=1),
    "glm4": sites(rms_norm=4, rope=2, attention=1, glu=1),
    "smollm3": {**sites(rms_norm=2, rope=2, attention=1, glu=1), "rope": 2 * (LAYERS - 1)},
    "gpt_neox": sites(layer_norm=2, rope=2, attention=1, activation=1),
    "stablelm": sites(layer_norm=2, rope=2, attention=1, glu=1),
    "starcoder2": sites(layer_norm=2, rope=2, attention=1, activation=1),
    "single_level": sites(rms_norm=2, attention=1, glu=1),
}
"""Counted by hand in the models' sources: per block, and one norm and one loss after them."""
ADDS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"), LAYERS)
ADDS |= dict.fromkeys(("granite", "glm4", "smollm3", "single_level"), LAYERS)
"""Norms that became `add_rms_norm`: in a block, those of a sum that the block itself makes; none elsewhere."""
JOINS = dict.fromkeys(("qwen3", "gemma3_text", "olmo2"), LAYERS)
"""Blocks whose norms of q and k, and the rotation that reads them, became `norm_rope`: two sites of each kind."""


slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
QUICK = ("llama", "gemma2", "single_level")
ALIKE = ("mistral", "granite", "stablelm", "starcoder2")
"""Those whose forms others of the table have too."""


def tiered(*archs: str, slower: tuple[str, ...]) -> list[Any]:
    """Return `archs`: llama for each run, `slower` ones for `make test-all`, the others for exhaustive runs."""
    return [
        arch if arch == "llama" else pytest.param(arch, marks=slow if arch in slower else exhaustive)
        for arch in archs
    ]


HALF = (("qwen3", "bf16"), ("cohere", "bf16"), ("gpt_neox", "bf16"), ("gemma2", "fp16"), ("olmo2", "fp16"))
"""Of weights in half precision: one of each form of norm, by turns."""


def mark_half(arch: str, name: str) -> Any:
    """Return the mark of a model in one of two dtypes: llama takes both, those of `HALF` one."""
    if arch == "llama":
        return () if name == "bf16" else slow
    return slow if (arch, name) in HALF else exhaustive


TOGETHER = ("llama", "qwen2", "gemma2", "olmo2", "single_level")
"""What is judged together as well: of one model alone, 16 draws say no more than its standard error."""
APART = [arch for arch in SITES if arch not in TOGETHER]
SHAPES = ((2, 24), (3, 17), (1, 40))
"""The first is the one captured; the others are unseen at capture."""
PADDINGS = ("none", "left", "right")
BATCHES = (((2, 24), "none"), ((2, 24), "left"), ((3, 17), "right"))
"""What models train on: without a mask and with one, and of sizes unseen at capture, where a capture for any size
takes seven times as long as one for its own. Those of `TOGETHER` take `SHAPES` under all `PADDINGS` as well.
"""
RESIZED = ("llama", "phi3", "gpt_neox")
"""Models that train on all of `BATCHES`: llama, one with packed projections, and one with layer norms. Another size of
the others is exhaustive, but for gemma2 and single_level in `test_every_shape_under_every_padding_trains_as_stock`.
"""

SAVED_LESS_BY_INDUCTOR_ONLY = ("gpt_neox", "starcoder2")
"""No gated unit, norms that torch's own op saves as little of, and activations whose results are computed again:
not on the plain lowering, which saves more than stock with nothing rewritten (596,356 against 522,628 bytes for
gpt_neox, whose cache copies v out of the packed projection in stock)."""


def count_sites(report: fxopt.Report) -> dict[str, int]:
    """Return the rewritten sites per pattern; anything else fails."""
    counts: collections.Counter[str] = collections.Counter()
    for site in report.sites:
        assert site.status == "rewritten", f"{site.pattern} at {site.module} ({site.location}): {site.reason}"
        counts[site.pattern] += site.count
    return dict(counts)


@pytest.mark.parametrize(
    ("arch", "batches"),
    [
        *(
            pytest.param(
                arch,
                BATCHES if arch in RESIZED else BATCHES[:2],
                id=arch,
                marks=() if arch in QUICK else exhaustive if arch in ALIKE else slow,
            )
            for arch in SITES
        ),
        *(
            pytest.param(arch, BATCHES[::2], id=f"{arch}, another size", marks=exhaustive)
            for arch in SITES
            if arch not in RESIZED
        ),
    ],
)
def test_fp32_steps_equal_stock_every_site_is_rewritten_and_less_is_saved(
    arch, batches, device, twins, tools
):
    model, stock = twins(arch, device)
    for shape, padded in batches:
        check_step(model, stock, tools.make_batch(shape, padded=padded, device=device), tools)
    if device == "cuda" or arch not in SAVED_LESS_BY_INDUCTOR_ONLY:
        batch = tools.make_batch((2, 24), padded="none", device=device)
        assert tools.saved_bytes(model, batch) < tools.saved_bytes(stock, batch)
    report = fxopt.explain(model)
    assert count_sites(report) == SITES[arch]
    assert sum(site.count for site in report.sites if site.op == "add_rms_norm") == ADDS.get(arch, 0)
    joined = collections.Counter(
        site.pattern for site in report.sites if site.op == "norm_rope" for _ in range(site.count)
    )
    assert joined == collections.Counter(rms_norm=2 * JOINS.get(arch, 0), rope=2 * JOINS.get(arch, 0))
    assert report.fallbacks == ()
    assert all(site.proof is not None and site.proof.passed for site in report.sites)


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=slow if arch in ("gemma2", "single_level") else exhaustive)
        for arch in TOGETHER
    ],
)
def test_every_shape_under_every_padding_trains_as_stock(arch, device, twins, tools):
    model, stock = twins(arch, device)
    for shape, padded in itertools.product(SHAPES, PADDINGS):
        check_step(model, stock, tools.make_batch(shape, padded=padded, device=device), tools)
    assert fxopt.explain(model).fallbacks == ()


def check_step(model: Any, stock: Any, batch: dict[str, torch.Tensor], tools: Any) -> None:
    """Check that loss and all gradients of one step are stock's."""
    ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
    assert tools.relative(ours.loss, theirs.loss) < 1e-5
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert tools.relative(ours.gradients[name], gradient) < 1e-4, (name, batch["input_ids"].shape)


AUTOCAST = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.gpu)], ids=["bf16", "fp16"]
)


@AUTOCAST
@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param(SHAPES[:1], id="one size", marks=slow),
        pytest.param(SHAPES, id="three sizes", marks=exhaustive),
    ],
)
def test_models_together_are_no_further_from_fp32_than_stock_under_autocast(shapes, dtype, device, tools):
    """The mean over all draws of all models has no tolerance: ours is at most stock's.

    Measured on a CPU in bf16: the mean is -0.02, five of its standard errors below zero.
    """
    if dtype is torch.float16 and device == "cpu":
        pytest.skip("float16 autocast with scaled losses is a GPU matter; the GPU variant runs under -m gpu")
    means: list[float] = []
    for arch in TOGETHER:
        model = fxopt.optimize(tools.make_model(arch).to(device))
        gradients, loss = tools.measure_excess(model, dtype, device, autocast=True, arch=arch, shapes=shapes)
        assert not gradients.is_shown, (arch, gradients)
        assert gradients.standard_error < tools.most_standard_error, (arch, gradients)
        assert not loss.is_shown, (arch, loss)
        assert fxopt.explain(model).fallbacks == ()
        means.append(gradients.mean)
    assert statistics.mean(means) <= 0, dict(zip(TOGETHER, means, strict=True))


@AUTOCAST
@pytest.mark.parametrize("arch", tiered("llama", "single_level", *APART, slower=("gpt_neox",)))
def test_autocast_is_no_further_from_fp32_than_stock(arch, dtype, device, tools):
    if dtype is torch.float16 and device == "cpu":
        pytest.skip("float16 autocast with scaled losses is a GPU matter; the GPU variant runs under -m gpu")
    model = fxopt.optimize(tools.make_model(arch).to(device))
    gradients, loss = tools.measure_excess(model, dtype, device, autocast=True, arch=arch)
    assert not gradients.is_shown, gradients
    assert gradients.standard_error < tools.most_standard_error, gradients
    assert not loss.is_shown, loss
    assert fxopt.explain(model).fallbacks == ()


@pytest.mark.parametrize(
    ("dtype", "arch"),
    [
        pytest.param(dtype, arch, id=f"{name}-{arch}", marks=mark_half(arch, name))
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))
        for arch in SITES
    ],
)
def test_half_precision_weights_train_within_stocks_own_error(arch, dtype, device, tools):
    model = fxopt.optimize(tools.make_model(arch).to(device, dtype))
    gradients, loss = tools.measure_excess(model, dtype, device, autocast=False, arch=arch)
    assert not gradients.is_shown, gradients
    assert gradients.standard_error < tools.most_standard_error, gradients
    assert not loss.is_shown, loss
    assert fxopt.explain(model).fallbacks == ()


@slow
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


@slow
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


@slow
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


COMPLEX = {
    "llama4_text": dict(num_local_experts=2, num_experts_per_tok=1, no_rope_layers=[1] * LAYERS),
    "deepseek_v2": dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8)
    | dict(v_head_dim=16, first_k_dense_replace=LAYERS, num_key_value_heads=4),
}


@pytest.mark.parametrize(
    ("arch", "shapes"),
    [
        ("deepseek_v2", SHAPES[:1]),
        pytest.param("llama4_text", SHAPES[:2], marks=exhaustive),
        pytest.param("deepseek_v2", SHAPES[:2], marks=exhaustive),
    ],
)
def test_products_of_complex_numbers_are_rotations(arch, shapes, twins, tools):
    model, stock = twins(arch, overrides=COMPLEX[arch])
    for shape in shapes:
        batch = tools.make_batch(shape, padded="none", device="cpu")
        ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
        assert tools.relative(ours.loss, theirs.loss) < 1e-5
        for name, gradient in theirs.gradients.items():
            assert tools.relative(ours.gradients[name], gradient) < 1e-4, name
    turned = [site for site in fxopt.explain(model).sites if site.pattern == "rope"]
    assert {site.status for site in turned} == {"rewritten"}
    assert sum(site.count for site in turned) == 2 * LAYERS


@pytest.mark.parametrize(
    "arch", tiered(*SITES, slower=("gemma2", "phi3", "cohere", "gpt_neox", "single_level"))
)
def test_nan_and_inf_come_out_as_in_stock(arch, device, twins, tools):
    """Of one token: loss, all gradients and logits have the NaN and inf of stock, and no others."""
    model, stock = twins(arch, device)
    table = next(name for name, _ in stock.named_parameters())
    batch = tools.make_batch((2, 24), padded="none", device=device)
    batch["input_ids"][0, 2] = 5
    for poison in (float("nan"), float("inf"), float("-inf")):
        for each in (model, stock):
            with torch.no_grad():
                each.get_parameter(table)[5, 3] = poison
        ours, theirs = tools.run_step(model, batch), tools.run_step(stock, batch)
        pairs = {name: (ours.gradients[name], theirs.gradients[name]) for name in theirs.gradients}
        pairs["loss"] = (ours.loss, theirs.loss)
        with torch.no_grad():
            pairs["logits"] = tuple(each(**batch).logits for each in (model, stock))
        assert ours.gradients.keys() == theirs.gradients.keys()
        for name, (found, expected) in pairs.items():
            assert torch.equal(found.isnan(), expected.isnan()), (name, poison)
            assert torch.equal(found.isposinf(), expected.isposinf()), (name, poison)
            assert torch.equal(found.isneginf(), expected.isneginf()), (name, poison)
        assert not theirs.loss.isfinite()
    assert fxopt.explain(model).fallbacks == ()
