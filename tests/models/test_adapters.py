"""Models with adapters, their layers dense, in four bits and in eight: what becomes of each case, against stock."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt.report.records import MODEL_REGION

peft: Any = pytest.importorskip("peft")

LAYERS, PROJECTIONS = 3, 7
ALL_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Change = Callable[[Any, dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to adapt a tiny model, and what it becomes: adapted layers, joins of a block, why others stay stock."""

    adapters: int = LAYERS * PROJECTIONS
    decoded: int = 0
    joins: int = 4
    """Of the captured blocks, which are two where the first one's input needs no gradient."""
    reason: str = ""
    """A regular expression: how far a capture comes depends on the version of torch."""
    arch: str = "llama"
    base: dict[str, Any] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    change: Change | None = None


def add_second(model: Any, options: dict[str, Any]) -> None:
    model.add_adapter("second", peft.LoraConfig(**options | {"r": 6, "lora_alpha": 3}))
    model.base_model.set_adapter(["default", "second"])


def disable(model: Any, options: dict[str, Any]) -> None:
    model.base_model.disable_adapter_layers()
    train_norms(model)


def merge(model: Any, options: dict[str, Any]) -> None:
    model.merge_adapter()
    train_norms(model)


def train_norms(model: Any) -> None:
    """Let something be trained where the adapters are not."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)


def in_four_bits(
    quant_type: str = "nf4", nested: bool = True, blocksize: int = 64, storage: str = "uint8"
) -> dict[str, Any]:
    return {
        "bits": 4,
        "quant_type": quant_type,
        "nested": nested,
        "blocksize": blocksize,
        "storage": storage,
    }


FOUR_BITS: dict[str, Any] = {"decoded": LAYERS * PROJECTIONS}
CASES = {
    "dense": Case(),
    "bias on the base": Case(arch="qwen2"),
    "trained bias on the base": Case(arch="qwen2", options={"bias": "all"}),
    "rank-stabilized": Case(options={"use_rslora": True}),
    "bias on B": Case(options={"lora_bias": True}, joins=2),
    "dropout": Case(options={"lora_dropout": 0.1}, joins=2),
    "two adapters": Case(change=add_second),
    "disabled": Case(change=disable, adapters=0, joins=0),
    "merged": Case(change=merge, adapters=0, joins=0),
    "one layer": Case(options={"layers_to_transform": [1]}, adapters=PROJECTIONS, joins=2),
    "two projections": Case(options={"target_modules": ["q_proj", "v_proj"]}, adapters=2 * LAYERS, joins=2),
    "head and embedding": Case(
        options={"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, adapters=LAYERS + 1, joins=0
    ),
    "a trained head": Case(
        options={"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        adapters=LAYERS,
        joins=0,
    ),
    "dora": Case(options={"use_dora": True}, adapters=0, joins=0),
    "nf4, dora": Case(
        base=in_four_bits(),
        options={"use_dora": True},
        adapters=0,
        joins=0,
        reason="startswith|keeps values in Python objects",
    ),
    "nf4": Case(base=in_four_bits(), **FOUR_BITS),
    "nf4, one scale": Case(base=in_four_bits(nested=False), **FOUR_BITS),
    "nf4, blocks of 4096": Case(base=in_four_bits(blocksize=4096), **FOUR_BITS),
    "fp4": Case(base=in_four_bits("fp4"), **FOUR_BITS),
    "fp4, one scale": Case(base=in_four_bits("fp4", nested=False), **FOUR_BITS),
    "nf4, stored as of a floating dtype": Case(base=in_four_bits(storage="bfloat16"), **FOUR_BITS),
    "nf4, bias on the base": Case(arch="qwen2", base=in_four_bits(), **FOUR_BITS),
    "nf4, dropout": Case(base=in_four_bits(), options={"lora_dropout": 0.1}, **FOUR_BITS | {"joins": 2}),
    "nf4, two adapters": Case(base=in_four_bits(), change=add_second, **FOUR_BITS),
    "nf4, two projections": Case(
        base=in_four_bits(),
        options={"target_modules": ["q_proj", "v_proj"]},
        **FOUR_BITS | {"adapters": 2 * LAYERS, "joins": 2},
    ),
    "eight bits": Case(base={"bits": 8}, adapters=0, joins=0, reason="keeps values in Python objects"),
}


def quantize(
    model: Any,
    bits: int,
    quant_type: str = "",
    nested: bool = True,
    blocksize: int = 64,
    storage: str = "uint8",
) -> None:
    """Put layers of bitsandbytes in the place of all linear layers but the head."""
    library: Any = pytest.importorskip("bitsandbytes").nn
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or "lm_head" in name:
            continue
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        if bits == 8:
            new = library.Linear8bitLt(*sizes, has_fp16_weights=False)
            new.load_state_dict(layer.state_dict())
        else:
            packed = {"quant_storage": getattr(torch, storage)}
            new = library.Linear4bit(*sizes, compute_dtype=torch.float32, **packed)
            options = dict(compress_statistics=nested, quant_type=quant_type, blocksize=blocksize, **packed)
            new.weight = library.Params4bit(layer.weight.data, requires_grad=False, module=new, **options)
            new.bias = layer.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)


def make_adapted(tools: Any, case: Case) -> Any:
    """Return the tiny model of a case; the same weights every time, none of them zero."""
    model = tools.make_model(case.arch)
    if case.base is not None:
        quantize(model, **case.base)
    options = {"r": 4, "target_modules": ALL_PROJECTIONS, "task_type": "CAUSAL_LM", **case.options}
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "embedding_A" in name:
            nn.init.normal_(parameter, std=0.1)
    if case.change is not None:
        case.change(model, options)
    return model.train()


BATCHES = (((2, 24), "right"), ((3, 17), "none"))
RESIZED = ("dense",)
"""Cases that train on sizes unseen at capture too, where a capture for any size takes most of a test's time."""
RESIZED_TOO = (
    "head and embedding",
    "trained bias on the base",
    "bias on B",
    "dropout",
    "two adapters",
    "dora",
    "nf4",
    "eight bits",
)
"""With those above, one of each form of graph, as scales and codes change no form."""
CROSSED = ("nf4, dora", "nf4, one scale", "fp4", "nf4, dropout", "nf4, two adapters", "nf4, two projections")
"""Products of what other cases hold apart."""
ALIKE = ("rank-stabilized", "one layer", "nf4, bias on the base", "nf4, stored as of a floating dtype")
"""Cases whose graphs have the forms of others, but for a constant or for where they stand."""
slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive


