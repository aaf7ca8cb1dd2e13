"""Host memory that ends at a disk: the same tensors, within the limit, and every refusal with its reason."""

import argparse
import copy
import gc
import os
import threading
import weakref
from concurrent.futures import wait

import pytest
import torch
from torch import nn

from ds_wsi.engines.machine import nvme
from ds_wsi.partition import PartitionPolicy, partition_layers, plan_partition
from ds_wsi.partition.execution.chunked_tensor import TileChunks
from ds_wsi.partition.execution.host_store import ALIGN, HostStore
from ds_wsi.training.options import add_train_options, settings_from

CPU = torch.device("cpu")


class Dictionary:
    """A disk for the tests, which counts and refuses to give a place twice."""

    def __init__(self, fails_after=10**9):
        self.places, self.fails_after, self.written, self.read_back = {}, fails_after, 0, 0

    def write(self, data):
        assert data.numel() % ALIGN == 0
        if self.written >= self.fails_after:
            raise OSError("the disk is full")
        self.written += 1
        self.places[self.written] = data.clone()
        return self.written

    def read(self, place, data):
        self.read_back += 1
        data.copy_(self.places[place])

    def free(self, place):
        del self.places[place]


@pytest.mark.parametrize("foreseen", [0, 12 * 8 * ALIGN])
def test_oldest_tensors_go_to_the_disk_and_come_back_unchanged(foreseen):
    disk = Dictionary()
    limit = 4 * 8 * ALIGN
    store = HostStore(CPU, spill=disk, limit_bytes=limit)
    store.reserve(foreseen)
    kept = [torch.randn(ALIGN, 4, dtype=torch.float32).t() for _ in range(12)]  # 16 ALIGN bytes each, transposed
    kept = [one[:2].contiguous() for one in kept]  # 8 ALIGN
    tickets = [store.put(one) for one in kept]
    assert store.capacity_bytes <= limit
    assert disk.written == 8  # of 12, and host memory holds 4
    assert store.spilled_bytes == 8 * 8 * ALIGN
    assert [index for index, ticket in enumerate(tickets) if ticket.memory is None] == list(range(8))
    for one, ticket in reversed(list(zip(kept, tickets, strict=True))):
        store.prefetch(ticket)
        assert torch.equal(store.get(ticket), one)
        assert torch.equal(store.get(ticket), one)  # once more, for a second reader
        store.release(ticket)
    assert disk.read_back == 8
    assert store.held_bytes == 0
    store._thread.shutdown()
    assert disk.places == {}


def test_tensors_read_in_their_first_order_survive_too():
    disk = Dictionary()
    store = HostStore(CPU, spill=disk, limit_bytes=2 * ALIGN)
    kept = [torch.full((ALIGN,), index, dtype=torch.uint8) for index in range(9)]
    tickets = [store.put(one) for one in kept]
    for _ in range(2):
        for one, ticket in zip(kept, tickets, strict=True):
            assert torch.equal(store.get(ticket), one)
    assert store.capacity_bytes <= 2 * ALIGN
    assert disk.written == 8  # the last never left; one that was read back is not written again


class Loop:
    """Garbage that only the collector finds, which drops what it holds."""

    def __init__(self, store, tensors):
        self.chunks, self.me = TileChunks(store), self
        for index, tensor in enumerate(tensors):
            self.chunks.write((index, index + 1), tensor)


