"""Products with four-bit weights in their canonical form: a decoded weight, and a linear layer that reads it.

A library computes such a product by an op of its own, and where a gradient flows through it by an autograd
function around that op, which arrives as one higher-order op with a body for each direction. Both mean
`linear(x, dequantize_4bit(codes), bias)`. The decoded weight is an ordinary one from then on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.graph.edit import Editor
from fxopt.graph.names import op_name
from fxopt.graph.purity import is_pure
from fxopt.graph.sizes import find_settled
from fxopt.graph.torch_private import (
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    SET_GRAD,
    TORCH_LINEAR,
    HigherOrderOperator,
    OpOverload,
    schema_of,
)
from fxopt.graph.view import is_tensor, requires_grad
from fxopt.graph.vocabulary import NESTED_BLOCKSIZE, dequantize_4bit

PRODUCT, DECODING = "bitsandbytes::gemm_4bit", "bitsandbytes::dequantize_4bit"
NESTED_DECODING = "bitsandbytes::dequantize_blockwise"
AROUND = frozenset({"view", "reshape", "to"})
"""What else the forward body may hold: views of the codes, casts of the scales' codebook."""
SHAPES = AROUND - {"to"}
Autocast = tuple[bool, torch.dtype | None]


def unfold_quantized_products(gm: fx.GraphModule, editor: Editor) -> None:
    """Put `linear(x, dequantize_4bit(...), bias)` in the place of each product with four-bit weights."""
    scopes: list[Autocast] = []
    for node in list(gm.graph.nodes):
        if node.target is ENTER_AUTOCAST:
            _, dtype, enabled, *_ = (*node.args, None, True)
            scopes.append((bool(enabled), dtype))
        elif node.target is EXIT_AUTOCAST:
            scopes.pop()
        elif op_of(node) == DECODING:
            _name_decoding(node, editor)
        elif op_of(node) == PRODUCT:
            arguments = arguments_of(node)
            # The op itself passes no gradient on, a linear layer would.
            if any(
                isinstance(item, fx.Node) and requires_grad(item)
                for item in (arguments["A"], arguments["bias"])
            ):
                continue
            _unfold(node, node, arguments, scopes, editor)
        elif op_of(node) == "autograd_function_apply":
            found = _read_function(node, gm)
            if found is not None:
                _unfold(node, found[0], found[1], scopes, editor)


def op_of(node: fx.Node) -> str:
    """Return the registered name of the op that `node` calls, with its library; "" if it has none."""
    target = node.target
    if isinstance(target, OpOverload | HigherOrderOperator):
        return target.name()
    return ""


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a registered op by name; those left out have their defaults."""
    named = {argument.name: argument.default_value for argument in schema_of(node.target).arguments}
    names = list(named)
    return {**named, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _unfold(
    node: fx.Node, result: fx.Node, arguments: dict[str, Any], scopes: list[Autocast], editor: Editor
) -> None:
    """Replace `result`, the product that `node` computes from `arguments`, where a linear layer gives the same."""
    x, bias, shape = arguments["A"], arguments["bias"], find_settled(arguments["shapeB"])
    values = [item for item in (x, bias) if item is not None]
    is_matrix = shape is not None and len(shape) == 2
    if not all(map(is_tensor, values)) or not is_matrix or requires_grad(arguments["B"]):
        return
    dtype, device = x.meta["example_value"].dtype, x.meta["example_value"].device
    if any(item.meta["example_value"].dtype != dtype for item in values):
        return
    enabled, casts_to = scopes[-1] if scopes else _ambient_autocast(device.type)
    if enabled and casts_to != dtype:
        return  # a linear layer would be cast, the library's product is not
    nested = (arguments["absmax_code"], arguments["absmax"], arguments["absmax_offset"])
    has_nested = arguments["absmax_8bit"] is not None
    tensors = (arguments["absmax_8bit"], *nested) if has_nested else (arguments["absmax"], None, None, None)
    options = {"shape": shape, "blocksize": arguments["blocksize"], "quant_type": arguments["quant_type"]}
    value = x.meta["example_value"]
    with torch.no_grad():
        decoded = value.detach().new_empty(shape, dtype=dtype)
    codes = _as_bytes(arguments["B"], result, editor)
    weight = editor.insert_before(
        result, dequantize_4bit, (codes, *tensors), {**options, "dtype": dtype}, decoded
    )
    weight.meta["origins"] = weight.meta["origins"] | node.meta["origins"]
    linear = editor.insert_before(result, TORCH_LINEAR, (x, weight, bias), {}, result.meta["example_value"])
    editor.replace(result, linear)
    if node is not result:
        bodies = [body for body in node.all_input_nodes if body.op == "get_attr"]
        for unread in (node, *bodies):
            if not unread.users:
                editor.graph.erase_node(unread)


def _ambient_autocast(device: str) -> Autocast:
    """Return whether autocast is on around the capture, and what it casts to; the meta device has none."""
    if not torch.amp.is_autocast_available(device):  # pyright: ignore[reportPrivateImportUsage]
        return False, torch.float32
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _name_decoding(node: fx.Node, editor: Editor) -> None:
    """Replace the library's decoding of a weight by the canonical one, the decoding of its absmax in it."""
    named = arguments_of(node)
    shape = find_settled(named["shape"])
    if requires_grad(named["A"]) or shape is None:
        return
    tensors = _nested_scales(named["absmax"]) or (named["absmax"], None, None, None)
    options = {
        "shape": shape,
        "blocksize": named["blocksize"],
        "quant_type": named["quant_type"],
        "dtype": named["dtype"],
    }
    codes = _as_bytes(named["A"], node, editor)
    new = editor.insert_before(node, dequantize_4bit, (codes, *tensors), options, node.meta["example_value"])
    editor.replace(node, new)


