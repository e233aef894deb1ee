"""Loops over the experts that were hit, captured for one turn, written out as one computation of all choices.

How often a model's loop runs is decided by values. `fxopt/capture/turns.py` captures its body once, for any expert:

    for e in experts that were hit:                           rows  = x, each token once per choice
        k, t = where(mask[e])                           =>    value = body(rows, W[ids])
        y.index_add_(0, t, body(x[t], W[e]) * w[t, k])        y     = (value * w).view(T, K, H).sum(1)

The right side is how models compute experts that have no loop; the patterns know it. It has copies of an expert's
matrices for each choice and is never run as it stands: where no pattern takes it over, the block is captured in pieces
around its loop. Numerics: as a turn's rows are added to those of their tokens in any order, so are the choices.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.errors import TurnsError
from fxopt.graph.arguments import same_size
from fxopt.graph.names import op_name
from fxopt.graph.purity import is_pure
from fxopt.graph.torch_private import tree_map_only
from fxopt.graph.turns import MARKS, ROWS, SKIPS, Turn, find_turns

CASTS = frozenset({"to", "float", "half", "bfloat16"})
NEW = frozenset({"zeros_like", "zeros", "new_zeros"})
OF_A_LOOP = "of_a_loop"
"""The mark, in the meta of a node, of copies that stock does not make: there it multiplies by the stack's own item."""
VIEWS = frozenset({"getitem", "reshape", "view", "squeeze", "flatten"})


def lift_loops(gm: fx.GraphModule) -> tuple[str, ...]:
    """Write out each loop of `gm` that was captured for one turn, in place, and return the names of their sums.

    Raises:
        TurnsError: a body is no sum over the rows of its hit, or does something that does not hang on it.
    """
    names = tuple(_Lift(turn).run() for turn in find_turns(gm.graph))
    left = [node.name for node in gm.graph.nodes if node.target in MARKS]
    if left:
        raise TurnsError(f"{left[0]} belongs to no loop over hits")
    return names


def check_taken(gm: fx.GraphModule, names: tuple[str, ...]) -> None:
    """Check that patterns took the loops whose sums `lift_loops` named.

    Raises:
        TurnsError: one stands as it was written out.
    """
    if any(node.name in names and op_name(node) == "sum" for node in gm.graph.nodes):
        raise TurnsError("no pattern takes the loop over its experts")


