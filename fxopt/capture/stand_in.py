"""What Dynamo sees of a block while it captures the model around it: values of the form the block returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxopt.capture import torch_modules, torch_stand_ins, zero
from fxopt.capture.engines import (
    cast_inputs,
    cast_output,
    gathered_device,
    gathered_dtype,
    gathers,
    say_kept,
)
from fxopt.capture.four_bits import FourBitLayers
from fxopt.capture.given_lists import GivenLists, writable
from fxopt.capture.hooks import hooks_hidden, is_not_recorder, is_users_hook
from fxopt.capture.modules import tensors_of, walk
from fxopt.capture.places import forward_line, with_place
from fxopt.capture.reasons import frames_of
from fxopt.capture.recorders import Counts, active, count_collected, run_collecting
from fxopt.capture.shadow import shadow_of
from fxopt.capture.tail import TailRefusal
from fxopt.capture.torch_distributed import is_dtensor
from fxopt.capture.trial import try_on_values
from fxopt.capture.writes_watched import WritesWatched
from fxopt.graph.torch_private import tree_leaves, tree_map_only, unset_fake_temporarily


class StandIns:
    """Makes the stand-in values of one model's blocks; equal blocks on equal arguments are run once.

    A block that looks at values (experts in a loop) cannot run on stand-ins: it is run on random values of the same
    sizes. One that keeps something in its attributes on the way cannot be stood in for: what it keeps would be a
    stand-in, and the model may read it.
    """

    def __init__(self) -> None:
        self._forms: dict[Any, Any] = {}
        self._running = False
        self.keys_put: tuple[tuple[Any, ...], ...] = ()
        """By mapping among its arguments: the keys that the last block put values in for."""
        self.values_put: tuple[Any, ...] = ()
        self.failed_in: list[tuple[str, int]] = []
        """Where the last block that failed on stand-ins did so: Dynamo tells its errors without their traceback."""

    def clear(self) -> None:
        """Forget all forms: they keep alive what the capture that made them held."""
        self._forms.clear()
        self.failed_in, self.keys_put, self.values_put = [], (), ()

    def call(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return stand-ins of the form `block` returns for these stand-in arguments."""
        if self._running:
            return torch_modules.stock_call(block, *args, **kwargs)
        args = tuple(map(writable, args))
        kwargs = {name: writable(value) for name, value in kwargs.items()}
        fakes: list[torch.Tensor] = []
        forms = _form_of((args, kwargs), fakes)
        mode = torch_stand_ins.fake_mode_of(fakes[0])
        weights = tuple(
            [(zero.whole_shape(value), value.dtype, value.requires_grad) for value in tensors_of(block)]
        )
        modules = tuple([(path, type(module)) for module, path in walk(block).items()])
        mappings = [value for value in (*args, *kwargs.values()) if isinstance(value, dict)]
        before = [dict(mapping) for mapping in mappings]
        collected = active() or {}
        counts = count_collected(collected)
        key = (modules, forms, weights, block.training, id(mode), id(block) if mappings else None, counts)
        if mappings or key not in self._forms:
            lists = GivenLists(args, kwargs)
            with zero.parameters_in_plain_dicts(block):
                found = self._run(mode, block, args, kwargs, counts)
            lists.check(block)
            self._note_put(block, mappings, before)
            self._forms[key] = found
        output, added = tree_map_only(torch.Tensor, _like, self._forms[key])
        for name, values in added.items():
            collected[name].extend(values)
        return output

    def _note_put(
        self, block: nn.Module, mappings: list[dict[Any, Any]], before: list[dict[Any, Any]]
    ) -> None:
        """Note what a block has put into the mappings it was given."""
        pairs = list(zip(mappings, before, strict=True))
        if any(old.keys() - new.keys() for new, old in pairs):
            raise TailRefusal(
                with_place("a block takes something out of a mapping it is given", forward_line(block))
            )
        self.keys_put = tuple(
            tuple(key for key, value in new.items() if key not in old or old[key] is not value)
            for new, old in pairs
        )
        self.values_put = tuple(
            new[key] for (new, _), keys in zip(pairs, self.keys_put, strict=True) for key in keys
        )

    def _run(
        self, mode: Any, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], counts: Counts
    ) -> tuple[Any, dict[str, list[Any]]]:
        kept = next((reason for module in block.modules() if (reason := say_kept(module))), None)
        if kept is not None:
            raise TailRefusal(kept)
        self._running = True
        before = {module: dict(module.__dict__) for module in block.modules()}
        own = (*block.named_parameters(), *block.named_buffers())
        try:
            state = {
                name: torch_stand_ins.make_whole_stand_in(
                    mode,
                    tensor,
                    zero.whole_shape(tensor),
                    gathered_dtype(block, tensor),
                    gathered_device(block, tensor),
                )
                if is_dtensor(tensor) or zero.is_partitioned(tensor)
                else torch_stand_ins.make_stand_in(mode, tensor)
                for name, tensor in own
            }
            FourBitLayers(block).restore_in(block, state)
            shadow = shadow_of(block, {id(tensor): state[name] for name, tensor in own})
            shadows = {module: dict(module.__dict__) for module in shadow.modules()}
            args, kwargs = cast_inputs(block, args, kwargs)
            out: Any = None
            failure: Exception | None = None
            try:
                with (
                    torch_stand_ins.real_tensors_allowed(mode),
                    hooks_hidden((*before, *shadows), is_not_recorder),
                    WritesWatched(block),
                ):
                    out, added = run_collecting(shadow, counts, args, kwargs)
                    out = cast_output(block, out), added
            except TailRefusal:
                raise
            except Exception as error:
                failure = error
            changed = _take_stand_ins_back(before) or (_find_change(shadows) if failure is None else "")
            if failure is not None:
                # Parameters that are spread over ranks are gathered by hooks, which know the block's own modules.
                with unset_fake_temporarily():
                    own_buffers = {id(buffer): buffer.detach().clone() for buffer in block.buffers()}
                tried = block if gathers(block) else shadow_of(block, own_buffers)
                before = {module: dict(module.__dict__) for module in tried.modules()}
                try:
                    with hooks_hidden(tried.modules(), is_users_hook):
                        out = try_on_values(tried, args, kwargs, counts)
                    changed = changed or _find_change(before)
                finally:
                    _put_back(before)
                if out is None:
                    raise failure
        except Exception as error:
            self.failed_in = frames_of(error)
            raise
        finally:
            self._running = False
        if changed:
            reason = f"a block sets {changed} while it runs, which may be read after the blocks"
            raise TailRefusal(with_place(reason, forward_line(block)))
        return out


