"""Values on the host: back before backward reads them, in the order in which it does, and their places given back."""

from __future__ import annotations

import functools
import gc
import uuid

import pytest
import torch
from torch import fx

from fxopt.capture import host_memory, torch_lowering
from fxopt.capture.host_memory import HostMemory, Lane
from fxopt.capture.offload import Offloader
from fxopt.capture.pinned import pin, unpin
from fxopt.capture.planning import Leaving, Mark
from fxopt.errors import FxoptError

LIMIT = 1 << 22


class Double(torch.autograd.Function):
    """Saves its input and a copy of it, and says when its backward runs."""

    @staticmethod
    def forward(ctx, x, name, log):
        ctx.save_for_backward(x, x + 1)
        ctx.note = (name, log)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        name, log = ctx.note
        x, more = ctx.saved_tensors
        log.append(f"backward {name}")
        assert torch.equal(x + 1, more)
        return gradient * 2, None, None


def leave(*numbers):
    leaving = Leaving()
    leaving.numbers = frozenset(numbers)
    return leaving


@pytest.fixture
def told():
    return []


@pytest.fixture
def offloader(told):
    return Offloader(lambda: (LIMIT // 2, LIMIT), told.append)


def test_a_view_that_is_saved_leaves_for_what_it_lies_in():
    graph = fx.Graph()
    x, other = graph.placeholder("x"), graph.placeholder("other")
    view = graph.call_method("t", (x,))
    size = graph.call_method("size", (x, 0))
    x.meta["val"], other.meta["val"] = torch.empty(2, 3), torch.empty(3)
    view.meta["val"], size.meta["val"] = x.meta["val"].t(), 2
    for tagged, numbers in ((None, ()), (x, (1,)), (view, (1,)), (other, (0,))):
        for node in graph.nodes:
            node.meta["offload"] = node is tagged
        for output in graph.find_nodes(op="output"):
            graph.erase_node(output)
        graph.output((view, other, size))
        leaving = Leaving()
        leaving.read(graph)
        assert leaving.numbers == frozenset(numbers), tagged


def run_blocks(offloader, x, leaving, log):
    for name, numbers in enumerate(leaving):
        x = offloader.wrap(lambda x, name=name: Double.apply(x, name, log), leave(*numbers))(x)
    return x


def test_the_block_before_comes_back_while_a_block_runs_backward(offloader, monkeypatch):
    log = []
    places = {}
    copy = Lane.copy

    def logged(self, pairs):
        pairs = list(pairs)
        chunks = [chunk.untyped_storage().data_ptr() for chunk in offloader.memory._chunks]
        for target, source in pairs:
            out = target.untyped_storage().data_ptr() in chunks
            host = target if out else source
            name = places.setdefault(host.data_ptr(), len(places))
            log.append(f"{'out' if out else 'back'} {name}")
        return copy(self, pairs)

    monkeypatch.setattr(Lane, "copy", logged)
    x = torch.randn(1000, requires_grad=True)
    y = run_blocks(offloader, x, [(0,), (0,), (0,), ()], log)
    assert log == ["out 0", "out 1", "out 2"]
    log.clear()
    y.sum().backward()
    assert log == [
        "back 2",
        "backward 3",
        "back 1",
        "backward 2",
        "back 0",
        "backward 1",
        "backward 0",
    ]
    assert torch.equal(x.grad, torch.full_like(x, 16.0))


def test_places_are_given_back_by_backward_and_by_graphs_that_are_dropped(offloader, told):
    x = torch.randn(1000, requires_grad=True)
    reserved = set()
    for backward in (True, False, True, False):
        y = run_blocks(offloader, x, [(0, 1), (1,), ()], [])
        assert offloader.memory.used_bytes == 3 * 4096
        if backward:
            y.sum().backward()
        del y
        assert offloader.memory.used_bytes == 0
        reserved.add(offloader.memory.reserved_bytes)
    assert reserved == {LIMIT // 2}
    assert not told


def test_two_graphs_at_once_and_a_second_backward(offloader):
    x = torch.randn(1000, requires_grad=True)
    first, second = (run_blocks(offloader, x, [(0,), (0, 1), ()], []) for _ in range(2))
    first.sum().backward(retain_graph=True)
    second.sum().backward()
    first.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3 * 8.0))
    del first, second
    gc.collect()
    assert offloader.memory.used_bytes == 0


def test_what_finds_no_place_stays_on_the_device_and_is_said(told):
    offloader = Offloader(lambda: (4096, 4096), told.append)
    x = torch.randn(1000, requires_grad=True)
    y = run_blocks(offloader, x, [(0,), (0,), ()], [])
    assert offloader.memory.used_bytes == 4096
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 8.0))
    assert len(set(told)) == 1
    assert "stays on the device" in told[0]


