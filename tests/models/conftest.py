"""Tiny models of several architectures, stock and optimized, and how their steps are compared."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import fxopt
from fxopt.demo.training import count_saved_bytes

LAYERS = 3
DRAWS = 16
STANDARD_ERRORS = 5
"""When half precision counts as worse than stock: the mean over `DRAWS` paired draws is that far above zero.

In the mean ours may not be worse at all; the draws only say how well the mean is known. Measured on a CPU over
32 draws, log(our error / stock's error) of the gradients, mean and scatter of one draw, in bf16 under autocast,
bf16 and fp16: llama -0.017, -0.023, -0.001 (0.02 to 0.03), qwen2 -0.016, -0.012, +0.005 (0.03), gemma2 -0.011,
-0.035, -0.012 (0.04), olmo2 -0.012, -0.003, +0.005 (0.06 to 0.07), single_level -0.040, -0.069, -0.084 (0.02 to
0.05). So 16 draws show an op that adds 2 % (llama) to 5 % (olmo2) of error. The largest mean was 1.1 of its
standard errors above zero. Some 200 comparisons are made: two quantities that are equal in the mean reach 3 in one
of 220 of these (qwen3's loss did, at 1.8e-5), and 5 in one of 12,000.
"""
MOST_STANDARD_ERROR = 0.025
"""Of the gradients' mean: beyond it 16 draws say too little. The largest measured is 0.018 (olmo2 in bf16)."""
TINY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    max_position_embeddings=128,
)
DROPOUTS = ("residual_dropout", "embedding_dropout", "attention_dropout", "hidden_dropout")
"""Off: two models would draw different masks."""

OWN = {"smollm3": {"no_rope_layer_interval": LAYERS}}
"""What one architecture needs to show its own form: here a layer that turns nothing."""


class ScaleNorm(nn.Module):
    """A root-mean-square norm in a spelling of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide / torch.sqrt((wide * wide).mean(dim=-1, keepdim=True) + 1e-6)).type_as(x) * self.gain


class Unit(nn.Module):
    """Attention and a gated MLP; returns a tuple, as older models do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = ScaleNorm(width), ScaleNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.left, self.right = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        q, k, v = (t.unsqueeze(1) for t in self.qkv(self.before(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(attended.squeeze(1))
        h = self.between(x)
        left = self.left(h)
        return x + self.down(self.right(h) * (left * torch.sigmoid(left))), None


@dataclasses.dataclass
class Result:
    """What the single-level model returns."""

    loss: torch.Tensor | None
    logits: torch.Tensor


class SingleLevel(nn.Module):
    """A causal LM without an inner backbone: embedding, blocks, norm, head and loss in one forward."""

    def __init__(self, width: int = 64, vocabulary: int = 256) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.units = nn.ModuleList(Unit(width) for _ in range(LAYERS))
        self.last = ScaleNorm(width)
        self.project = nn.Linear(width, vocabulary)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Result:
        x = self.table(input_ids)
        mask = None
        if attention_mask is not None:
            length = input_ids.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            own = torch.eye(length, dtype=torch.bool, device=x.device)
            mask = (causal & attention_mask[:, None, None].bool()) | own
        for unit in self.units:
            x, _ = unit(x, mask)
        logits = self.project(self.last(x))
        loss = None
        if labels is not None:
            width = logits.shape[-1]
            loss = F.cross_entropy(logits[:, :-1, :].reshape(-1, width), labels[:, 1:].reshape(-1))
        return Result(loss, logits)


def make_model(arch: str, **overrides: Any) -> Any:
    """Return a tiny model of `arch` in training mode; the same weights every time."""
    torch.manual_seed(0)
    if arch == "single_level":
        return SingleLevel().train()
    fields = set(AutoConfig.for_model(arch).to_dict())
    tiny = {**TINY, **dict.fromkeys(DROPOUTS, 0.0)}
    sizes = {name: value for name, value in tiny.items() if name in fields}
    config = AutoConfig.for_model(arch, **{**sizes, **OWN.get(arch, {}), **overrides})
    return AutoModelForCausalLM.from_config(config).train()


def make_trained(arch: str, adapted: bool = False, **overrides: Any) -> Any:
    """Return a tiny model, or one with adapters on all its linear layers alone to train, that change its values."""
    model = make_model(arch, **overrides)
    if adapted:
        import peft

        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    return model.train()


def make_batch(shape: tuple[int, int], *, padded: str, device: str) -> dict[str, torch.Tensor]:
    """Return input ids, labels and an attention mask; `padded` is "none", "left" or "right"."""
    generator = torch.Generator().manual_seed(sum(shape))
    ids = torch.randint(3, 256, shape, generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    if padded != "none":
        length = shape[1] // 3
        padding = slice(0, length) if padded == "left" else slice(shape[1] - length, None)
        ids[0, padding], labels[0, padding], mask[0, padding] = 0, -100, 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


@dataclasses.dataclass
class Step:
    """Loss and gradients of one step, all in float64, and what the loss was scaled by."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    scale: float = 1.0


def run_step(
    model: Any, batch: dict[str, torch.Tensor], autocast: torch.dtype | None = None, scale: float = 1024.0
) -> Step:
    """Run forward and backward of one step; under `autocast` in float16 GradScaler scales the loss.

    As in training with it, a step whose gradients overflow is run again with half the scale.
    """
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device.type
    scaler = torch.amp.GradScaler(device, init_scale=scale, enabled=autocast is torch.float16)
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(**batch).loss
    scaler.scale(loss).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if scaler.is_enabled() and scale > 1 and not all(each.isfinite().all() for each in found.values()):
        return run_step(model, batch, autocast, scale / 2)
    gradients = {name: gradient.double() / scaler.get_scale() for name, gradient in found.items()}
    return Step(loss.detach().double(), gradients, scale)


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Let torch's other kernels serve attention: cuDNN's are wrong where a row of a mask lets nothing through.

    Measured on an H100, torch 2.11, llama in bf16, left padding: stock's gradients are 27 % off in the median with
    cuDNN's, 0.8 % with the others.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the relative error of `value` as a ratio of norms."""
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))


@dataclasses.dataclass
class Excess:
    """By how much one quantity of ours exceeds stock's: the mean over paired draws, and its standard error."""

    mean: float
    standard_error: float

    @property
    def is_shown(self) -> bool:
        """Whether ours is worse than stock beyond what draws that are equal in the mean would show."""
        return self.mean > STANDARD_ERRORS * self.standard_error


def excess_of(differences: list[float]) -> Excess:
    """Return the mean of paired differences and its standard error."""
    return Excess(statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5)


def gradient_excess(step: Step, stock: Step, exact: Step) -> float:
    """Return log(our error / stock's error), the mean over all gradients: each counts, be it large or small."""
    logs: list[float] = []
    for name, gradient in exact.gradients.items():
        errors = [relative(each.gradients[name], gradient) for each in (step, stock)]
        if gradient.norm() and all(errors):
            logs.append(math.log(errors[0] / errors[1]))
    return statistics.mean(logs)


def measure_excess(
    model: Any,
    dtype: torch.dtype,
    device: str,
    *,
    autocast: bool,
    arch: str,
    shapes: tuple[tuple[int, int], ...] = ((2, 24),),
) -> tuple[Excess, Excess]:
    """Return how far `model` is from fp32 beyond stock: the log of the gradients' errors, and the loss's error.

    Each of `DRAWS` draws of weights and batch gives one pair: ours and stock, both against the same fp32 step.
    """
    gradients: list[float] = []
    losses: list[float] = []
    for seed in range(DRAWS):
        exact = make_model(arch).to(device)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in exact.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        stock = copy.deepcopy(exact) if autocast else copy.deepcopy(exact).to(dtype)
        model.load_state_dict(stock.state_dict())
        if not autocast:
            exact = copy.deepcopy(stock).float()
        shape = shapes[seed * len(shapes) // DRAWS]
        batch = make_batch(shape, padded="left" if seed % 2 else "right", device=device)
        reference = run_step(exact, batch)
        cast = dtype if autocast else None
        with without_cudnn_attention():
            stock_step = run_step(stock, batch, cast)
        step = run_step(model, batch, cast)
        assert step.scale >= stock_step.scale, "gradients overflow that stock's do not"
        gradients.append(gradient_excess(step, stock_step, reference))
        errors = [relative(each.loss, reference.loss) for each in (step, stock_step)]
        losses.append(errors[0] - errors[1])
    return excess_of(gradients), excess_of(losses)


def saved_bytes(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Return the bytes one forward saves for backward, parameters left out."""
    with count_saved_bytes(model) as saved:
        loss = model(**batch).loss
    del loss
    return saved.total


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device of a test: a CPU, and a GPU under `-m gpu`."""
    return request.param


@pytest.fixture
def twins() -> Callable[..., tuple[Any, Any]]:
    """Return a builder of an optimized model and its stock twin."""

    def build(arch: str, device: str = "cpu", **options: Any) -> tuple[Any, Any]:
        overrides = options.pop("overrides", {})
        model = make_model(arch, **overrides).to(device)
        stock = copy.deepcopy(model)
        return fxopt.optimize(model, **options), stock

    return build


@pytest.fixture
def tools() -> Any:
    """The functions above, for tests that cannot import a conftest."""

    class Tools:
        make_model = staticmethod(make_model)
        make_trained = staticmethod(make_trained)
        make_batch = staticmethod(make_batch)
        run_step = staticmethod(run_step)
        relative = staticmethod(relative)
        measure_excess = staticmethod(measure_excess)
        gradient_excess = staticmethod(gradient_excess)
        excess_of = staticmethod(excess_of)
        draws = DRAWS
        most_standard_error = MOST_STANDARD_ERROR
        saved_bytes = staticmethod(saved_bytes)
        layers = LAYERS

    return Tools
