"""The host store: what it holds on the device, what it sends and brings back, and the input's cost in a plan."""

import weakref

import pytest
import torch
from torch import nn

from ds_wsi.models.slide_model import SlideModel
from ds_wsi.partition.apply import partition_layers
from ds_wsi.partition.execution.host_store import IN_FLIGHT, HostStore
from ds_wsi.partition.execution.input_tensor import InputCost, input_cost
from ds_wsi.partition.execution.saved_on_host import SavedOnHost
from ds_wsi.partition.planning.search import plan_partition
from ds_wsi.partition.policy import PartitionPolicy
from ds_wsi.runtime.memory import ByteMeter
from ds_wsi.stacking import host_tiles
from ds_wsi.stacking.host_tiles import HostStacks, HostTiles, PreparedTiles
from ds_wsi.stacking.stacked_bags import StackedBags, bounds_on, stack_bags

META = torch.device("meta")
CPU = torch.device("cpu")
KIB = 2**10


def encoder(width: int = 8, depth: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(width if index else 3, width, 3, padding=1), nn.ReLU()) for index in range(depth)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()


def test_only_two_of_the_largest_tensors_are_on_their_way_out():
    store = HostStore(META, overlap=True, simulated=True)
    with ByteMeter() as meter:
        for _ in range(20):
            store.put(torch.empty(64 * KIB, dtype=torch.uint8, device=META))
        assert store.held_bytes == 20 * 64 * KIB
        assert meter.live == IN_FLIGHT * 64 * KIB
        for _ in range(40):  # small ones share the room of two large ones
            store.put(torch.empty(16 * KIB, dtype=torch.uint8, device=META))
        assert meter.live == IN_FLIGHT * 64 * KIB


def test_what_comes_back_was_sent_and_holds_no_memory_any_more():
    store = HostStore(META, overlap=True, simulated=True)
    with ByteMeter() as meter:
        first, last = (store.put(torch.empty(64 * KIB, dtype=torch.uint8, device=META)) for _ in range(2))
        assert meter.live == 128 * KIB
        back = store.get(last)
        assert meter.live == 64 * KIB  # `back` alone: both were sent before it
        store.release(last)
        store.release(first)
        del back
        assert meter.live == 0


def test_a_store_that_holds_nothing_is_as_a_new_one():
    """A call that was dropped leaves nothing on the device, and one with larger tensors no room for more of them."""
    store = HostStore(META, overlap=True, simulated=True)
    with ByteMeter() as meter:
        large = [store.put(torch.empty(512 * KIB, dtype=torch.uint8, device=META)) for _ in range(3)]
        assert meter.live == IN_FLIGHT * 512 * KIB
        for ticket in large:
            store.release(ticket)
        assert meter.live == 0
        for _ in range(20):
            store.put(torch.empty(64 * KIB, dtype=torch.uint8, device=META))
        assert meter.live == IN_FLIGHT * 64 * KIB


def test_without_overlap_nothing_is_held():
    store = HostStore(CPU)
    with ByteMeter() as meter:
        store.put(torch.empty(64 * KIB, dtype=torch.uint8))
        assert meter.live == 0


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()])
def test_a_tensor_with_two_owners_comes_back_once(activation):
    # A convolution and the activation before it save the same tensor.
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(8 if index else 3, 8, 3, padding=1), activation) for index in range(4)]
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    handle = partition_layers(module, PartitionPolicy(mode="offload", chunk_size=2))
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    module(x).square().sum().backward()
    assert handle.forward is not None
    store = handle.forward._store
    assert store is not None
    assert store.sent_bytes > 0
    assert store.fetched_bytes == store.sent_bytes
    assert store.held_bytes == 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_two_calls_on_one_input_are_outstanding(depth):
    """The second saves tensors that lie in host memory already: in an order of its own."""
    x, gradients = torch.randn(16, 3, 32, 32, dtype=torch.float64), []
    for mode in ("native", "offload"):
        module = encoder(depth=depth)
        partition_layers(module, PartitionPolicy(mode=mode, chunk_size=2), check=False)
        one, other = module(x), module(x)
        (one.sum() + other.square().sum()).backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for second, first in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(second, first, rtol=1e-10, atol=1e-12)


def test_what_a_call_saves_is_asked_for_in_its_own_order(monkeypatch):
    """Where a tensor has two owners, each prefetches what it saved before it, not what the other did."""
    store, asked = HostStore(CPU), []
    tensors = [torch.randn(64, 64, requires_grad=True) for _ in range(4)]
    first, second = (SavedOnHost(nn.Module(), store, torch.empty(0)) for _ in range(2))
    with first.saving():
        kept = [one.square() for one in tensors]
    with second.saving():
        outs = [tensors[index].square() for index in (3, 0)]
    tickets = dict(zip((3, 0), second._tickets, strict=True))
    assert store.sent_bytes == sum(one.nbytes for one in tensors)  # once each
    monkeypatch.setattr(store, "prefetch", asked.append)
    monkeypatch.setattr(store, "get", lambda ticket: ticket.memory.view(ticket.shape))
    outs[1].sum().backward()
    assert asked == [tickets[3]]
    del kept


