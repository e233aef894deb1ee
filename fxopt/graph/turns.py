"""What stands in a graph for a loop over hits that was captured for one turn: four ops that are never run.

`one_hit` is the number that a turn is of, one of those where `hits` is true. `rows_of_hit` is where a mask is true; its
stand-in is as long as the mask has items, which is how many rows all turns together have. `skips_hit` says that turns
of a number do nothing, `end_of_turn` that the body ends.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.errors import TurnsError
from fxopt.graph.names import op_name
from fxopt.graph.purity import is_pure
from fxopt.graph.torch_private import SET_GRAD

LIBRARY = torch.library.Library("fxopt", "FRAGMENT")


def _new_number(hits: Tensor, *others: int) -> Tensor:
    return hits.new_empty((1,), dtype=torch.int64)


def _new_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    choices, tokens = (mask.new_empty((mask.numel(),), dtype=torch.int64) for _ in range(2))
    return choices, tokens


def _define(schema: str, fake: Any) -> Any:
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    torch.library.register_fake(f"fxopt::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fxopt, name)


ONE_HIT = _define("one_hit(Tensor hits) -> Tensor", _new_number)
ROWS = _define("rows_of_hit(Tensor mask) -> (Tensor, Tensor)", _new_rows)
SKIPS = _define("skips_hit(Tensor hit, int number) -> Tensor", _new_number)
END = _define("end_of_turn(Tensor hit) -> Tensor", _new_number)
MARKS = (ONE_HIT, ROWS, SKIPS, END)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One captured turn: the node of its number, its body in order, and the node at which it ends."""

    hit: fx.Node
    body: tuple[fx.Node, ...]
    end: fx.Node


def find_turns(graph: fx.Graph) -> list[Turn]:
    """Return the loops of `graph` that were captured for one turn.

    Raises:
        TurnsError: one does something that does not hang on its hit, so that it matters how often it is done; or one
            turn's value is read after the loop. What a turn adds to a tensor in place is for the caller to judge.
    """
    return [_find_turn(hit) for hit in graph.find_nodes(op="call_function", target=ONE_HIT)]


def _find_turn(hit: fx.Node) -> Turn:
    order = list(hit.graph.nodes)
    end = next((node for node in hit.users if node.target is END), None)
    if end is None:
        raise TurnsError("a loop over hits is left before its end")
    first = order.index(hit)
    body = tuple(order[first + 1 : order.index(end)])
    inside, hanging = {*body, end}, {hit}
    for node in order[first + 1 :]:
        if not hanging.isdisjoint(node.all_input_nodes):
            if node not in inside:
                raise TurnsError(f"{node.name} reads one turn of a loop over hits")
            if op_name(node) != "index_add_":
                hanging.add(node)
    for node in body:
        if node in hanging or node.target is SET_GRAD or op_name(node) == "index_add_":
            continue
        if not is_pure(node) or any(user not in inside for user in node.users):
            raise TurnsError(f"{node.name} in a loop over hits does not hang on the hit of its turn")
    return Turn(hit, body, end)
