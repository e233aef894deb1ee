"""route: the kernels and the op against the reference, which is what routers of models compute."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fxopt.kernels.launcher import rehearsed
from fxopt.kernels.route import Form, route, route_reference
from fxopt.kernels.route import op as file

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS: dict[str, dict[str, Any]] = {
    "mixtral": dict(score="softmax", num_choices=2, normalizes=True),
    "qwen2": dict(score="softmax", num_choices=4),
    "gpt_oss": dict(score="softmax", num_choices=4, by_logits=True, scores_after=True),
    "sigmoid after": dict(score="sigmoid", num_choices=1, by_logits=True, scores_after=True),
    "kolibri1": dict(score="sigmoid", num_choices=3, by_logits=True, scores_after=True, normalizes=True),
    "by logits": dict(score="softmax", num_choices=3, by_logits=True, normalizes=True),
    "deepseek_v4": dict(score="sqrt_softplus", num_choices=4, normalizes=True, eps=1e-20, scale=1.5),
    "roots after": dict(score="sqrt_softplus", num_choices=2, by_logits=True, scores_after=True),
    "ernie": dict(score="softmax", num_choices=3, normalizes=True, least=0.2),
    "deepseek_v2": dict(
        score="softmax", num_choices=3, group_size=4, num_kept=2, fills_zero=True, scale=16.0
    ),
    "deepseek_v3": dict(
        score="sigmoid",
        num_choices=4,
        group_size=4,
        num_kept=2,
        group_choices=2,
        normalizes=True,
        eps=1e-20,
        scale=2.5,
    ),
}
BIASED = ("ernie", "kolibri1", "by logits", "deepseek_v4", "deepseek_v3")


def make(num_tokens: int, num_experts: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return logits of which no two of a token are equal, nor their scores in `dtype`."""
    order = torch.rand(num_tokens, num_experts, device=device).argsort(-1)
    return (order * (6 / num_experts) - 3).to(dtype).requires_grad_()


def bias_of(name: str, num_experts: int, device: str) -> torch.Tensor | None:
    return torch.randn(num_experts, device=device) * 0.1 if name in BIASED else None


def dense(weights: torch.Tensor, ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return the weights of all experts: the order of a token's choices means nothing."""
    zeros = weights.new_zeros(*weights.shape[:-1], num_experts)
    return zeros.scatter_add(-1, ids, weights)


def compare(
    name: str, logits: torch.Tensor, bias: torch.Tensor | None, check: Any, gradients: Any, **attributes: Any
) -> None:
    form = Form(**FORMS[name] | attributes, dtype=logits.dtype)
    num_experts = logits.shape[-1]

    def reference(logits: torch.Tensor) -> torch.Tensor:
        wide = logits.dtype == torch.float64
        found = dict(scores_dtype=torch.float64, dtype=torch.float64) if wide else {}
        return dense(*route_reference(logits, bias, **vars(form) | found), num_experts)

    dy = torch.randn(logits.shape, device=logits.device).to(logits.dtype)
    exact_y, exact = gradients(reference, [logits], dy, torch.float64)
    eager_y, eager = gradients(reference, [logits], dy)
    with torch.no_grad():
        weights, ids = file.launch_forward(logits, bias, *form.astuple())
        found = file.launch_backward(dy.gather(-1, ids), logits, ids, *form.astuple())
    assert all(len(set(row)) == form.num_choices for row in ids.flatten(0, -2).tolist())
    check("weights", dense(weights, ids, num_experts), eager_y, exact_y)
    check("logits", found, eager[0], exact[0])


@pytest.mark.parametrize("num_experts", [8, 60, 128])
@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, num_experts: int, device: str, check: Any, gradients: Any) -> None:
    bias = bias_of(name, num_experts, device)
    compare(name, make(5, num_experts, torch.float32, device), bias, check, gradients)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            id=f"{name}-{dtype}",
            marks=() if (number + place) % len(DTYPES) == 0 else pytest.mark.exhaustive,
        )
        for place, name in enumerate(FORMS)
        for number, dtype in enumerate(DTYPES)
    ],
)
def test_dtypes(name: str, dtype: torch.dtype, device: str, check: Any, gradients: Any) -> None:
    compare(name, make(7, 16, dtype, device), bias_of(name, 16, device), check, gradients)


@pytest.mark.parametrize("layout", ["three dims", "column_stride", "transposed", "one token", "one expert"])
def test_layouts(layout: str, device: str, check: Any, gradients: Any) -> None:
    logits = make(6, 16, torch.float32, device).detach()
    logits = {
        "three dims": logits.view(2, 3, 16),
        "column_stride": logits.repeat_interleave(2, -1)[:, ::2],
        "transposed": logits.t().contiguous().t(),
        "one token": logits[:1],
        "one expert": logits[:, :1],
    }[layout]
    choices = dict(num_choices=1) if layout == "one expert" else {}
    compare("mixtral", logits.requires_grad_(), None, check, gradients, **choices)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_many_experts(name: str, device: str, check: Any, gradients: Any) -> None:
    groups = dict(group_size=32, num_kept=4) if name == "deepseek_v3" else {}
    logits, bias = make(3, 256, torch.float32, device), bias_of(name, 256, device)
    compare(name, logits, bias, check, gradients, num_choices=8, **groups)