def tiered(names: Any, *slower: str) -> list[Any]:
    """Return `names`: `slower` ones for `make test-all`, the others for exhaustive runs."""
    return [pytest.param(name, marks=slow if name in slower else exhaustive) for name in names]


@pytest.mark.parametrize(
    ("name", "batches"),
    [
        *(pytest.param(name, BATCHES[:1], id=f"{name}, one size") for name in ("dense", "nf4")),
        *(
            pytest.param(
                name,
                BATCHES if name in RESIZED else BATCHES[:1],
                id=name,
                marks=exhaustive if name in (*CROSSED, *ALIKE) else slow,
            )
            for name in CASES
            if name != "nf4"
        ),
        *(
            pytest.param(name, BATCHES, id=f"{name}, two sizes", marks=exhaustive)
            for name in (*RESIZED_TOO, "nf4, blocks of 4096")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_case_is_rewritten_or_left_with_a_reason_and_trains_as_stock(
    name: str, batches: Any, tools: Any
) -> None:
    case = CASES[name]
    ours, theirs = make_adapted(tools, case), make_adapted(tools, case)
    fxopt.optimize(ours)
    for shape, padded in batches:
        batch = tools.make_batch(shape, padded=padded, device="cpu")
        torch.manual_seed(3)
        step = tools.run_step(ours, batch)
        torch.manual_seed(3)
        stock = tools.run_step(theirs, batch)
        assert tools.relative(step.loss, stock.loss) < 1e-5
        assert step.gradients.keys() == stock.gradients.keys()
        assert step.gradients
        for parameter, gradient in stock.gradients.items():
            assert tools.relative(step.gradients[parameter], gradient) < 1e-4, parameter
    report = fxopt.explain(ours)
    counts: collections.Counter[str] = collections.Counter()
    for site in report.sites:
        if site.status == "rewritten":
            counts[site.pattern] += site.count
        else:
            assert site.reason
    for pattern, expected in (("lora_linear", case.adapters), ("dequantize_4bit", case.decoded)):
        assert counts[pattern] >= expected if case.reason else counts[pattern] == expected
    assert sum(rewrite.pattern == "join_lora_linear" for rewrite in report.rewrites) == case.joins
    reasons = " ".join(fallback.reason for fallback in report.fallbacks)
    assert re.search(case.reason, reasons)
    assert bool(case.reason) == bool(report.fallbacks)


HALF: dict[str, dict[str, Any]] = {
    "dense, fp32 adapters under autocast": {"base": "dense", "adapters": torch.float32},
    "dense, bf16 adapters": {"base": "dense", "adapters": torch.bfloat16},
    "nf4, fp32 adapters under autocast": {"base": "nf4", "adapters": torch.float32},
    "nf4, bf16 adapters": {"base": "nf4", "adapters": torch.bfloat16},
    "bias on the base, fp32 adapters under autocast": {"base": "bias on the base", "adapters": torch.float32},
    "rank-stabilized, bf16 adapters": {"base": "rank-stabilized", "adapters": torch.bfloat16},
    "two adapters, fp32, under autocast": {"base": "two adapters", "adapters": torch.float32},
    "bias on B, bf16": {"base": "bias on B", "adapters": torch.bfloat16},
}
SLOW_HALF = ("dense, fp32 adapters under autocast", "nf4, bf16 adapters")
"""Each base and each dtype; what the others add is a case above, in fp32."""


@pytest.mark.parametrize("name", tiered(HALF, *SLOW_HALF))
@pytest.mark.filterwarnings("ignore")
def test_in_bf16_no_gradient_is_farther_from_fp32_than_stocks(name: str, tools: Any) -> None:
    case, dtype = CASES[HALF[name]["base"]], HALF[name]["adapters"]
    ours, stock, exact = (make_adapted(tools, case) for _ in range(3))
    for model in (ours, stock):
        lower(model, dtype)
    fxopt.optimize(ours)
    autocast = torch.bfloat16 if dtype == torch.float32 else None
    gradients: list[float] = []
    losses: list[float] = []
    for seed in range(tools.draws):
        redraw(seed, ours, stock, exact)
        batch = tools.make_batch((2, 24), padded="left" if seed % 2 else "right", device="cpu")
        reference = tools.run_step(exact, batch)
        step, stock_step = (tools.run_step(model, batch, autocast) for model in (ours, stock))
        assert step.gradients.keys() == reference.gradients.keys()
        gradients.append(tools.gradient_excess(step, stock_step, reference))
        errors = [tools.relative(each.loss, reference.loss) for each in (step, stock_step)]
        losses.append(errors[0] - errors[1])
    excess = tools.excess_of(gradients)
    assert excess.standard_error < tools.most_standard_error
    assert not excess.is_shown, excess
    assert not tools.excess_of(losses).is_shown
    report = fxopt.explain(ours)
    assert report.fallbacks == ()
    adapted = [site for site in report.sites if site.pattern == "lora_linear"]
    assert {site.status for site in adapted} == {"rewritten"}


def lower(model: Any, adapters: torch.dtype) -> None:
    """Give the weights of the base bf16 and those of the adapters `adapters`."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(adapters if "lora" in name else torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.bfloat16


def redraw(seed: int, *models: Any) -> None:
    """Give all models the same new weights, which bf16 holds exactly, but for those in four bits."""
    for named in zip(*(model.named_parameters() for model in models), strict=True):
        name, first = named[0]
        if not first.is_floating_point():
            continue
        generator = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, name)))
        scale, middle = (0.1, 1.0) if "norm" in name else (0.05, 0.0)
        drawn = (torch.randn(first.shape, generator=generator) * scale + middle).bfloat16()
        for _, parameter in named:
            parameter.data.copy_(drawn)


@slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verify", ["on", "off"])
def test_weights_of_torchao_are_left_with_a_reason_and_train_as_stock(verify: str, tools: Any) -> None:
    torchao: Any = pytest.importorskip("torchao.quantization")
    steps: list[Any] = []
    for optimized in (True, False):
        model = tools.make_model("llama")
        torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
        torch.manual_seed(1)
        options = {"r": 4, "target_modules": ALL_PROJECTIONS, "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(model, peft.LoraConfig(**options, init_lora_weights=False)).train()
        if optimized:
            fxopt.optimize(model, verify=verify)
        batch = tools.make_batch((2, 24), padded="right", device="cpu")
        steps.append(tools.run_step(model, batch))
        if optimized:
            report = fxopt.explain(model)
            assert report.fallbacks == ()
            sites = [site for site in report.sites if site.pattern == "lora_linear"]
            assert sum(site.count for site in sites) == LAYERS * PROJECTIONS
            assert all("is of class Int8Tensor" in site.reason for site in sites)
            assert {site.status for site in report.sites if site not in sites} == {"rewritten"}
    ours, theirs = steps
    assert tools.relative(ours.loss, theirs.loss) < 1e-5
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert tools.relative(ours.gradients[name], gradient) < 1e-4, name


HIDDEN, INNER, KEYS, TOKENS = 64, 128, 32, 48
HEADS = 4
SAVED = {"block's input": HIDDEN, "q": HIDDEN, "k": KEYS, "v": KEYS, "attention": HIDDEN, "sum": HIDDEN}
SAVED |= {"gate": INNER, "up": INNER}
NORMED = {**SAVED, "attention's projection": HIDDEN, "MLP's result": HIDDEN}
DROPPED = 6 * HIDDEN + INNER
"""Items a token that dropout drops from, before the seven projections; a bit of each is saved."""
SAVED_WIDTHS = {
    "dense": (SAVED, 2),
    "nf4": (SAVED, 2),
    "two adapters": (SAVED, 2),
    "dropout": (SAVED, 2),
    "nf4, dropout": (SAVED, 2),
    "bias on the base": (SAVED, 2),
    "qwen3": (SAVED, 2),
    "olmo2": (NORMED, 2),
    "gemma2": (NORMED, 4),
}
"""What a block may save per token, in bf16; and the norms of which each row saves one fp32 number, as each row of
attention does. Blocks that norm the results of attention and MLP save what these norms read. q and k are saved once,
before or after their norms and rotation."""


@pytest.mark.parametrize("base", tiered(SAVED_WIDTHS, "dense", "nf4", "dropout", "gemma2"))
@pytest.mark.filterwarnings("ignore")
def test_a_block_saves_what_the_table_says(base: str, tools: Any) -> None:
    widths, norms = SAVED_WIDTHS[base]
    case = CASES.get(base, Case(arch=base))
    model = make_in_bf16(tools, case)
    batch = tools.make_batch((2, 24), padded="none", device="cpu")
    tools.run_step(model, batch, torch.bfloat16)
    (first, *_, last) = model.base_model.model.model.layers
    totals: dict[Any, int] = {}
    with torch.autocast("cpu", torch.bfloat16):
        for block in (first, last):
            totals[block] = saved_by_block(model, block, batch)
    expected = sum(widths.values()) * TOKENS * 2 + HEADS * TOKENS * 4 + norms * TOKENS * 4
    if "lora_dropout" in case.options:
        expected += DROPPED * TOKENS // 8
    assert totals[last] == expected
    if norms == 2 and widths is SAVED:  # the model's input needs no gradient: no backward of its norm
        assert totals[first] == expected - TOKENS * 4
    sites = [site for site in fxopt.explain(model).sites if site.pattern == "lora_linear"]
    assert {site.status for site in sites} == {"rewritten"}
    joins = [rewrite for rewrite in fxopt.explain(model).rewrites if rewrite.pattern == "join_lora_linear"]
    assert len(joins) == case.joins  # q, k, v and gate, up, of two captured blocks


@slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["as they come", "checkpointed", "min"])
def test_dropped_items_are_stocks_in_every_step_and_under_every_plan(
    how: str, device: str, tools: Any
) -> None:
    """With p = 0.5 another mask would change loss and gradients by their own size."""
    case = Case(options={"lora_dropout": 0.5})
    ours, theirs = make_adapted(tools, case).to(device), make_adapted(tools, case).to(device)
    if how == "checkpointed":
        for model in (ours, theirs):
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    fxopt.optimize(ours, memory_budget="min" if how == "min" else "auto")
    batch = tools.make_batch((2, 24), padded="right", device=device)
    rng_state = torch.cuda.get_rng_state if device == "cuda" else torch.get_rng_state
    losses: list[float] = []
    torch.manual_seed(3)
    steps = [tools.run_step(ours, batch) for _ in range(3)]
    after = rng_state()
    torch.manual_seed(3)
    for step in steps:
        stock = tools.run_step(theirs, batch)
        losses.append(float(stock.loss))
        assert tools.relative(step.loss, stock.loss) < 1e-5
        assert step.gradients.keys() == stock.gradients.keys()
        for parameter, gradient in stock.gradients.items():
            assert tools.relative(step.gradients[parameter], gradient) < 1e-4, parameter
    assert after.equal(rng_state())
    assert len(set(losses)) == 3  # each step dropped other items
    report = fxopt.explain(ours)
    assert {region.status for region in report.regions if region.kind == "block"} == {"captured"}
    # checkpointing lets the embedding's result need a gradient, by a hook with which Dynamo captures no tail
    assert {fallback.region for fallback in report.fallbacks} <= (
        {MODEL_REGION} if how == "checkpointed" else set()
    )


def make_in_bf16(tools: Any, case: Case) -> Any:
    """Return an adapted, optimized model whose layers compute in bf16, its adapters in fp32."""
    model = make_adapted(tools, case)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.bfloat16
    return fxopt.optimize(model)


def saved_by_block(model: Any, block: Any, batch: dict[str, torch.Tensor]) -> int:
    """Return the bytes that one call of `block` saves, weights, their scales and what blocks share left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        tensors = (
            [] if state is None else [state.absmax, state.offset, state.state2.absmax, state.state2.code]
        )
        own |= {tensor.untyped_storage().data_ptr() for tensor in tensors}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    hooks: list[Any] = []
    stock_call = block._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        hooks.append(None)
        shared = [item for item in pytree.tree_leaves((args[1:], kwargs)) if isinstance(item, torch.Tensor)]
        own.update(tensor.untyped_storage().data_ptr() for tensor in shared)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return stock_call(*args, **kwargs)

    block._compiled_call_impl = call
    try:
        loss = model(**batch).loss
    finally:
        block._compiled_call_impl = stock_call
    assert hooks
    del loss
    return sum(storage.nbytes() for storage in seen.values())


@slow
@pytest.mark.filterwarnings("ignore")
def test_layers_that_cast_their_bias_at_the_first_call_are_captured_at_the_second(tools: Any) -> None:
    """As prepared for training: all but the codes in fp32, under autocast; stock casts each bias at its first use."""
    steps: list[Any] = []
    for optimized in (True, False):
        model = tools.make_model("qwen2")
        quantize(model, **in_four_bits())
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        torch.manual_seed(1)
        options = {"r": 4, "target_modules": ALL_PROJECTIONS, "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(model, peft.LoraConfig(**options)).train()
        for module in model.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype, module.compute_type_is_set = torch.bfloat16, True
        if optimized:
            fxopt.optimize(model)
        batch = tools.make_batch((2, 24), padded="right", device="cpu")
        tools.run_step(model, batch, torch.bfloat16)
        steps.append(tools.run_step(model, batch, torch.bfloat16))
        if optimized:
            report = fxopt.explain(model)
            assert report.fallbacks == ()
            sites = [site for site in report.sites if site.pattern == "lora_linear"]
            assert sum(site.count for site in sites) == LAYERS * PROJECTIONS
            assert {site.status for site in sites} == {"rewritten"}
    ours, theirs = steps
    assert tools.relative(ours.loss, theirs.loss) < 1e-3
    assert ours.gradients.keys() == theirs.gradients.keys()
