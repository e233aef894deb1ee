"""What is private of how transformers collects outputs: fails in plain words when a version moves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils import output_capturing

from fxopt.capture import recorders
from fxopt.capture.hooks import Hooks, find_hooks


def make_block() -> nn.Sequential:
    """Return a block on whose first inner module an output is collected under the key "scores"."""
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    output_capturing.install_output_capuring_hook(block[0], "scores", 3)
    return block


def hook_of(module: nn.Module) -> Any:
    (hook,) = module._forward_hooks.values()
    return hook


def test_a_hook_of_transformers_is_told_with_its_key_and_its_place_in_the_output() -> None:
    """Moved if this fails: the names `key` and `index` that such a hook closes over, or the file it is in."""
    block = make_block()
    recorder = recorders.recorder_of(block[0], hook_of(block[0]))
    assert recorder == recorders.Recorder(block[0], "scores", 3)
    assert recorders.recorder_of(block[0], lambda *_: None) is None


def test_a_recorder_counts_while_its_key_is_collected() -> None:
    """Moved if this fails: `_active_collector`, which holds the lists of the call that runs."""
    block = make_block()
    recorder = recorders.Recorder(block[0], "scores", 3)
    assert find_hooks(block) == Hooks(None, True)
    collected: dict[str, list[torch.Tensor]] = {"scores": []}
    with recorders.collecting(collected):
        assert recorders.active() is collected
        assert find_hooks(block) == Hooks(None, False, (recorder,))
        recorder.deliver(torch.ones(2))
        with recorders.collecting({}):
            assert find_hooks(block) == Hooks(None, True)
    assert recorders.active() is None
    assert len(collected["scores"]) == 1


def test_the_first_input_is_among_hidden_states_so_that_such_a_hook_inside_a_block_is_anybodys() -> None:
    block = nn.Sequential(nn.Linear(2, 2))
    output_capturing.install_output_capuring_hook(block[0], "hidden_states", 0)
    with recorders.collecting({"hidden_states": []}):
        assert find_hooks(block).live is block[0]


def test_what_is_added_goes_into_one_tuple_with_the_outputs() -> None:
    counts = recorders.count_collected({"scores": [None], "wanted": {2, 0}})
    assert counts == (("scores", 1), ("wanted", (0, 2)))

    def run(x: int) -> tuple[int, None]:
        collected = recorders.active()
        assert collected is not None
        assert collected["wanted"] == {0, 2}
        collected["scores"].extend((x + 1, x + 2))
        return x, None

    output, added = recorders.run_collecting(run, counts, (5,), {})
    assert (output, added) == ((5, None), {"scores": [6, 7]})
    assert recorders.flatten(output, added) == (5, None, 6, 7)
    assert recorders.num_values_of(added) == (("scores", 2),)


def test_nothing_stays_on_a_module_whose_output_was_noted() -> None:
    block, notes = make_block(), recorders.Notes()
    before = dict(block[0]._forward_hooks)
    with notes.placed([recorders.Recorder(block[0], "scores", 0)]):
        block(torch.ones(1, 2))
        assert [place for place, _ in notes.noted] == [0]
    assert dict(block[0]._forward_hooks) == before
    assert notes.noted == []