def test_memory_that_cannot_be_pinned_is_used_as_it_is_and_said(told, monkeypatch):
    def refuse(num_bytes):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(host_memory, "pin", refuse)
    memory = HostMemory(lambda: (4096, LIMIT), told.append)
    assert memory.take(4096, pinned=True) is not None
    assert told == [
        f"offload: {LIMIT} bytes of host memory could not be pinned (CUDA error: out of memory): "
        "transfers wait until they are done"
    ]


def test_pinned_memory_is_reserved_within_the_limit(monkeypatch, told):
    asked = []
    monkeypatch.setattr(host_memory, "CHUNK", 1 << 14)
    monkeypatch.setattr(
        host_memory, "pin", lambda size: asked.append(size) or torch.empty(size, dtype=torch.uint8)
    )
    monkeypatch.setattr(host_memory, "unpin", lambda memory: None)
    memory = HostMemory(lambda: (40_000, 58_000), told.append)
    taken = [memory.take(2000, pinned=True) for _ in range(30)]
    assert asked == [40_000, 1 << 14]
    found = [piece for piece in taken if piece is not None]
    assert len(found) == 40_000 // 2048 + (1 << 14) // 2048
    assert len({(piece.chunk, piece.start) for piece in found}) == len(found)


def test_pinned_memory_is_unpinned_when_it_is_dropped(monkeypatch, told):
    given_up = []
    monkeypatch.setattr(host_memory, "pin", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(host_memory, "unpin", lambda memory: given_up.append(memory.numel()))
    memory = HostMemory(lambda: (4096, LIMIT), told.append)
    memory.take(4096, pinned=True)
    lanes = memory._lanes
    lanes.update({place: Waits(given_up) for place in "ab"})
    assert not given_up
    del memory
    assert given_up == ["waits", "waits", LIMIT]


class Waits:
    """Stands for a lane of a device."""

    def __init__(self, told):
        self.told = told

    def synchronize(self):
        self.told.append("waits")


def test_memory_beyond_the_largest_chunk_is_pinned_in_several(monkeypatch, told):
    asked = []

    def refuse_the_third(size):
        asked.append(size)
        if len(asked) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(host_memory, "CHUNK", 1 << 12)
    monkeypatch.setattr(host_memory, "LARGEST_CHUNK", 1 << 14)
    monkeypatch.setattr(host_memory, "pin", refuse_the_third)
    monkeypatch.setattr(host_memory, "unpin", lambda memory: None)
    memory = HostMemory(lambda: (40_000, 50_000), told.append)
    assert memory.take(2048, pinned=True) is not None
    assert asked == [1 << 14, 1 << 14, 40_000 - (2 << 14)]
    assert len(memory._pinned) == 2
    assert memory.reserved_bytes == 40_000


@pytest.mark.gpu
def test_pinned_memory_is_the_drivers_until_it_is_unpinned():
    memory = pin(1 << 20)
    assert memory.is_pinned()
    there = torch.arange(1 << 20, device="cuda").to(torch.uint8)
    memory.copy_(there, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(memory, there.cpu())
    unpin(memory)
    assert not memory.is_pinned()


def test_views_come_back_with_their_form(offloader):
    wide = torch.randn(20, 30, requires_grad=True)
    view = wide.t()[3:]
    found = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sum()

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            found.append(x)
            return gradient.expand(x.shape)

    offloader.wrap(Look.apply, leave(0))(view).backward()
    assert torch.equal(found[0], view)
    assert (found[0].stride(), found[0].storage_offset()) == (view.stride(), view.storage_offset())


def test_hooks_around_a_block_get_what_stays(offloader):
    x = torch.randn(1000, requires_grad=True)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append("pack") or t, lambda t: seen.append("unpack") or t
    ):
        y = run_blocks(offloader, x, [(1,), (0,)], [])
    assert seen == ["pack", "pack"]
    y.sum().backward()
    assert seen == ["pack", "pack", "unpack", "unpack"]


def test_writing_to_a_value_while_it_leaves_is_an_error_as_in_stock(offloader):
    x = torch.randn(1000, requires_grad=True) * 1
    y = run_blocks(offloader, x, [(1,)], [])
    x.add_(1)
    y = run_blocks(offloader, y, [(0,), ()], [])
    with pytest.raises(FxoptError, match="was written to after the forward pass"):
        y.sum().backward()


def test_values_come_back_to_the_same_two_places_at_each_step(offloader):
    x = torch.randn(1000, requires_grad=True)
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x + 1, x)
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            more, x = ctx.saved_tensors
            assert torch.equal(x + 1, more)
            seen.append(more.data_ptr())
            return gradient * 2

    for _ in range(3):
        y = x
        for leaves in (True, True, True, True, False):
            y = offloader.wrap(Look.apply, leave(0, 1) if leaves else leave())(y)
        y.sum().backward()
    steps = [seen[start + 1 : start + 5] for start in (0, 5, 10)]
    assert steps[0] == steps[1] == steps[2]
    assert steps[0][:2] == steps[0][2:]
    assert len(set(steps[0])) == 2
    (lane,) = offloader.memory._lanes.values()
    assert lane.landing.num_bytes == 2 * 2 * 4096


