"""Proofs: what they compare, that a planted error is found, and that they leave no trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from fxopt.graph import vocabulary
from fxopt.report.records import Proof
from fxopt.rewriting.comparison import Comparison, compare_value, compare_values
from fxopt.rewriting.pattern import Match, Pattern, call
from fxopt.rewriting.proof import FLOAT32_ERROR, Prover
from fxopt.rewriting.rewrite import MatchContext, RewriteResult, apply_patterns
from fxopt.rewriting.terms import cast, cross_entropy, linear, mean, number, reshape, rsqrt, tanh, tensor


def norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    xf = x.to(torch.float32)
    return (w * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def search_norm() -> Any:
    x = tensor("x", "* H")
    n = cast(x) * rsqrt(mean(cast(x) ** 2) + number("eps"))
    return cast(tensor("w", "H") * n)


def make(op: Callable[..., Any], check: Any = lambda m: None) -> Pattern:
    return Pattern("norm", search_norm, replace=lambda m: call(op, m["x"], m["w"], m["eps"]), check=check)


def norm_graph(
    builder: Any, *shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True
) -> fx.GraphModule:
    x, w = (
        builder.input("x", *shape, dtype=dtype, grad=grad),
        builder.input("w", shape[-1], dtype=dtype, grad=grad),
    )
    wide = builder.call(vocabulary.cast, x, dtype=torch.float32)
    spread = builder.call(torch.mean, builder.call(torch.pow, wide, exponent=2), dim=(-1,), keepdim=True)
    n = builder.call(torch.mul, wide, builder.call(torch.rsqrt, builder.call(torch.add, spread, 1e-6)))
    return builder.finish(builder.call(vocabulary.cast, builder.call(torch.mul, w, n), dtype=dtype))


def apply(gm: fx.GraphModule, pattern: Pattern, prover: Prover | None = None) -> RewriteResult:
    return apply_patterns(gm, (pattern,), MatchContext(prove=(prover or Prover()).prove))


def proof_of(result: RewriteResult) -> Proof:
    (done,) = (*result.rewrites, *result.refused)
    assert done.proof is not None
    return done.proof


def test_outputs_and_all_gradients_are_compared_in_both_precisions(builder: Any) -> None:
    proof = proof_of(apply(norm_graph(builder, 2, 7, 8), make(norm)))
    values = ("output 0", "gradient of x", "gradient of w")
    assert proof.passed
    assert proof.compared == (*values, *(f"{value} in float32" for value in values))
    assert (proof.dtype, proof.device, proof.reason) == ("bfloat16", "cpu", "")
    assert proof.oracle_dtype == "float64"
    assert proof.error <= max(2 * proof.stock_error, torch.finfo(torch.bfloat16).eps / 2)


def test_a_large_input_has_an_oracle_in_float32_and_the_proof_says_so(
    builder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxopt.rewriting.proof.MOST_ORACLE_BYTES", 8 * 2 * 7 * 8 - 1)
    proof = proof_of(apply(norm_graph(builder, 2, 7, 8), make(norm)))
    assert (proof.passed, proof.oracle_dtype) == (True, "float32")


def test_one_rule_allows_twice_stock_s_error_or_the_floor() -> None:
    oracle = torch.ones(4, dtype=torch.float64)

    def allowed(stock_error: float, floor: float) -> float:
        stock = oracle * (1 + stock_error)
        return compare_value("y", oracle.clone(), stock, oracle, floor).allowed

    for floor in (FLOAT32_ERROR, 0.004, 0.0005):
        assert allowed(0.0, floor) == floor
        assert allowed(floor, floor) == pytest.approx(2 * floor)
        assert allowed(floor / 4, floor) == floor


def test_what_is_zero_in_exact_arithmetic_is_measured_by_the_largest_of_its_sort() -> None:
    large = torch.full((4,), 2.0, dtype=torch.float64)
    oracle = {"gradient of q": large * 1e-17, "gradient of v": large}

    def compared(error: float) -> tuple[Comparison, Comparison]:
        stock = {"gradient of q": large * 1e-7, "gradient of v": large}
        new = {"gradient of q": large * error, "gradient of v": large}
        of_q, of_v = compare_values(new, stock, oracle, FLOAT32_ERROR)
        assert (of_v.is_zero, of_v.error, of_v.allowed) == (False, 0.0, FLOAT32_ERROR)
        return of_q, compare_value(
            "gradient of q", new["gradient of q"], stock["gradient of q"], large * 1e-17, 1e-5
        )

    for error in (0.0, 1e-7, 1.9e-7, 2.1e-7, 1e-5):
        found, by_its_own_norm = compared(error)
        assert found.is_zero
        assert found.error == pytest.approx(error, abs=1e-16)
        assert found.stock_error == pytest.approx(1e-7)
        assert found.excess == pytest.approx(by_its_own_norm.excess)
        assert (found.excess <= 1) == (error < 2e-7)


@pytest.mark.parametrize("far", [math.inf, 1e200])
def test_what_is_infinite_measures_nothing_else(far: float) -> None:
    """Nor does what is finite with a norm that is not."""
    small, large = torch.full((4,), 2.0, dtype=torch.float64), torch.full((4,), far, dtype=torch.float64)
    oracle = {"output 0": large, "output 1": small}
    _, right = compare_values(oracle, oracle, oracle, FLOAT32_ERROR)
    _, wrong = compare_values({**oracle, "output 1": 1.1 * small}, oracle, oracle, FLOAT32_ERROR)
    assert (right.is_zero, right.excess <= 1) == (False, True)
    assert (wrong.is_zero, wrong.excess <= 1) == (False, False)


def test_gradients_are_those_of_what_requires_them(builder: Any) -> None:
    proof = proof_of(apply(norm_graph(builder, 2, 7, 8, grad=False), make(norm)))
    assert proof.compared == ("output 0", "output 0 in float32")


class Wrong(torch.autograd.Function):
    """The norm, with a gradient of x that is 0.1 % too large."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy * 1.001