def _as_bytes(packed: fx.Node, reader: fx.Node, editor: Editor) -> fx.Node:
    """Return `packed` as what it is, codes; an engine that shards weights wants them stored as of a floating dtype.

    They are viewed as soon as they are there, in whatever shape, so that what reads several weights at once may stand
    at the first reader.
    """
    if packed.meta["example_value"].dtype == torch.uint8:
        return packed
    stored: Any = packed
    while op_name(stored) in SHAPES and stored.args[0].meta["example_value"].is_contiguous():
        stored = stored.args[0]
    place = stored.next
    while place.op == "placeholder":
        place = place.next
    codes = stored.meta["example_value"].view(torch.uint8)
    view = editor.insert_before(reader, torch.ops.aten.view.dtype, (stored, torch.uint8), {}, codes)
    if place is not reader:
        place.prepend(view)
    return view


def _nested_scales(absmax: Any) -> tuple[Any, ...] | None:
    """Return codes, codebook, scales and offset where `absmax` is decoded from these, else None."""
    if not isinstance(absmax, fx.Node) or op_name(absmax) != "add" or len(absmax.args) != 2 or absmax.kwargs:
        return None
    decoding, offset = absmax.args
    if not isinstance(decoding, fx.Node) or op_of(decoding) != NESTED_DECODING or not is_tensor(offset):
        return None
    inner = arguments_of(decoding)
    if inner["blocksize"] != NESTED_BLOCKSIZE or inner["dtype"] != torch.float32:
        return None
    return inner["A"], inner["code"], inner["absmax"], offset


def _read_function(node: fx.Node, gm: fx.GraphModule) -> tuple[fx.Node, dict[str, Any]] | None:
    """Return the result of an autograd function that is one product with four-bit weights, and its arguments."""
    forward, backward, *given = node.args
    held = [getattr(gm, str(body.target), None) for body in (forward, backward) if isinstance(body, fx.Node)]
    bodies = [body for body in held if isinstance(body, fx.GraphModule)]
    if len(bodies) != 2:
        return None
    (result,) = node.users if len(node.users) == 1 else (None,)
    if result is None or op_name(result) != "getitem" or result.args[1] != 0:
        return None
    read = _read_forward(bodies[0].graph, given)
    if read is None:
        return None
    arguments, x_place, bias_place = read
    if not _is_its_derivative(bodies[1].graph, arguments, x_place, bias_place):
        return None
    return result, arguments


def _read_forward(body: fx.Graph, given: list[Any]) -> tuple[dict[str, Any], int, int] | None:
    """Return the arguments of the one product in `body`, in values of the graph around, and places of x and bias."""
    places = {node: place for place, node in enumerate(body.find_nodes(op="placeholder"))}
    sources = dict(places)
    products: list[fx.Node] = []
    for node in body.nodes:
        if node.op in ("placeholder", "output") or node.target is SET_GRAD:
            continue
        if not is_tensor(node) and is_pure(node):
            continue  # what is asked about sizes that are not fixed
        if op_of(node) == PRODUCT:
            products.append(node)
        elif (
            op_name(node) in AROUND
            and node.args[0] in sources
            and node.meta["example_value"].dtype == (node.args[0].meta["example_value"].dtype)
        ):
            sources[node] = sources[node.args[0]]
        else:
            return None
    (output,) = body.find_nodes(op="output")
    # Before torch 2.13 the function returns all it computes, numbers too: nobody reads these, as the caller checks.
    first, *others = output.args[0][0]
    if products != [first] or any(is_tensor(item) and item not in sources for item in others):
        return None
    inner = arguments_of(products[0])
    tensors = [item for item in inner.values() if isinstance(item, fx.Node)]
    if any(item not in sources for item in tensors):
        return None
    arguments = {
        name: given[sources[item]] if isinstance(item, fx.Node) else item for name, item in inner.items()
    }
    bias = inner["bias"]
    return arguments, sources[inner["A"]], sources[bias] if isinstance(bias, fx.Node) else -1


def _is_its_derivative(body: fx.Graph, arguments: dict[str, Any], x_place: int, bias_place: int) -> bool:
    """Return whether `body` returns the gradient times the decoded weight for x, sums for the bias, else nothing."""
    decodings = [node for node in body.nodes if op_of(node) == DECODING]
    (output,) = body.find_nodes(op="output")
    gradient = next(iter(body.find_nodes(op="placeholder")))
    options = _options_of(arguments)
    if options is None or len(decodings) > 1 or any(_options_of(node) != options for node in decodings):
        return False
    for place, result in enumerate(output.args[0]):
        if result is None:
            continue
        reads = op_name(result) if isinstance(result, fx.Node) else ""
        if place == x_place:
            weight = result.args[1] if reads == "matmul" else None
            while isinstance(weight, fx.Node) and op_name(weight) == "to":
                weight = weight.args[0]
            if weight not in decodings or result.args[0] is not gradient:
                return False
        elif place != bias_place or reads != "sum" or result.args[0] is not gradient:
            return False
    return True


def _options_of(source: fx.Node | dict[str, Any]) -> tuple[Any, ...] | None:
    """Return how codes are decoded, as the decoding or the arguments of a product say; None where that is not fixed."""
    named = arguments_of(source) if isinstance(source, fx.Node) else source
    shape = find_settled(named["shape"] if "shape" in named else named["shapeB"])
    return None if shape is None else (named["blocksize"], named["quant_type"], shape)
