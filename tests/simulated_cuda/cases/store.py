"""What a host store does under a schedule: training steps, and tensors that take other ways through it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.execution.host_store import ALIGN, IN_FLIGHT, HostStore
from simulated_cuda.cases import report
from simulated_cuda.cases.modes import difference, step
from simulated_cuda.mutations import MUTATIONS, applied

CUDA = torch.device("cuda", 0)
TOLERANCE = 1e-10


class Dictionary:
    """A disk in memory."""

    def __init__(self) -> None:
        self.places: dict[int, Tensor] = {}
        self.written = 0

    def write(self, data: Tensor) -> int:
        self.written += 1
        self.places[self.written] = data.clone()
        return self.written

    def read(self, place: int, data: Tensor) -> None:
        data.copy_(self.places[place])

    def free(self, place: int) -> None:
        del self.places[place]


def encoder() -> nn.Sequential:
    """Three layers of one width."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(3):
        layers += [nn.Conv2d(8 if index else 3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().train()


def steps(module: nn.Module, place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Two steps on other tiles, the second on top of the first's gradients."""
    results = []
    for seed in range(2):
        x = torch.randn(16, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        results += step(module, place(x))
    return results


def trained(mode: str, place: Callable[[Tensor], Tensor], expected: list[Tensor], spill: bool = False) -> bool:
    """Whether a partition's steps are those of the plain module."""
    module, disk = encoder().cuda(), Dictionary()
    policy = PartitionPolicy(mode=mode, chunk_size=4)
    if spill:
        policy = replace(policy, host_budget_bytes=2**19, nvme_path="/", nvme_budget_bytes=2**30)
    partition_layers(module, policy, spill=disk if spill else None)
    right = difference(steps(module, place), expected) < TOLERANCE
    return right and bool(disk.written) == spill


def filled(value: float) -> Tensor:
    """A tensor of one number, of the size of a block in the store."""
    return torch.full((ALIGN,), value, dtype=torch.float64, device=CUDA)


def holds(tensor: Tensor, value: float) -> bool:
    """Whether it is what `filled` made, once all is done."""
    torch.cuda.synchronize()
    return bool((tensor.cpu() == value).all())


def dropped() -> bool:
    """A tensor is fetched and dropped unseen; whatever takes its memory is not written over."""
    store = HostStore(CUDA)
    ticket = store.put(filled(1.0))
    store.prefetch(ticket)
    store.release(ticket)
    others = [filled(2.0) for _ in range(4)]
    return all(holds(other, 2.0) for other in others)


def dropped_unsent() -> bool:
    """A call is dropped whose tensors are on their way out: nothing stays on the device, nobody writes under them."""
    store = HostStore(CUDA)
    before = torch.cuda.memory_allocated()
    for ticket in [store.put(filled(1.0)) for _ in range(IN_FLIGHT)]:
        store.release(ticket)
    held = torch.cuda.memory_allocated() - before
    others = [filled(2.0) for _ in range(4)]
    return held == 0 and all(holds(other, 2.0) for other in others)


def ended_by_an_error() -> bool:
    """A forward ends in an error while a chunk of its page-locked input arrives, in memory that others take."""
    module, seen = encoder().cuda(), []
    partition_layers(module, PartitionPolicy(mode="recompute", chunk_size=4), check=False)
    x = torch.full((16, 3, 12, 12), 7.0, dtype=torch.float64).pin_memory()

    def prepare(part: Tensor) -> Tensor:
        seen.append(part.shape)
        if len(seen) == 3:  # of the probe, and of two chunks
            raise ValueError("a bad tile")
        return part

    with suppress(ValueError):
        module(x, prepare=prepare)
    others = [torch.full((4, 3, 12, 12), 2.0, dtype=torch.float64, device=CUDA) for _ in range(6)]
    return len(seen) == 3 and all(holds(other, 2.0) for other in others)


def host_memory_used_again() -> bool:
    """A block in host memory goes to a tensor of another stream, while its last one is on its way back."""
    store, beside = HostStore(CUDA), torch.cuda.Stream()
    first = store.put(filled(1.0))
    fetched = store.get(first)
    store.release(first)
    with torch.cuda.stream(beside):  # whose last kernels wait for the first copies out
        others = [store.put(filled(float(value))) for value in range(2, 6)]
    right = holds(fetched + 0.0, 1.0)
    return right and all(holds(store.get(other), float(value)) for value, other in enumerate(others, 2))


def sent_later() -> bool:
    """One tensor comes back while another is on its way out, whose memory is not given away."""
    store = HostStore(CUDA)
    first, second = store.put(filled(1.0)), store.put(filled(2.0))
    store.get(first)
    others = [filled(3.0) for _ in range(4)]
    return holds(store.get(second), 2.0) and all(holds(other, 3.0) for other in others)


def memory_used_again() -> bool:
    """A tensor comes back to memory that kernels have just written, and so does a chunk of an input."""
    store, source = HostStore(CUDA), torch.full((ALIGN,), 2.0, dtype=torch.float64).pin_memory()
    ticket = store.put(filled(1.0))
    write_and_free()
    right = holds(store.get(ticket) + 0.0, 1.0)
    write_and_free()
    return right and holds(store.bring(source).get() + 0.0, 2.0)


def write_and_free() -> None:
    """Leave blocks in the allocator that kernels have written."""
    tensors = [filled(3.0) for _ in range(4)]
    del tensors


def host_memory_read_from_disk() -> bool:
    """A block in host memory is read into from the disk, while its last tensor is on its way there."""
    size = ALIGN * 8
    store = HostStore(CUDA, spill=Dictionary(), limit_bytes=2 * size)
    first, second, third = (store.put(filled(float(value))) for value in range(3))  # the first is on the disk now
    store.release(second)
    store.prefetch(first)
    assert first.reading is not None
    first.reading.result()
    values = [store.get(third) + 0.0, store.get(first) + 0.0]
    assert store._thread is not None
    store._thread.shutdown()
    return holds(values[0], 2.0) and holds(values[1], 0.0)


WAYS: dict[str, Callable[[], bool]] = {
    "dropped": dropped,
    "dropped unsent": dropped_unsent,
    "ended by an error": ended_by_an_error,
    "memory used again": memory_used_again,
    "host memory used again": host_memory_used_again,
    "sent later": sent_later,
    "host memory read from disk": host_memory_read_from_disk,
}


def noticed(ways: dict[str, Callable[[], bool]]) -> Iterator[str]:
    """What comes out wrong, or raises."""
    for name, way in ways.items():
        try:
            if not way():
                yield name
        except Exception as error:  # of the sanitizer, for the most part
            yield f"{name}: {type(error).__name__}"


def main(schedule: str) -> None:
    """Measure: all that is noticed of the store as it is, the first thing of each mutation."""
    expected = steps(encoder(), lambda x: x)
    ways: dict[str, Callable[[], bool]] = {
        **WAYS,
        "offload": partial(trained, "offload", Tensor.cuda, expected),
        "page-locked input": partial(trained, "lean", Tensor.pin_memory, expected),
        "stream": partial(trained, "stream", Tensor.cuda, expected),
        "disk": partial(trained, "offload", Tensor.cuda, expected, spill=True),
    }
    results = {"": list(noticed(ways))}
    for mutation in MUTATIONS:
        if schedule in mutation.schedules:
            with applied(mutation):
                results[mutation.name] = list(islice(noticed(ways), 1))
    report(results)


if __name__ == "__main__":
    main(sys.argv[1])
