"""What `fxopt/capture/torch_distributed.py` takes for granted of torch's engines: it fails where a version moved it."""

from __future__ import annotations


def test_the_private_parts_of_torchs_engines_are_where_fxopt_looks(two):
    for answer in two.run("privates"):
        assert answer["hooks"] == [[True, True, False], [True, True], [True, True]], (
            "FSDP2's hooks, then a user's"
        )
        assert answer["states"] == [True, True], "one state for a group, none outside FSDP2"
        assert answer["initialized"] == [False, True], "a state knows its root after the first forward"
        assert answer["policy"] == [True, True], "the mixed precision policy"
        assert answer["group"], "the process group that a module is sharded over"
        assert answer["ranks"], "the ranks that train it"
        assert answer["store"], "the store of the default process group"
        assert answer["ddp"] == [True, True], "DistributedDataParallel names itself while it runs"
        assert answer["sink"], "what DistributedDataParallel passes outputs through"
        assert answer["dtensor"] == [True, False]
        assert answer["managed"] == [True, True, False], "whose parameters FSDP2 shards"
        assert answer["base"], "what FSDP2 reads of each output"