@pytest.mark.parametrize("mode", ["offload", "stream"])
def test_views_of_one_memory_that_differ_by_a_promise_are_two_tensors(mode):
    """A conjugate, and the imaginary part of one, share address, shape and version with what they are of."""

    class Power(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

        def forward(self, x):
            z = torch.fft.fft2(self.conv(x))
            power = (z * z.conj()).real + z.imag * z.conj().imag * 0.3 + z.imag.exp().log1p()
            return self.head(torch.log1p(power.abs()).mean((2, 3)))

    x, gradients = torch.randn(8, 3, 16, 16, dtype=torch.float64) / 16, []
    for each_mode in ("native", mode):
        torch.manual_seed(0)
        module = Power().double()
        partition_layers(module, PartitionPolicy(mode=each_mode, chunk_size=2), check=False)
        module(x).sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for gradient, native_gradient in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(gradient, native_gradient, rtol=1e-10, atol=1e-12)


def test_a_tensor_its_conjugate_and_its_negative_come_back_as_they_were_put():
    store, z = HostStore(CPU), torch.randn(32, 32, dtype=torch.complex128)
    given = [z, z.conj(), z.imag, z.conj().imag]
    assert given[3].is_neg()
    tickets = [store.put(one) for one in given]
    for one, ticket in zip(given, tickets, strict=True):
        assert torch.equal(store.get(ticket), one)


def test_a_plan_counts_what_is_on_its_way(monkeypatch):
    module, policy = encoder(), PartitionPolicy(mode="offload", chunk_size=4)
    shape = (64, 3, 64, 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    there = plan_partition(module, shape, policy, dtype=torch.float64, device=CPU)
    beside = plan_partition(module, shape, policy, dtype=torch.float64, device=torch.device("cuda"))
    largest = 4 * 8 * 64 * 64 * 8
    forward = [plan.timeline[0][1] for plan in (there, beside)]  # backward peaks at gradients, beside these
    assert forward[0] < forward[1] <= forward[0] + IN_FLIGHT * largest


def test_an_input_that_is_prepared_costs_what_it_takes():
    x = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    cost = input_cost(x, 0, CPU, lambda part: (part.float() / 255 - 0.5) / 0.2)
    one = 3 * 16 * 16 * 4
    assert cost == InputCost(copied=0, prepared=True, working=one)  # of two float32 copies one is the result
    assert input_cost(x, 0, CPU, None) == InputCost()
    assert input_cost(x, 0, META, None) == InputCost(copied=3 * 16 * 16)


def test_a_plan_counts_the_input():
    module, shape = encoder(), (64, 3, 64, 64)
    policy = PartitionPolicy(mode="recompute", chunk_size=8)
    bare = plan_partition(module, shape, policy, dtype=torch.float64)
    working = 3 * 64 * 64 * 8
    costly = plan_partition(module, shape, policy, dtype=torch.float64, source=InputCost(0, True, 40 * working))
    prepared = 8 * 41 * working  # of a chunk: forty copies while it is prepared, and the result
    assert prepared <= costly.peak_bytes <= prepared + bare.peak_bytes
    assert costly.native_peak_bytes >= 64 * 41 * working


def test_a_stack_in_host_memory_is_prepared_chunk_by_chunk_as_a_whole():
    torch.manual_seed(1)
    bags = [torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8) for n in (5, 1, 9)]
    changes = [lambda tiles: tiles.flip(-1), lambda tiles: 255 - tiles, lambda tiles: tiles.rot90(1, (-2, -1))]
    whole = torch.cat([change(bag) for change, bag in zip(changes, bags, strict=True)])
    stack = HostTiles(HostStacks(CPU).lay(bags), [5, 1, 9], changes)
    assert torch.equal(stack.change(stack.tiles, 0), whole)
    prepare = PreparedTiles(stack, lambda tiles: tiles.double() / 255)
    for first in range(0, 15, 4):
        part = stack.tiles[first : first + 4]
        assert torch.equal(prepare.at(part, first), whole[first : first + 4].double() / 255)
    some = stack[4:7]
    assert torch.equal(some.change(some.tiles, 0), whole[4:7])


def test_a_larger_buffer_is_made_once_the_smaller_one_is_gone(monkeypatch):
    """A buffer of 8 GB, say: host memory must not hold both. And where nothing can be locked nobody asks again."""
    made, alive, closed = [], [], []

    class Locked:
        def __init__(self, size: int) -> None:
            self.data = torch.empty(size, dtype=torch.uint8)

        def close(self) -> None:
            closed.append(self.data.numel())

    def locked(size: int, device: torch.device) -> Locked | None:
        alive.append(sum(one() is not None for one in made))
        if size > 6:
            return None
        one = Locked(size)
        made.append(weakref.ref(one.data))
        return one

    monkeypatch.setattr(host_tiles, "locked_or_none", locked)
    stacks = HostStacks(torch.device("cuda"))
    for count in (2, 3, 5, 6, 7, 8, 9):  # two buffers take turns
        bag = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
        assert torch.equal(stacks.lay([bag[:1], bag[1:]]), bag)
    assert alive == [0, 1, 1, 1, 1]
    assert closed == [2, 3, 5, 6]


@pytest.mark.parametrize("mode", ["native", "lean", "recompute", "offload"])
def test_a_model_trains_on_a_stack_in_host_memory_as_on_tensors(mode):
    bags = [torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8) for n in (5, 9)]
    changes = [lambda tiles: tiles.flip(-1), lambda tiles: 255 - tiles]

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 2).double()

        def forward(self, stack: StackedBags):
            return self.head(torch.stack([part.mean(0) for part in stack.split()]))

    def gradients(stack: StackedBags) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = SlideModel(encoder(), Mean())
        partition_layers(model.encoder, PartitionPolicy(mode=mode, chunk_size=3))
        model(stack).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    on_device = stack_bags([change(bag) for change, bag in zip(changes, bags, strict=True)])
    host = StackedBags(HostTiles(HostStacks(CPU).lay(bags), [5, 9], changes), bounds_on(CPU, [5, 9]))
    for of_host, of_device in zip(gradients(host), gradients(on_device), strict=True):
        torch.testing.assert_close(of_host, of_device, rtol=1e-12, atol=1e-14)