def in_one_row(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    y = norm(x, w, eps)
    return torch.cat([y[:1] * 1.01, y[1:]])


PLANTED: dict[str, Callable[..., torch.Tensor]] = {
    "another eps": lambda x, w, eps: norm(x, w, eps + 1e-3),
    "no weight": lambda x, w, eps: norm(x, torch.ones_like(w), eps) + 0 * w,
    "one plus the weight": lambda x, w, eps: norm(x, w + 1, eps),
    "gradient too large": lambda x, w, eps: Wrong.apply(norm(x, w, eps)),  # pyright: ignore
    "no gradient of the weight": lambda x, w, eps: norm(x, w.detach(), eps),
    "one row wrong": in_one_row,
    "not a number": lambda x, w, eps: norm(x, w, eps) * math.nan,
    "rounded to bf16 inside": lambda x, w, eps: norm(x.bfloat16(), w.bfloat16(), eps).to(x.dtype),
    "1 % too large in bf16 alone": lambda x, w, eps: (
        norm(x, w, eps) * (1.01 if x.dtype == torch.bfloat16 else 1.0)
    ),
    "twice": lambda x, w, eps: 2 * norm(x, w, eps),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_refused_with_its_figures(builder: Any, name: str) -> None:
    result = apply(norm_graph(builder, 4, 8), make(PLANTED[name]))
    assert result.rewrites == []
    (refusal,) = result.refused
    assert refusal.proof is not None
    assert not refusal.proof.passed
    assert refusal.reason == refusal.proof.reason
    assert "error" in refusal.reason
    assert "allowed" in refusal.reason


def test_a_replacement_that_raises_when_run_is_refused(builder: Any) -> None:
    def only_fake(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        if type(x) is torch.Tensor:
            raise RuntimeError("no kernel image")
        return norm(x, w, eps)

    (refusal,) = apply(norm_graph(builder, 4, 8), make(only_fake)).refused
    assert refusal.reason == "the proof could not run: RuntimeError: no kernel image"


def test_a_replacement_that_writes_to_its_input_is_refused(builder: Any) -> None:
    def writing(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        y = norm(x, w, eps)
        with torch.no_grad():
            w.data[0] += 1
        return y

    (refusal,) = apply(norm_graph(builder, 4, 8), make(writing)).refused
    assert "writes to its input w" in refusal.reason


def test_the_user_s_random_state_and_modes_are_untouched(builder: Any) -> None:
    before = torch.get_rng_state()
    with torch.no_grad():
        result = apply(norm_graph(builder, 4, 8), make(norm))
        assert not torch.is_grad_enabled()
    assert proof_of(result).compared[1] == "gradient of x"
    assert torch.equal(torch.get_rng_state(), before)


def test_tokens_are_few_and_then_many_and_the_last_dim_is_whole(builder: Any) -> None:
    proof = proof_of(apply(norm_graph(builder, 8, 4096, 48), make(norm)))
    assert proof.shapes == ("x: [6, 7, 48] and [8, 1040, 48]", "w: [48]")
    wide = proof_of(apply(norm_graph(type(builder)(), 8, 4096, 6144), make(norm)))
    assert wide.shapes[0] == "x: [6, 7, 6144] and [3, 96, 6144]"  # 4 million items at most
    one = proof_of(apply(norm_graph(type(builder)(), 1, 1, 48), make(norm)))
    assert one.shapes[0] == "x: [1, 1, 48]"
    assert one.passed


def test_equal_structures_are_proven_once(builder: Any) -> None:
    prover, runs = Prover(), []

    def counted(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        runs.append(type(x) is torch.Tensor)
        return norm(x, w, eps)

    pattern = make(counted)
    apply(norm_graph(builder, 2, 7, 8), pattern, prover)
    first = sum(runs)
    apply(norm_graph(type(builder)(), 1, 5, 8), pattern, prover)
    assert sum(runs) == first
    apply(norm_graph(type(builder)(), 4, 5, 16, dtype=torch.float16), pattern, prover)
    assert sum(runs) > first


@pytest.mark.parametrize("shape", [(2, 500, 8), (2, 7, 512)])
def test_what_is_larger_than_what_was_proven_is_proven_again(builder: Any, shape: tuple[int, ...]) -> None:
    def short(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        y = norm(x, w, eps)
        inside = torch.ones_like(y)
        inside[:, 64:], inside[..., 64:] = 0, 0
        return y * inside

    prover = Prover()
    assert proof_of(apply(norm_graph(builder, 2, 7, 8), make(short), prover)).passed
    assert not proof_of(apply(norm_graph(type(builder)(), *shape), make(short), prover)).passed


def lay_out(x: torch.Tensor, name: str) -> torch.Tensor:
    """Return a tensor of the shape of `x` in the layout `name`."""
    with x.fake_mode:  # pyright: ignore
        stored = torch.empty(2 * x.numel(), dtype=x.dtype)
        rows, columns = x.shape
        layouts = {
            "as it is": stored[: x.numel()].view(rows, columns),
            "transposed": stored[: x.numel()].view(columns, rows).mT,
            "expanded rows": stored[:columns].expand(rows, columns),
            "expanded columns": stored[:rows, None].expand(rows, columns),
            "every other": stored.view(rows, 2 * columns)[:, ::2],
        }
        return layouts[name].requires_grad_()


LAYOUTS = ("as it is", "transposed", "expanded rows", "expanded columns", "every other")


def test_each_layout_is_proven_on_inputs_that_have_it(builder: Any) -> None:
    """A kernel that reads a transposed tensor wrongly is refused there, though the contiguous one passed."""
    prover, seen = Prover(), []

    def watched(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        if type(x) is torch.Tensor:
            seen.append((x.dtype, x.stride()))
        return norm(x, w, eps)

    strides = {}
    for name in LAYOUTS:
        gm = norm_graph(type(builder)(), 9, 8)
        x = next(iter(gm.graph.nodes))
        x.meta["example_value"] = lay_out(x.meta["example_value"], name)
        (done,) = apply(gm, make(watched), prover).rewrites
        assert done.proof is not None
        (stride,) = {stride for _, stride in seen}
        assert [dtype for dtype, _ in seen] == [torch.bfloat16, torch.float32], name
        strides[name] = stride
        seen.clear()
    assert strides == {
        "as it is": (8, 1),
        "transposed": (1, 9),
        "expanded rows": (0, 1),
        "expanded columns": (1, 0),
        "every other": (16, 2),
    }


def test_a_layout_that_the_op_reads_wrongly_is_refused(builder: Any) -> None:
    def reads_rows(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        if type(x) is torch.Tensor:
            x = x.as_strided(x.shape, (x.shape[1], 1))
        return norm(x, w, eps)

    prover = Prover()
    assert len(apply(norm_graph(builder, 9, 8), make(reads_rows), prover).rewrites) == 1
    gm = norm_graph(type(builder)(), 9, 8)
    x = next(iter(gm.graph.nodes))
    x.meta["example_value"] = lay_out(x.meta["example_value"], "transposed")
    (refusal,) = apply(gm, make(reads_rows), prover).refused
    assert refusal.proof is not None
    assert "error" in refusal.reason


def padded(x: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
    """Return `x` in front of zeros; `shape` is an attribute like any other here."""
    return F.pad(x, (0, shape[-1] - x.shape[-1]))


def test_only_a_reshape_is_resized_and_proven_without_its_sizes(builder: Any) -> None:
    from fxopt.rewriting.terms import attribute, operation

    prover, runs = Prover(), []

    def counted(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if type(x) is torch.Tensor:
            runs.append(shape)
        return padded(x.tanh(), shape=shape)

    def search() -> Any:
        return operation(padded, tanh(tensor("x")), shape=attribute("shape"))

    pattern = Pattern("padded", search, replace=lambda m: call(counted, m["x"], shape=m["shape"]))
    for shape in ((40, 12), (40, 16)):
        own = type(builder)()
        gm = own.finish(own.call(padded, own.call(torch.tanh, own.input("x", 40, 8)), shape=shape))
        assert len(apply(gm, pattern, prover).rewrites) == 1
    assert runs == [(40, 12), (40, 12), (40, 16), (40, 16)]


def test_on_the_meta_device_nothing_is_proven_and_it_says_so(builder: Any) -> None:
    gm = norm_graph(builder, 4, 8)
    for node in gm.graph.nodes:
        if "example_value" in node.meta:
            value = node.meta["example_value"]
            with builder.mode:
                node.meta["example_value"] = torch.empty(value.shape, dtype=value.dtype, device="meta")
    result = apply(gm, make(norm))
    assert len(result.rewrites) == 1
    assert proof_of(result).reason == "not proven on meta"
    assert proof_of(result).compared == ()


def loss_of(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    return F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), labels, ignore_index=ignore_index)


def loss_graph(builder: Any, *leading: int) -> fx.GraphModule:
    logits = builder.call(torch.tanh, builder.input("z", *leading, 11, dtype=torch.bfloat16))
    labels = builder.input("labels", math.prod(leading), dtype=torch.int64)
    rows = builder.call(
        vocabulary.reshape, builder.call(vocabulary.cast, logits, dtype=torch.float32), shape=(-1, 11)
    )
    kwargs = {"ignore_index": -7, "reduction": "mean", "label_smoothing": 0.0}
    return builder.finish(builder.call(F.cross_entropy, rows, labels, None, **kwargs))


def make_loss(op: Callable[..., Any]) -> Pattern:
    def search() -> Any:
        return cross_entropy(reshape(cast(tanh(tensor("z")))), tensor("labels", "N"))

    def replace(m: Match) -> Any:
        return call(op, call(torch.tanh, m["z"]), m["labels"], -7)

    return Pattern("loss", search, replace=replace)


@pytest.mark.parametrize("leading", [(8, 512), (2, 9), (1, 1)])
def test_labels_are_in_range_and_some_are_ignored(builder: Any, leading: tuple[int, ...]) -> None:
    seen: list[torch.Tensor] = []

    def watched(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
        if type(labels) is torch.Tensor:
            seen.append(labels)
        return loss_of(logits, labels, ignore_index)

    proof = proof_of(apply(loss_graph(builder, *leading), make_loss(watched)))
    assert proof.passed, proof.reason
    (valid, ignored) = ([x for x in seen[0].tolist() if x != -7], [x for x in seen[0].tolist() if x == -7])
    assert all(0 <= label < 11 for label in valid)
    assert bool(ignored) == (math.prod(leading) > 1)
    few, many = min(map(len, seen)), max(map(len, seen))
    assert few <= 42
    assert many == math.prod(leading)


def test_a_loss_that_counts_ignored_rows_is_refused(builder: Any) -> None:
    def counting(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
        rows = logits.float().reshape(-1, logits.shape[-1])
        return F.cross_entropy(rows, labels, ignore_index=ignore_index, reduction="sum") / labels.numel()

    assert len(apply(loss_graph(builder, 2, 9), make_loss(counting)).refused) == 1


class WritesItsGradient(torch.autograd.Function):
    """A norm whose backward pass is right, and made in the memory of the gradient that it is given."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        with torch.enable_grad():
            leaves = [each.detach().requires_grad_() for each in (x, w)]
            y = norm(*leaves, eps)
        ctx.save = leaves, y
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (leaves, y), (dy,) = ctx.save, gradients
        dx, dw = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        return dy.copy_(dx), dw, None


def test_a_backward_pass_that_writes_to_its_gradient_is_refused(builder: Any) -> None:
    def written(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        return norm(x, w, eps) if type(x) is not torch.Tensor else WritesItsGradient.apply(x, w, eps)

    proof = proof_of(apply(norm_graph(builder, 4, 8), make(written)))
    assert not proof.passed
    assert "writes to the gradient that it is given" in proof.reason


def head_of(h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(h, w).float().reshape(-1, w.shape[0]), labels)


def prove_head(builder: Any, num_classes: int, op: Callable[..., Any]) -> Proof:
    """Prove a head of so many classes: a product with a weight, and the loss of its rows."""
    h = builder.input("h", 2, 9, 8, dtype=torch.bfloat16)
    w = builder.input("w", num_classes, 8, dtype=torch.bfloat16)
    labels = builder.input("labels", 18, dtype=torch.int64)
    wide = builder.call(vocabulary.cast, builder.call(F.linear, h, w, None), dtype=torch.float32)
    rows = builder.call(vocabulary.reshape, wide, shape=(-1, num_classes))
    kwargs = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}
    gm = builder.finish(builder.call(F.cross_entropy, rows, labels, None, **kwargs))
    search = lambda: cross_entropy(reshape(cast(linear(tensor("h"), tensor("w")))), tensor("labels", "N"))  # noqa: E731
    pattern = Pattern("head", search, replace=lambda m: call(op, m["h"], m["w"], m["labels"]))
    return proof_of(apply(gm, pattern))


@pytest.mark.parametrize(("num_classes", "proven"), [(100, 100), (40003, 24563)])
def test_a_head_is_proven_with_some_of_its_classes(builder: Any, num_classes: int, proven: int) -> None:
    seen: list[tuple[int, int]] = []

    def watched(h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if type(w) is torch.Tensor:
            seen.append((w.shape[0], int(labels.max())))
        return head_of(h, w, labels)

    proof = prove_head(builder, num_classes, watched)
    assert proof.passed, proof.reason
    assert {classes for classes, _ in seen} == {proven}
    assert all(label < proven for _, label in seen)


def test_an_error_in_the_last_of_many_classes_is_found(builder: Any) -> None:
    def leaves_some_out(h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        kept = torch.arange(w.shape[0], device=w.device)[:, None] < 16384  # what a kernel takes at a time
        return head_of(h, torch.where(kept, w, 0.0), labels)

    assert not prove_head(builder, 40003, leaves_some_out).passed


def test_the_replacement_runs_under_the_ambient_autocast_state(builder: Any) -> None:
    seen: list[bool] = []

    def watched(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        if type(x) is torch.Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
        return norm(x, w, eps)

    gm = norm_graph(builder, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        apply(gm, make(watched))
    assert seen == [True, False]


def test_gradients_are_drawn_apart_from_the_inputs(builder: Any) -> None:
    """Along x itself the gradient of a norm vanishes, and its relative error says nothing."""

    def search() -> Any:
        x = tensor("x", "* H")
        return x * rsqrt(mean(x**2) + number("eps"))

    def plain(x: torch.Tensor, eps: float) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    x = builder.input("x", 2, 5, 63)
    spread = builder.call(torch.mean, builder.call(torch.pow, x, exponent=2), dim=(-1,), keepdim=True)
    root = builder.call(torch.rsqrt, builder.call(torch.add, spread, 1e-6))
    gm = builder.finish(builder.call(torch.mul, x, root))
    proof = proof_of(apply(gm, Pattern("plain", search, replace=lambda m: call(plain, m["x"], m["eps"]))))
    assert proof.passed
    assert proof.stock_error < 1e-6