def test_garbage_collected_on_the_disks_thread_is_given_up_later():
    """The store's tensors are to be written by that thread: whoever waits for them there waits for ever."""
    disk, go_on = Dictionary(), threading.Event()

    class Collects(Dictionary):
        def write(self, data):
            go_on.wait()
            gc.collect()
            return disk.write(data)

        def free(self, place):
            disk.free(place)

    size = 8 * ALIGN
    store = HostStore(CPU, spill=Collects(), limit_bytes=4 * size)
    store.reserve(8 * size)  # the disk is foreseen: it is written to ahead
    gc.collect()
    gc.disable()
    try:
        kept = store.put(torch.full((ALIGN,), 1.0, dtype=torch.float64))
        Loop(store, [torch.full((ALIGN,), value, dtype=torch.float64) for value in (2.0, 3.0)])
        go_on.set()
        assert wait([kept.written], timeout=20).done  # or the thread waits for itself
    finally:
        gc.enable()
    assert store.held_bytes == 3 * size
    assert torch.equal(store.get(kept), torch.full((ALIGN,), 1.0, dtype=torch.float64))
    assert store.held_bytes == size
    store.release(kept)
    store._thread.shutdown()
    assert disk.places == {}


def test_garbage_collected_within_an_operation_is_given_up_after_it():
    """The store's lists are not to be changed in the middle of an operation."""
    store = HostStore(CPU)
    Loop(store, [torch.ones(8)])
    with store.turns.turn(store.give_up):
        gc.collect()
        assert store.held_bytes == 32
    assert store.held_bytes == 0
    Loop(store, [torch.ones(8)])
    gc.collect()
    assert store.held_bytes == 0  # nobody was in the middle of anything


def test_a_store_that_nobody_has_is_gone_at_once():
    """The store's memory is page-locked: it must not wait for the collector."""
    gc.disable()
    try:
        for disk in (None, Dictionary()):
            store = HostStore(CPU, spill=disk)
            store.release(store.put(torch.ones(ALIGN)))
            gone = weakref.ref(store)
            del store
            assert gone() is None
    finally:
        gc.enable()


def test_a_full_disk_is_an_error_of_the_step_that_needs_it():
    store = HostStore(CPU, spill=Dictionary(fails_after=1), limit_bytes=ALIGN)
    store.put(torch.zeros(ALIGN, dtype=torch.uint8))
    store.put(torch.ones(ALIGN, dtype=torch.uint8))
    with pytest.raises(OSError, match="disk is full"):
        store.put(torch.ones(ALIGN, dtype=torch.uint8))


@pytest.mark.parametrize("mode", ["offload", "stream"])
def test_a_partition_over_a_disk_has_the_plain_gradients(mode):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    plain = nn.Sequential(*layers, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    module, disk = copy.deepcopy(plain), Dictionary()
    policy = PartitionPolicy(mode=mode, chunk_size=4, host_budget_bytes=3 * 2**20, nvme_path="/")
    handle = partition_layers(module, policy, spill=disk)
    x = torch.randn(64, 3, 16, 16, dtype=torch.float64)
    for _ in range(2):
        for one in (plain, module):
            one.zero_grad()
            one(x).square().sum().backward()
        for (name, expected), parameter in zip(plain.named_parameters(), module.parameters(), strict=True):
            assert torch.allclose(parameter.grad, expected.grad, rtol=1e-10, atol=1e-10), name
    store = handle.forward._store
    assert store.peak_bytes > store.capacity_bytes  # the disk held the rest
    assert store.capacity_bytes <= 3 * 2**20
    assert disk.written
    gc.collect()
    store._thread.shutdown()
    assert disk.places == {}


def test_a_plan_counts_the_disk_after_host_memory(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)).train()
    shape = (64, 3, 16, 16)
    limits = {"gpu_budget_bytes": 2**24, "host_budget_bytes": 2**20, "chunk_size": 8, "mode": "stream"}
    with pytest.raises(ValueError, match="on the host"):
        plan_partition(module, shape, PartitionPolicy(**limits))
    policy = PartitionPolicy(**limits, nvme_path=str(tmp_path), nvme_budget_bytes=2**30)
    plan = plan_partition(module, shape, policy)
    assert plan.nvme_bytes == plan.host_bytes - 2**20 > 0
    assert "on the disk" in str(plan)
    for given in (plan, policy):
        with pytest.raises(ValueError, match="spill=None"):
            partition_layers(module, given)