class _Lift:
    """The edits of one loop."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.graph = turn.hit.graph
        numbers = {turn.hit}
        for node in turn.body:
            sources = node.all_input_nodes
            if op_name(node) in VIEWS and sources and all(source in numbers for source in sources):
                numbers.add(node)
        self.stacks = self._find_stacks(numbers)
        self.rows = self._find_rows()
        self.ids = self._find_ids(self.stacks.pop(self.rows.all_input_nodes[0]))
        self.num_choices = int(_value(self.ids).shape[-1])

    def run(self) -> str:
        """Replace the body by all turns at once, and return the name of their sum."""
        add = self._find_sum()
        self._check_skips()
        self._replace_rows(add)
        self._replace_products()
        target, _, rows = add.all_input_nodes
        value = rows.all_input_nodes[0] if op_name(rows) in CASTS else rows
        choices = self._make(add, "reshape", value, -1, self.num_choices, _value(target).shape[1])
        total = self._make(add, "sum", choices, 1)
        result = self._make(add, "to", total, _value(target).dtype)
        if not same_size(_value(result).shape[0], _value(target).shape[0]):
            raise TurnsError("a loop over hits, expected its rows added to zeros of their tokens")
        add.replace_all_uses_with(result)
        target.replace_all_uses_with(result, lambda user: user is not add)
        self.graph.erase_node(add)
        left = set(self.graph.nodes)
        for node in reversed((self.turn.hit, *self.turn.body, self.turn.end)):
            if node in left and not node.users and (node.target in MARKS or is_pure(node)):
                self.graph.erase_node(node)
        if self.turn.hit.users:
            raise TurnsError(f"{next(iter(self.turn.hit.users)).name} reads the number of a hit")
        return total.name

    def _find_stacks(self, numbers: set[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Return the stacks that the turn's number picks one item of, by the node that holds it."""
        stacks: dict[fx.Node, fx.Node] = {}
        for node in self.turn.body:
            if op_name(node) != "index_select" or node.args[2] not in numbers:
                continue
            items = [user for user in node.users if op_name(user) == "squeeze" and user.args[1:] == (0,)]
            if node.args[1] != 0 or len(items) != 1 or len(node.users) != 1:
                raise TurnsError(f"{node.name} is not one item of a stack")
            (stacks[items[0]],) = (source for source in node.all_input_nodes if source not in numbers)
        return stacks

    def _find_rows(self) -> fx.Node:
        """Return where the mask of the turn's number is true; the numbers hit must be those of which it has a row."""
        found = [node for node in self.turn.body if node.target is ROWS]
        if len(found) != 1 or found[0].args[0] not in self.stacks:
            raise TurnsError("a turn of a loop over hits does not read the rows of its own hit")
        (hits,) = self.turn.hit.all_input_nodes
        is_compared = op_name(hits) in ("gt", "greater") and hits.args[1] == 0
        total: Any = hits.args[0] if is_compared else hits
        dims = total.kwargs.get("dim", total.args[1] if len(total.args) > 1 else None)
        dims = {dim % 3 for dim in (dims if isinstance(dims, list | tuple) else ())}
        if not is_compared or op_name(total) != "sum" or dims != {1, 2}:
            raise TurnsError("hits of a loop, expected those of which a mask has a row")
        if total.args[0] is not self.stacks[found[0].all_input_nodes[0]]:
            raise TurnsError("hits of a loop are not those of the mask that it reads")
        return found[0]

    def _find_ids(self, mask: fx.Node) -> fx.Node:
        """Return the ids, a row per token, of which `mask` has ones by expert, choice and token."""
        dims = mask.args[1] if isinstance(mask.args[1], list | tuple) else mask.args[1:]
        source = mask.all_input_nodes[0]
        if op_name(mask) != "permute" or tuple(dims) != (2, 1, 0) or op_name(source) != "one_hot":
            raise TurnsError("the mask of a loop over hits, expected ids as ones by expert, choice and token")
        (ids,) = source.all_input_nodes
        if _value(ids).dim() != 2 or not isinstance(_value(ids).shape[-1], int):
            raise TurnsError("the ids of a loop over hits, expected a row per token")
        return ids

    def _find_sum(self) -> fx.Node:
        """Return the one node that adds the rows of a turn to those of their tokens, in a tensor of zeros."""
        adds = [node for node in self.turn.body if op_name(node) == "index_add_"]
        if len(adds) != 1 or len(adds[0].args) != 4 or adds[0].kwargs or adds[0].args[1] != 0:
            raise TurnsError("a loop over hits, expected one sum over tokens at its end")
        target: Any = adds[0].args[0]
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        is_fresh = op_name(target) in NEW and all(order[user] >= order[adds[0]] for user in target.users)
        if not is_fresh or _value(target).dim() != 2 or adds[0].args[2] not in self._parts(1):
            raise TurnsError("a loop over hits, expected its rows added to zeros of their tokens")
        return adds[0]

    def _parts(self, place: int) -> list[fx.Node]:
        return [user for user in self.rows.users if op_name(user) == "getitem" and user.args[1] == place]

    def _check_skips(self) -> None:
        """Check that the numbers that a loop skips name no expert."""
        num_experts = {int(_value(stack).shape[0]) for stack in self.stacks.values()}
        skipped: list[Any] = [node.args[1] for node in self.turn.body if node.target is SKIPS]
        if len(num_experts) != 1 or any(number < min(num_experts) for number in skipped):
            raise TurnsError(f"a loop over hits skips {skipped}, expected none of its {num_experts} experts")

    def _replace_rows(self, add: fx.Node) -> None:
        """Let what is read at the rows of a turn be read for all choices: of x each token's row, of weights each."""
        choices, tokens = self._parts(0), self._parts(1)
        for user in list(dict.fromkeys(user for part in tokens for user in part.users)):
            if user is add:
                continue
            read, index = user.args[:2] if op_name(user) == "getitem" else (None, None)
            if index in tokens and _has_rows(read, self.ids):
                new = self._make(user, torch.repeat_interleave, read, self.num_choices, dim=0)
            elif (
                isinstance(index, tuple)
                and index[0] in tokens
                and index[1] in choices
                and self._is_of_ids(read)
            ):
                new = self._make(user, "reshape", read, -1)
                if index[2:] == (None,):
                    new = self._make(user, "unsqueeze", new, -1)
            else:
                raise TurnsError(f"{user.name} reads other things of a hit than its tokens' rows and weights")
            self._replace(user, new)

    def _replace_products(self) -> None:
        """Let products with the matrix of the turn's expert be those of each row with its own."""
        for pick in self.stacks:
            for user in list(pick.users):
                self._replace(user, self._product(user, pick))

    def _product(self, user: fx.Node, pick: fx.Node) -> fx.Node:
        name, rank, (first, *others) = op_name(user), _value(pick).dim(), user.args
        if name == "linear" and rank == 2 and others[:1] == [pick]:
            column = self._make(user, "unsqueeze", first, -1)
            product = self._make(user, torch.bmm, self._copies(user, pick), column)
            product = self._make(user, "squeeze", product, -1)
            bias: Any = others[1] if len(others) > 1 else user.kwargs.get("bias")
            if bias is None:
                return product
            return self._make(
                user, torch.add, product, self._copies(user, bias) if bias in self.stacks else bias
            )
        if name == "matmul" and rank == 2 and others == [pick]:
            row = self._make(user, "unsqueeze", first, 1)
            return self._make(user, "squeeze", self._make(user, torch.bmm, row, self._copies(user, pick)), 1)
        if name == "add" and rank == 1 and others == [pick] and not user.kwargs:
            return self._make(user, torch.add, first, self._copies(user, pick))
        raise TurnsError(
            f"{user.name} reads what an expert has, expected a product with a matrix or a bias added"
        )

    def _is_of_ids(self, read: Any) -> bool:
        """Return whether `read` has one item for each choice, as the ids have."""
        ours, theirs = _value(self.ids).shape, _value(read).shape
        return len(theirs) == len(ours) and all(map(same_size, ours, theirs))

    def _copies(self, at: fx.Node, pick: fx.Node) -> fx.Node:
        flat = self._make(at, "reshape", self.ids, -1)
        copies = self._make(at, operator.getitem, self.stacks[pick], flat)
        copies.meta[OF_A_LOOP] = True
        return copies

    def _replace(self, node: fx.Node, by: fx.Node) -> None:
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def _make(self, at: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Return a new node before `at`, with its provenance and an example of its value."""
        with self.graph.inserting_before(at):
            if isinstance(target, str):
                new = self.graph.call_method(target, args, kwargs)
            else:
                new = self.graph.call_function(target, args, kwargs)
        new.meta = dict(at.meta)
        known, named = tree_map_only(fx.Node, _value, (args, kwargs))
        mode = next((getattr(value, "fake_mode", None) for value in known if isinstance(value, Tensor)), None)
        with mode or contextlib.nullcontext(), torch.enable_grad():
            run = getattr(known[0], target) if isinstance(target, str) else target
            new.meta["example_value"] = run(*known[isinstance(target, str) :], **named)
        return new


def _has_rows(read: Any, ids: fx.Node) -> bool:
    value = _value(read)
    return value.dim() == 2 and same_size(value.shape[0], _value(ids).shape[0])


def _value(node: fx.Node) -> Any:
    return node.meta["example_value"]
