"""Rotary embeddings in a stock graph: a tensor whose items are mixed in pairs by a cosine and a sine."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.graph.anchors.stock import ROUNDING, number_of, stock_name, tensors_read

JOINING = frozenset({"cat", "stack"})
PIECES = frozenset(
    {"getitem", "chunk", "split", "unbind", "narrow", "select", "tensor_split", "split_with_sizes"}
)
SAME_ITEMS = ROUNDING | {"view", "reshape", "unflatten", "flatten", "squeeze", "unsqueeze"}
MAX_STEPS = 8


def rope_kind(node: fx.Node) -> str:
    """Return "rope" if `node` puts the two items of every pair together in a rotary embedding, else "".

    That is where a tensor's parts a and b are joined as (-b, a) or (b, -a), which is then multiplied and added, or
    as two sums of products of them, (a c - b s, b c + a s); or a product of complex numbers made of real ones.
    """
    name = stock_name(node)
    if name == "mul":
        return "rope" if _is_complex_product(node) else ""
    operands = tensors_read(node)
    if name not in JOINING or len(operands) != 2:
        return ""
    return "rope" if _is_quarter_turn(node, *operands) or _is_sum_of_products(*operands) else ""


def _is_quarter_turn(node: fx.Node, first: fx.Node, second: fx.Node) -> bool:
    if (_negated(first) is None) == (_negated(second) is None):
        return False
    pieces = [_piece(_negated(item) or item) for item in (first, second)]
    a, b = pieces
    if a is None or b is None or a[0] is not b[0] or a[1] == b[1]:
        return False
    return any(stock_name(user) == "mul" for user in _readers(node))


def _is_sum_of_products(first: fx.Node, second: fx.Node) -> bool:
    first, second = _unrounded(first), _unrounded(second)
    if {stock_name(first), stock_name(second)} != {"add", "sub"}:
        return False
    factors: list[set[Any]] = []
    for item in (first, second):
        products = [_unrounded(term) for term in tensors_read(item)]
        if len(products) != 2 or any(stock_name(product) != "mul" for product in products):
            return False
        # A table may have fewer dims than what it turns.
        large = [f for product in products for f in tensors_read(product) if _rank(f) == _rank(item)]
        found = [_piece(factor) for factor in large]
        factors.append({piece for piece in found if piece is not None})
    sources = [source for source, _ in factors[0] & factors[1]]
    # Tables may be cut in pieces as well; the pieces of the turned tensor are in both sums.
    return any(sources.count(source) == 2 for source in sources)


def _is_complex_product(node: fx.Node) -> bool:
    if not any(_is_made_complex(operand) for operand in tensors_read(node)):
        return False
    return any(stock_name(user) == "view_as_real" for user in _readers(node))


def _is_made_complex(node: fx.Node) -> bool:
    return stock_name(_through(node, SAME_ITEMS)) == "view_as_complex"


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the users of `node`, and those behind a few views and roundings."""
    found: list[fx.Node] = []
    front = [node]
    for _ in range(MAX_STEPS):
        users = [user for item in front for user in item.users]
        found.extend(users)
        front = [user for user in users if stock_name(user) in SAME_ITEMS]
    return found


def _negated(node: fx.Node) -> fx.Node | None:
    """Return what `node` is the negative of; None if it is no negative."""
    node = _unrounded(node)
    name, operands = stock_name(node), tensors_read(node)
    is_negative = name in ("neg", "negative") or (
        name == "mul" and any(number_of(item) == -1 for item in node.args if not isinstance(item, str))
    )
    return operands[0] if is_negative and len(operands) == 1 else None


def _piece(node: fx.Node) -> tuple[fx.Node, str] | None:
    """Return of which tensor `node` is a part, and which part as text; None if it is none."""
    node = _unrounded(node)
    if stock_name(node) not in PIECES or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, which = node.args[0], f"{node.args[1:]} {node.kwargs}"
    if stock_name(source) in PIECES and source.args and not tensors_read(node):
        # One of the tensors that a split returned.
        source = source.args[0]
    assert isinstance(source, fx.Node)
    return _through(source, SAME_ITEMS), which


def _rank(node: fx.Node) -> int:
    return node.meta["example_value"].dim()


def _unrounded(node: fx.Node) -> fx.Node:
    return _through(node, ROUNDING)


def _through(node: fx.Node, names: frozenset[str]) -> fx.Node:
    for _ in range(MAX_STEPS):
        operands = tensors_read(node)
        if stock_name(node) not in names or not operands:
            return node
        node = operands[0]
    return node