def test_places_grow_and_a_graph_that_is_dropped_gives_its_own_back(offloader):
    landing = offloader.memory.lane_of(torch.device("cpu")).landing
    first, (part,) = landing.take([600])
    second, parts = landing.take([100, 200])
    assert (first, second) == (0, 1)
    assert [each.numel() for each in (part, *parts)] == [600, 100, 200]
    assert parts[1].storage_offset() == 512
    landing.release(first)
    assert landing.take([2000])[0] == first
    assert landing.num_bytes == 2048 + 1024
    landing.release(first)
    landing.release(second)
    x = torch.randn(1000, requires_grad=True)
    y = run_blocks(offloader, x, [(0,), (0,), ()], [])
    y.sum().backward(retain_graph=True)
    assert landing._taken == set()
    del y
    gc.collect()
    assert offloader.memory.used_bytes == 0


@pytest.mark.slow
def test_under_inductor_no_gradient_lies_where_values_land(offloader, monkeypatch):
    """Inductor writes gradients over values that only backward reads, unless it is told that these are not its own."""

    def run(leaves):
        torch._dynamo.reset()

        def read(self, graph):
            self.numbers = frozenset(range(10)) if leaves else frozenset()

        monkeypatch.setattr(Leaving, "read", read)
        mark = Mark(lambda graph, held: f"{leaves} by {uuid.uuid4()}", decides=False, offload=offloader)
        backend = functools.partial(torch_lowering.inductor_backend, mark=mark)
        block = torch.compile(lambda x, w: x + x * (w @ w), backend=backend)
        torch.manual_seed(0)
        x = torch.randn(64, 64, requires_grad=True)
        weights = [torch.randn(64, 64).div(8).requires_grad_() for _ in range(5)]
        y, passed_on = x, []
        for w in weights:
            y = block(y, w)
            y.register_hook(lambda g: passed_on.append(g.untyped_storage().data_ptr()))
        y.sum().backward()
        return [each.grad for each in (x, *weights)], passed_on

    expected, _ = run(leaves=False)
    found, passed_on = run(leaves=True)
    (lane,) = offloader.memory._lanes.values()
    places = [place.untyped_storage().data_ptr() for place in lane.landing._places]
    assert places
    assert not set(places) & set(passed_on)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_call_does_not_ask_for_what_an_earlier_one_has_on_the_host(offloader):
    x = torch.randn(1000, requires_grad=True)
    kept = run_blocks(offloader, x, [(0,), (0,)], [])
    offloader.begin()
    log = []
    run_blocks(offloader, x, [(0,), ()], log).sum().backward()
    (lane,) = offloader.memory._lanes.values()
    assert log == ["backward 1", "backward 0"]
    assert len(lane.landing._places) == 1, "one block's values came back"
    del kept
