"""Every spelling of one thing becomes the same canonical text, and computes the same bits."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F

from fxopt.graph import vocabulary
from fxopt.graph.canonicalize import canonicalize
from fxopt.graph.snapshot import snapshot

X = torch.randn(2, 3, 4)
LEAF = torch.randn(2, 3, 4, requires_grad=True)
HALF = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
OTHER = torch.randn(2, 3, 4, requires_grad=True)
WEIGHT = torch.randn(5, 4, requires_grad=True)
SEEN = torch.randn(2, 3, 4) > 0
SQUARE = torch.randn(4, 4, requires_grad=True)
LABELS = torch.tensor([1, -100, 3])
LOGITS = torch.randn(3, 5, requires_grad=True)
NLL_LOSS, LOG_SOFTMAX = torch.nn.NLLLoss(), torch.nn.LogSoftmax(dim=-1)

# name: inputs, canonical text of the node, and its spellings
TABLE = {
    "add": ((LEAF, OTHER), "add(%0, %1)", [lambda a, b: a + b, torch.add, lambda a, b: a.add(b)]),
    "add scalar": (
        (LEAF,),
        "add(%0, 1)",
        [lambda a: a + 1, lambda a: 1 + a, lambda a: torch.add(a, 1), lambda a: a.add(other=1)],
    ),
    "mul": ((LEAF, OTHER), "mul(%0, %1)", [operator.mul, torch.mul, torch.multiply, lambda a, b: a.mul(b)]),
    "mul scalar": (
        (LEAF,),
        "mul(%0, 2.5)",
        [lambda a: a * 2.5, lambda a: 2.5 * a, lambda a: a.multiply(2.5)],
    ),
    "sub": ((LEAF, OTHER), "sub(%0, %1)", [lambda a, b: a - b, torch.subtract, lambda a, b: a.sub(b)]),
    "div": ((LEAF, OTHER), "div(%0, %1)", [lambda a, b: a / b, torch.true_divide, lambda a, b: a.divide(b)]),
    "reciprocal": ((LEAF,), "reciprocal(%0)", [lambda a: 1 / a, lambda a: 1.0 / a, torch.reciprocal]),
    "square": (
        (LEAF,),
        "pow(%0, exponent=2)",
        [lambda a: a**2, lambda a: a.pow(2.0), lambda a: a.square(), torch.square, lambda a: torch.pow(a, 2)],
    ),
    "square without gradient": ((X,), "pow(%0, exponent=2)", [lambda a: a * a, lambda a: a.pow(2)]),
    "root": ((X,), "pow(%0, exponent=-0.5)", [lambda a: a**-0.5, lambda a: a.pow(-0.5)]),
    "unary": ((LEAF,), "neg(%0)", [lambda a: -a, torch.negative, lambda a: a.neg()]),
    "sigmoid": (
        (LEAF,),
        "sigmoid(%0)",
        [torch.sigmoid, F.sigmoid, lambda a: a.sigmoid(), torch.special.expit],
    ),
    "tanh": ((LEAF,), "tanh(%0)", [torch.tanh, F.tanh, lambda a: a.tanh()]),
    "mean": (
        (LEAF,),
        "mean(%0, dim=(-1,), keepdim=True)",
        [
            lambda a: a.mean(-1, keepdim=True),
            lambda a: a.mean(dim=2, keepdim=True),
            lambda a: torch.mean(a, (-1,), True),
            lambda a: torch.mean(a, axis=-1, keepdim=True),
            lambda a: a.mean([2], True, dtype=torch.float32),
        ],
    ),
    "norm": (
        (LEAF,),
        "vector_norm(%0, dim=(-1,), keepdim=True)",
        [
            lambda a: a.norm(dim=-1, keepdim=True),
            lambda a: a.norm(2, 2, True),
            lambda a: torch.norm(a, p=2.0, dim=-1, keepdim=True),
            lambda a: torch.linalg.norm(a, dim=-1, keepdim=True),
            lambda a: torch.linalg.vector_norm(a, 2, (-1,), True),
        ],
    ),
    "sum": (
        (LEAF,),
        "sum(%0, dim=(-2, -1), keepdim=False)",
        [lambda a: a.sum((1, 2)), lambda a: a.sum((-1, 1))],
    ),
    "var": (
        (LEAF,),
        "var(%0, dim=(-1,), correction=0, keepdim=True)",
        [
            lambda a: a.var(-1, unbiased=False, keepdim=True),
            lambda a: a.var(2, False, True),
            lambda a: torch.var(a, dim=-1, correction=0, keepdim=True),
        ],
    ),
    "cast up": (
        (HALF,),
        "cast(%0, dtype=f32)",
        [
            lambda a: a.float(),
            lambda a: a.to(torch.float32),
            lambda a: a.to(dtype=torch.float32),
            lambda a: a.type(torch.float32),
            lambda a: a.to("cpu", torch.float32),
            lambda a: a.to(torch.float32, copy=False),
        ],
    ),
    "cast like": (
        (LEAF, HALF),
        "cast(%0, dtype=bf16)",
        [
            lambda a, b: a.type_as(b),
            lambda a, b: a.to(b),
            lambda a, b: a.to(b.dtype),
            lambda a, b: a.bfloat16(),
        ],
    ),
    "gelu": ((LEAF,), "gelu(%0, approximate='none')", [F.gelu, torch.nn.GELU()]),
    "silu": ((LEAF,), "silu(%0)", [F.silu, torch.nn.SiLU(), lambda a: F.silu(a, inplace=False)]),
    "relu": ((LEAF,), "relu(%0)", [F.relu, torch.relu, lambda a: a.relu()]),
    "clamp": (
        (LEAF,),
        "clamp(%0, min=-0.5, max=0.7)",
        [lambda a: a.clamp(-0.5, 0.7), lambda a: torch.clip(a, min=-0.5, max=0.7)],
    ),
    "clamp above": (
        (LEAF,),
        "clamp(%0, min=None, max=0.7)",
        [
            lambda a: a.clamp(min=None, max=0.7),
            lambda a: a.clip(max=0.7),
            lambda a: torch.clamp_max(a, 0.7),
            lambda a: a.clamp_max(max=0.7),
        ],
    ),
    "glu": ((LEAF,), "glu(%0, dim=-1)", [F.glu, lambda a: F.glu(a, 2), lambda a: F.glu(a, dim=-1)]),
    "linear": (
        (LEAF, WEIGHT),
        "linear(%0, %1, None)",
        [
            F.linear,
            lambda a, w: a @ w.T,
            lambda a, w: a.matmul(w.t()),
            lambda a, w: torch.matmul(a, w.transpose(0, 1)),
            lambda a, w: a @ w.mT,
            lambda a, w: a @ w.permute(1, 0),
        ],
    ),
    "matmul": ((LEAF, SQUARE), "matmul(%0, %1)", [lambda a, b: a @ b, torch.matmul]),
    "reshape": (
        (LEAF,),
        "reshape(%0, shape=(-1, 4))",
        [lambda a: a.view(-1, 4), lambda a: a.reshape((-1, 4))],
    ),
    "flatten": (
        (LEAF,),
        "reshape(%0, shape=(-1, 4))",
        [lambda a: a.flatten(0, 1), lambda a: a.flatten(0, -2)],
    ),
    "unflatten": (
        (LEAF,),
        "reshape(%0, shape=(2, 3, 2, 2))",
        [lambda a: a.unflatten(-1, (2, 2)), lambda a: a.view(2, 3, 2, 2), lambda a: a.unflatten(2, [2, 2])],
    ),
    "transpose": (
        (LEAF,),
        "transpose(%0, dim0=-2, dim1=-1)",
        [
            lambda a: a.transpose(1, 2),
            lambda a: a.transpose(-1, -2),
            lambda a: torch.swapaxes(a, 2, 1),
            lambda a: a.permute(0, 2, 1),
            lambda a: torch.permute(a, (0, 2, -2)),
        ],
    ),
    "unsqueeze": (
        (LEAF,),
        "unsqueeze(%0, dim=-3)",
        [
            lambda a: a.unsqueeze(1),
            lambda a: a[:, None],
            lambda a: a[:, None, :, :],
            lambda a: a.unsqueeze(dim=-3),
        ],
    ),
    "slice": (
        (LEAF,),
        "getitem(%0, (..., :2))",
        [lambda a: a[..., :2], lambda a: a[:, :, 0:2], lambda a: a[:, :, :2:1]],
    ),
    "slice first": (
        (LEAF,),
        "getitem(%0, (1:,))",
        [lambda a: a[1:], lambda a: a[1:, :], lambda a: a[1:, ...]],
    ),
    "cat": (
        (LEAF, OTHER),
        "cat((%0, %1), dim=-1)",
        [lambda a, b: torch.cat([a, b], dim=-1), lambda a, b: torch.cat((a, b), 2)],
    ),
    "stack": (
        (LEAF, LEAF),
        "stack((%0, %0), dim=-1)",
        [lambda a, b: torch.stack([a, b], dim=-1), lambda a, b: torch.stack((a, b), 3)],
    ),
    "softmax": (
        (LEAF,),
        "softmax(%0, dim=-1, dtype=None)",
        [
            lambda a: F.softmax(a, dim=-1),
            lambda a: a.softmax(2),
            lambda a: torch.softmax(a, -1, dtype=torch.float32),
            torch.nn.Softmax(dim=-1),
        ],
    ),
    "rms_norm": (
        (LEAF,),
        "rms_norm(%0, (4,), None, eps=1e-05)",
        [lambda a: F.rms_norm(a, (4,), None, 1e-5), lambda a: F.rms_norm(a, [4], eps=1e-5)],
    ),
    "layer_norm": (
        (LEAF,),
        "layer_norm(%0, (4,), None, None, eps=1e-05)",
        [lambda a: F.layer_norm(a, (4,)), lambda a: torch.layer_norm(a, [4], None, None, 1e-5)],
    ),
    "cross_entropy": (
        (LOGITS, LABELS),
        "cross_entropy(%0, %1, None, ignore_index=-100, reduction='mean', label_smoothing=0.0)",
        [
            F.cross_entropy,
            torch.nn.CrossEntropyLoss(),
            lambda a, b: F.cross_entropy(input=a, target=b),
            lambda a, b: F.nll_loss(F.log_softmax(a, dim=-1), b),
            lambda a, b: F.nll_loss(a.log_softmax(1), target=b, ignore_index=-100),
            lambda a, b: NLL_LOSS(LOG_SOFTMAX(a), b),
        ],
    ),
    "masked_fill": (
        (LEAF, SEEN),
        "masked_fill(%0, %1, -inf)",
        [
            lambda a, b: a.masked_fill(b, float("-inf")),
            lambda a, b: torch.masked_fill(input=a, mask=b, value=-torch.inf),
        ],
    ),
    "logical_not": (
        (SEEN,),
        "logical_not(%0)",
        [
            torch.logical_not,
            lambda a: ~a,
            torch.bitwise_not,
            lambda a: a.logical_not(),
            operator.invert,
            lambda a: a.__invert__(),
        ],
    ),
    "filled": (
        (LEAF,),
        "filled(shape=(2, 3, 4), value=0, dtype=f32, device=device(type='cpu'))",
        [
            torch.zeros_like,
            lambda a: a.new_zeros(2, 3, 4),
            lambda a: a.new_zeros(a.shape),
            lambda a: a.new_full((2, 3, 4), 0),
            lambda a: torch.full_like(a, fill_value=0),
        ],
    ),
    "where": (
        (LEAF, SEEN),
        "where(%1, %0, -1000.0)",
        [lambda a, b: torch.where(b, a, -1e3), lambda a, b: a.where(b, -1e3)],
    ),
    "products by letters": (
        (LEAF, OTHER.mT),
        "matmul(%0, %1)",
        [torch.bmm, lambda a, b: torch.einsum("bij,bjk->bik", a, b)],
    ),
    "mm": ((WEIGHT, SQUARE), "matmul(%0, %1)", [torch.mm, lambda a, b: a.mm(b), operator.matmul]),
    "bmm": ((LEAF, OTHER.mT), "matmul(%0, %1)", [torch.bmm, lambda a, b: a.bmm(b), operator.matmul]),
    "constant": (
        (HALF,),
        "constant(value=0.10009765625, dtype=bf16, device=device(type='cpu'))",
        [
            lambda a: torch.full([], 0.1, dtype=a.dtype, device=a.device),
            lambda a: torch.full((), fill_value=0.1, dtype=torch.bfloat16),
            lambda a: torch.tensor(0.1, dtype=a.dtype),
            lambda a: a.new_tensor(0.1),
            lambda a: a.new_full((), 0.1),
        ],
    ),
    "ne": (
        (LABELS,),
        "ne(%0, -100)",
        [lambda a: a != -100, lambda a: torch.ne(a, -100), lambda a: a.ne(-100)],
    ),
    "gt": (
        (LEAF,),
        "gt(%0, 0)",
        [lambda a: a > 0, lambda a: operator.lt(0, a), lambda a: a.gt(0), lambda a: torch.gt(a, 0)],
    ),
    "sinh": ((LEAF,), "sinh(%0)", [torch.sinh, lambda a: a.sinh()]),
    "logsumexp": (
        (LEAF,),
        "logsumexp(%0, dim=(-1,), keepdim=False)",
        [lambda a: a.logsumexp(-1), lambda a: torch.logsumexp(a, dim=2), lambda a: a.logsumexp((-1,), False)],
    ),
}
CASES = [
    pytest.param(inputs, text, spelling, id=f"{name} {number}")
    for name, (inputs, text, spellings) in TABLE.items()
    for number, spelling in enumerate(spellings)
]


def named(text: str) -> str:
    """Write the n-th argument as %n; Dynamo orders placeholders by first use."""
    return text.replace("l_args_", "%")


@pytest.mark.parametrize(("inputs", "text", "spelling"), CASES)
def test_a_spelling_becomes_the_canonical_form(inputs, text, spelling, capture, canonical) -> None:
    gm = canonical(capture(lambda *args: (spelling(*args),), *inputs))
    lines = named(snapshot(gm)).splitlines()
    assert sum(not line.endswith("placeholder") for line in lines) == 2, lines
    assert lines[-2].split(" = ")[1] == text


LEFT_ALONE = {
    "alpha": ((LEAF, OTHER), lambda a, b: torch.add(a, b, alpha=2), "add(%0, %1, alpha=2)"),
    "rounding": (
        (LEAF,),
        lambda a: torch.div(a, 2, rounding_mode="floor"),
        "div(%0, 2, rounding_mode='floor')",
    ),
    "number minus": ((LEAF,), lambda a: 1 - a, "sub(1, %0)"),
    "view as dtype": ((X,), lambda a: a.view(torch.int32), ".view(%0, i32)"),
    "copying cast": ((LEAF,), lambda a: a.to(torch.float32, copy=True), ".to(%0, f32, copy=True)"),
    "squares that gradients flow into": ((LEAF,), lambda a: a * a, "mul(%0, %0)"),
    "a log-softmax over the rows": (
        (LOGITS, LABELS),
        lambda a, b: F.nll_loss(F.log_softmax(a, dim=0), b),
        "nll_loss(log_softmax, %1, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction='mean')",
    ),
    "index by tensor": ((X, torch.tensor([1, 0])), lambda a, b: a[b], "getitem(%0, %1)"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_has_no_canonical_form_is_left_alone(name, capture, canonical) -> None:
    inputs, function, text = LEFT_ALONE[name]
    gm = canonical(capture(lambda *args: (function(*args),), *inputs))
    assert named(snapshot(gm)).splitlines()[-2].split(" = ")[1] == text


def test_a_number_divided_by_a_tensor_is_a_scaled_reciprocal(capture, canonical) -> None:
    gm = canonical(capture(lambda a: 3 / a, LEAF))
    assert snapshot(gm, numbered=True).splitlines()[1:3] == [
        "%1: f32[2, 3, 4] = reciprocal(%0)",
        "%2: f32[2, 3, 4] = mul(%1, 3)",
    ]


def test_symbolic_sizes_stay_symbolic(capture, canonical) -> None:
    def function(x, y):
        return x.view(x.shape[0], x.shape[1], 2, 2), y.flatten(0, 1), y.unflatten(-1, (2, 2)), x.view_as(y)

    x, y = torch.randn(5, 6, 4, requires_grad=True), torch.randn(5, 6, 4)
    gm = canonical(capture(function, x, y, dynamic=True))
    assert [node.op for node in gm.graph.nodes if node.op == "call_method" and node.target != "size"] == []


def test_a_symbolic_shape_is_spelled_out_whether_it_is_read_whole_or_not(capture, canonical) -> None:
    def function(x):
        q = x.transpose(1, 2)
        return (q * 2).reshape(q.shape), (q + 1).contiguous().view(q.size()), q.new_zeros(q.shape) + q

    gm = canonical(capture(function, torch.randn(5, 6, 4, requires_grad=True), dynamic=True))
    assert [
        node.target for node in gm.graph.nodes if node.op == "call_method" and node.target != "size"
    ] == []
    shaped = gm.graph.find_nodes(op="call_function", target=vocabulary.reshape)
    assert all(len(node.kwargs["shape"]) == 3 for node in shaped)


def test_a_symbol_that_is_an_input_is_read_as_such(capture, canonical) -> None:
    def function(x):
        return torch.stack((-x, x), dim=-1).flatten(-2)

    x = torch.randn(5, 6, 4)
    torch._dynamo.mark_dynamic(x, (0, 1))
    gm = canonical(capture(function, x, dynamic=None))
    (stacked,) = gm.graph.find_nodes(op="call_function", target=torch.stack)
    (flat,) = stacked.users
    assert [size.op for size in flat.kwargs["shape"][:2]] == ["placeholder", "placeholder"]


def test_numbers_that_dynamo_fixed_are_written_out(capture, canonical) -> None:
    def function(x):
        return x.reshape(x.shape[0], x.size(1) * x.size(2))

    gm = canonical(capture(function, torch.randn(5, 3, 4), dynamic=True))
    assert "numbers" not in snapshot(gm)
    assert all(node.op != "call_method" for node in gm.graph.nodes)


def test_nodes_keep_name_place_and_origin(capture, canonical) -> None:
    captured = capture(lambda a: (a.float().float() * 2).pow(2), HALF)
    stock = {node.name: node.meta.get("stack_trace") for node in captured.gm.graph.nodes}
    gm = canonical(captured)
    for node in gm.graph.nodes:
        assert node.meta.get("stack_trace") == stock[node.name]
        assert node.name in node.meta["origins"]
    cast = next(node for node in gm.graph.nodes if node.name.startswith("float"))
    assert cast.meta["origins"] == {"float_1", "float_2"}


def test_a_second_run_changes_nothing(capture, canonical) -> None:
    def function(x, w):
        return (F.linear(x.float(), w).view(-1, 5) * 1.0).softmax(-1)[..., 1:] + 1 / x.sum()

    gm = canonical(capture(function, HALF, WEIGHT))
    first = snapshot(gm)
    canonicalize(gm)
    assert snapshot(gm) == first