def test_of_equal_scores_the_first_are_chosen(device: str) -> None:
    """As torch does on a GPU; scores that are equal after their rounding count as equal."""
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 3.0001, 3.0002]]).to(device)
    form = Form("sigmoid", 2, scores_dtype=torch.bfloat16)
    _, ids = file.launch_forward(logits, None, *form.astuple())
    assert ids.tolist() == [[1, 2], [0, 1], [0, 2]]


def test_infinite_logits_and_nan_choose_experts_that_exist(device: str) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[-inf, -inf, -inf, 1.0], [nan, 0.0, nan, 0.0], [nan] * 4]).to(device)
    form = Form("softmax", 3, by_logits=True, scores_after=True)
    _, ids = file.launch_forward(logits, None, *form.astuple())
    assert ids.tolist() == [[3, 0, 1], [0, 2, 1], [0, 1, 2]]


@pytest.mark.parametrize("name", FORMS)
def test_op(name: str, op_device: str, check: Any, gradients: Any) -> None:
    logits, bias = make(6, 16, torch.float32, op_device), bias_of(name, 16, op_device)

    def run(function: Any, logits: torch.Tensor) -> torch.Tensor:
        wide = dict(scores_dtype=logits.dtype, dtype=logits.dtype)
        return dense(*function(logits, bias, **FORMS[name] | wide), 16)

    dy = torch.randn(6, 16, device=op_device)
    exact_y, exact = gradients(functools.partial(run, route_reference), [logits], dy, torch.float64)
    eager_y, eager = gradients(functools.partial(run, route_reference), [logits], dy)
    y, found = gradients(functools.partial(run, route), [logits], dy)
    check("weights", y, eager_y, exact_y)
    check("logits", found[0], eager[0], exact[0])
    y64, found64 = gradients(functools.partial(run, route), [logits], dy, torch.float64)
    torch.testing.assert_close((y64, found64[0]), (exact_y, exact[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_opcheck(name: str, op_device: str, opcheck: Any) -> None:
    logits, bias = make(6, 16, torch.float32, op_device), bias_of(name, 16, op_device)
    form = Form(**FORMS[name])
    opcheck(file.forward_op, (logits, bias, *form.astuple()))
    _, ids = route_reference(logits, bias, **FORMS[name])
    opcheck(file.backward_op, (torch.randn(ids.shape, device=op_device), logits, ids, *form.astuple()))


def test_logits_and_ids_alone_are_saved(op_device: str) -> None:
    logits = make(6, 16, torch.float32, op_device)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda v: v):
        _, ids = route(logits, **FORMS["mixtral"])
    assert [value.data_ptr() for value in saved] == [logits.data_ptr(), ids.data_ptr()]
    assert not ids.requires_grad


def test_both_ops_stand_in_the_joint_graph(op_device: str, joint_targets: Any) -> None:
    targets = joint_targets(
        lambda logits: route(logits, **FORMS["mixtral"])[0], make(6, 16, torch.float32, op_device)
    )
    assert targets == ["fxopt.route.default", "fxopt.route_backward.default"]


def test_second_derivatives_are_refused(op_device: str) -> None:
    logits = make(6, 16, torch.float32, op_device)
    (found,) = torch.autograd.grad(route(logits, **FORMS["qwen2"])[0].sum(), [logits], create_graph=True)
    with pytest.raises(RuntimeError, match="fxopt::route: second derivatives are not implemented"):
        found.sum().backward()


def test_weights_are_those_of_a_router_in_plain_torch(op_device: str) -> None:
    logits = make(6, 16, torch.float32, op_device)
    weights, ids = F.softmax(logits, dim=-1).topk(2, dim=-1)
    found, chosen = route(logits, **FORMS["mixtral"])
    torch.testing.assert_close(found, weights / weights.sum(-1, keepdim=True))
    assert torch.equal(chosen, ids)


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        (dict(score="sigmoid", num_choices=2, scores_after=True), "route: scores_after, expected by_logits"),
        (dict(score="relu", num_choices=2), "route: score, expected one of"),
        (dict(score="softmax", num_choices=9), "route: num_choices, expected 1 to 8, got 9"),
        (
            dict(score="softmax", num_choices=4, group_size=2, num_kept=1),
            "route: groups of 2 of 8 experts, 1 kept",
        ),
    ],
)
def test_errors(attributes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        route(torch.ones(3, 8), **attributes)


def test_a_bias_of_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="route: bias, expected one per expert"):
        route(torch.ones(3, 8), torch.ones(3), score="sigmoid", num_choices=2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_choices_on_a_gpu_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    """Random logits with ties: the same sets, but for the few where two scores are a rounding apart."""
    logits, bias = torch.randn(8192, 64, device="cuda").to(dtype), bias_of(name, 64, "cuda")
    form = Form(**FORMS[name] | dict(scores_dtype=dtype))
    _, ids = file.launch_forward(logits, bias, *form.astuple())
    _, stock = route_reference(logits, bias, **vars(form))
    same = (ids.sort(-1)[0] == stock.sort(-1)[0]).all(-1)
    assert same.double().mean().item() > 0.999


def test_ids_are_experts_where_kernels_are_only_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads ids by which it indexes runs in a rehearsal too, on what no kernel has written."""
    monkeypatch.setattr(file, "launch", lambda *arguments, **options: None)
    logits = torch.randn(5, 8)
    with rehearsed():
        _, ids = file.launch_forward(logits, None, *Form("softmax", 2).astuple())
    assert not ids.any()
