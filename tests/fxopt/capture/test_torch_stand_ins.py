"""Fails in plain words when a torch version moves something private of stand-in tensors that fxopt touches."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxopt.capture import torch_stand_ins


def test_stand_ins_are_told_from_tensors_at_any_depth():
    with FakeTensorMode() as mode:
        fake = torch.ones(2)
    assert torch_stand_ins.is_fake(fake), "torch._subclasses.FakeTensor moved"
    assert not torch_stand_ins.is_fake(torch.ones(2))
    assert torch_stand_ins.holds_fake((1, {"a": [fake]}), {})
    assert not torch_stand_ins.holds_fake((1,), {"a": [torch.ones(2)]})
    assert torch_stand_ins.fake_mode_of(fake) is mode, "FakeTensor.fake_mode moved"


def test_a_stand_in_has_fixed_sizes_and_carries_what_was_set_on_the_tensor():
    tensor = torch.ones(2, 3)
    tensor.scales = torch.ones(1)  # pyright: ignore[reportAttributeAccessIssue]
    stand_in = torch_stand_ins.make_stand_in(FakeTensorMode(shape_env=ShapeEnv()), tensor)
    assert tuple(map(type, stand_in.shape)) == (int, int), "from_tensor no longer takes static_shapes"
    assert stand_in.scales is tensor.scales
    device = torch.device("meta")
    whole = torch_stand_ins.make_whole_stand_in(FakeTensorMode(), tensor, (4, 3), torch.bfloat16, device)
    assert (whole.shape, whole.dtype, whole.device) == ((4, 3), torch.bfloat16, device)


def test_real_tensors_are_read_beside_stand_ins_within_the_scope():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        fake = torch.ones(2)
    with torch_stand_ins.real_tensors_allowed(mode):
        assert torch_stand_ins.is_fake(fake + torch.ones(2)), "FakeTensorMode.allow_non_fake_inputs moved"
        torch_stand_ins.make_stand_in(mode, torch.tensor([0, 1])).nonzero()
    assert not mode.allow_non_fake_inputs
    assert not mode.shape_env.pending_fresh_unbacked_symbols, "a size made up in the scope is still asked for"