def _take_stand_ins_back(before: dict[nn.Module, dict[str, Any]]) -> str:
    """Give modules of the block itself back what a stand-in stands for now, and return the name of one such, or "".

    Only plain objects and closures lead there. What else has changed, another thread may have.
    """
    found = ""
    for module, attributes in before.items():
        for name, value in list(module.__dict__.items()):
            if attributes.get(name) is value or not any(map(torch_stand_ins.is_fake, tree_leaves(value))):
                continue
            found = f"{type(module).__name__}.{name}"
            if name in attributes:
                module.__dict__[name] = attributes[name]
            else:
                del module.__dict__[name]
    return found


def _put_back(before: dict[nn.Module, dict[str, Any]]) -> None:
    """Give modules back what they had; other threads may run them, so nothing is away meanwhile."""
    for module, attributes in before.items():
        module.__dict__.update(attributes)
        for name in module.__dict__.keys() - attributes.keys():
            del module.__dict__[name]


def _form_of(value: Any, fakes: list[torch.Tensor]) -> Any:
    """Return what tells arguments of one form from those of another; put their stand-in tensors into `fakes`."""
    if torch_stand_ins.is_fake(value):
        fakes.append(value)
        return str(value.shape), value.dtype, value.requires_grad
    if isinstance(value, tuple | list):
        return (type(value), *[_form_of(item, fakes) for item in value])
    if isinstance(value, dict):
        return (dict, *[(name, _form_of(item, fakes)) for name, item in value.items()])
    return str(value)


def _find_change(before: dict[nn.Module, dict[str, Any]]) -> str:
    """Return the name of an attribute that a module has got or changed since, or ""."""
    for module, attributes in before.items():
        for name, value in module.__dict__.items():
            if name not in attributes or attributes[name] is not value:
                return f"{type(module).__name__}.{name}"
    return ""


def _like(form: torch.Tensor) -> torch.Tensor:
    stand_in = torch.empty_like(form)
    return stand_in.requires_grad_(form.requires_grad) if form.is_floating_point() else stand_in