def test_a_disk_that_cannot_be_used_is_refused_with_the_reason(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nvme_budget_bytes must come with nvme_path"):
        PartitionPolicy(nvme_budget_bytes=1)
    with pytest.raises(ValueError, match=r"nvme_path must be a folder, got .*nowhere"):
        PartitionPolicy(nvme_path=str(tmp_path / "nowhere")).nvme_bytes()
    with pytest.raises(ValueError, match=r"nvme_path must be a folder, got .*nowhere"):
        nvme.NvmeSpill(tmp_path / "nowhere")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(RuntimeError, match=r"libaio is missing\. HINT: install libaio's headers \(libaio-dev\), g\+\+"):
        nvme.NvmeSpill(tmp_path)

    def no_compiler(self, verbose=True):
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    monkeypatch.setattr(AsyncIOBuilder, "load", no_compiler)
    with pytest.raises(RuntimeError, match="did not build: Ninja is required"):
        nvme.NvmeSpill(tmp_path)


def test_on_a_gpu_the_missing_toolkit_is_named_with_the_remedy(tmp_path, monkeypatch):
    """There DeepSpeed's builder links CUDA's libraries: without a toolkit it fails on a path made of None."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    def no_folder(self, verbose=True):
        raise TypeError("expected str, bytes or os.PathLike object, not NoneType")

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    monkeypatch.setattr(AsyncIOBuilder, "load", no_folder)
    monkeypatch.setattr(nvme, "without_gpu", lambda: False)
    remedy = "HINT: install libaio's headers (libaio-dev), g++ and ninja, and the CUDA toolkit"
    cases = {
        None: "links -lcuda and -lcudart of a CUDA toolkit, and there is none (CUDA_HOME)",
        "/usr/local/cuda": "did not build: expected str",
    }
    for home, words in cases.items():
        monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", home)
        with pytest.raises(RuntimeError) as caught:
            nvme.NvmeSpill(tmp_path)
        assert words in str(caught.value)
        assert remedy in str(caught.value)
        assert str(caught.value).endswith("with CUDA_HOME set to its folder; or leave nvme_path out.")


def test_options_reach_the_policy(tmp_path):
    given = ["--partition", "stream", "--nvme_path", str(tmp_path), "--nvme_budget", "2GiB"]
    parser = argparse.ArgumentParser()
    add_train_options(parser)
    settings, _ = settings_from(parser.parse_args(given))
    assert settings.policies.partition.nvme_path == str(tmp_path)
    assert settings.policies.partition.nvme_budget_bytes == 2**31


@pytest.mark.skipif("DS_WSI_TEST_AIO" not in os.environ, reason="compiles DeepSpeed's aio, minutes: DS_WSI_TEST_AIO=1")
def test_deepspeeds_aio_keeps_every_byte_and_no_file(tmp_path):
    spill = nvme.NvmeSpill(tmp_path, budget_bytes=2**22)
    store = HostStore(CPU, spill=spill, limit_bytes=2**20)
    kept = [torch.randint(0, 255, (300_000 + index,), dtype=torch.uint8) for index in range(12)]
    tickets = [store.put(one) for one in kept]
    assert os.listdir(tmp_path) == []  # nothing to clean up after a kill
    for one, ticket in reversed(list(zip(kept, tickets, strict=True))):
        assert torch.equal(store.get(ticket), one)
        store.release(ticket)
    assert spill.written_bytes >= store.spilled_bytes > 0
    for _ in range(3):  # the 17 MiB that do not fit
        tickets = [store.put(one) for one in kept]
        for ticket in tickets:
            store.release(ticket)
    with pytest.raises(OSError, match=r"must fit 4,194,304 bytes.*HINT: raise nvme_budget"):
        [store.put(torch.randint(0, 255, (300_000,), dtype=torch.uint8)) for _ in range(30)]
    store._thread.shutdown()
