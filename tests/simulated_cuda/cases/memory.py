"""Memory of the device, and page-locked memory: what is in flight, what a second plan may take, what planning takes."""

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.partition import PartitionPolicy, partition_layers, plan_partition
from ds_wsi.partition.execution.host_store import HostStore
from ds_wsi.runtime.memory import device_peaks, restart_peaks
from ds_wsi.stacking.host_tiles import HostStacks
from simulated_cuda import device
from simulated_cuda.cases import report

CUDA = torch.device("cuda", 0)
SIDE, CHUNK, TILES = 64, 4, 48
MAP_BYTES = CHUNK * 8 * SIDE * SIDE * 4  # of one chunk, the largest tensor


def encoder() -> nn.Sequential:
    """Eight maps of one size."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(4):
        layers += [nn.Conv2d(8 if index else 3, 8, 1), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def start() -> dict[str, int]:
    """Empty the allocator's cache and start its peaks; what is held."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    restart_peaks(CUDA)
    device.reset_counters()
    return held("current")


def held(when: str) -> dict[str, int]:
    """The allocator's bytes, "current" or at their "peak"."""
    stats = torch.cuda.memory_stats()
    return {name: stats[f"{name}_bytes.all.{when}"] for name in ("allocated", "active", "reserved")}


def flight() -> dict[str, Any]:
    """Peaks of a forward and of a backward in mode offload, beyond what was held before; and the plan's."""
    module, x = encoder().cuda(), torch.rand(TILES, 3, SIDE, SIDE, device="cuda")
    policy = PartitionPolicy(mode="offload", chunk_size=CHUNK, gpu_budget_bytes=2**30, host_budget_bytes=2**30)
    plan = plan_partition(module, tuple(x.shape), policy, device=CUDA)
    handle = partition_layers(module, plan)
    module(x[: 2 * CHUNK]).sum().backward()  # gradients are there, host memory is locked
    device.fail_mallocs(1)
    torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    retries = device_peaks(CUDA).retries
    measured: dict[str, Any] = {"plan": plan.peak_bytes, "map": MAP_BYTES, "retries_before": retries}
    before = start()
    y = module(x)
    measured["forward"] = {name: size - before[name] for name, size in held("peak").items()}
    y.sum().backward()
    measured["backward"] = {name: size - before[name] for name, size in held("peak").items()}
    assert handle.forward is not None
    store = handle.forward._store
    assert store is not None
    measured |= {"sent": store.sent_bytes, "fetched": store.fetched_bytes, "host_peak": store.peak_bytes}
    measured["retries"] = device_peaks(CUDA).retries
    return measured | device.counters()


def after_larger() -> dict[str, int]:
    """Active bytes at the peak of a step in mode offload, and its plan's, after one of larger chunks."""
    module, x = encoder().cuda(), torch.rand(TILES, 3, SIDE, SIDE, device="cuda")
    of_any_chunk = PartitionPolicy(mode="offload", gpu_budget_bytes=2**30, host_budget_bytes=2**30)
    policies = [replace(of_any_chunk, chunk_size=size) for size in (TILES, CHUNK)]
    plans = [plan_partition(module, tuple(x.shape), policy, device=CUDA) for policy in policies]
    handle = partition_layers(module, plans[0], check=False)
    assert handle.forward is not None
    for plan in plans:
        handle.forward.plan_or_policy = plan
        before = start()
        module(x).sum().backward()
    active = held("peak")["active"] - before["active"]
    return {"active": active, "plan": plans[1].peak_bytes, "larger_map": TILES // CHUNK * MAP_BYTES}


def budgets() -> list[int]:
    """The budgets of plans for bags of other lengths, made one after the other in one process."""
    module = encoder().cuda()
    handle = partition_layers(module, PartitionPolicy(host_budget_bytes=2**30))
    assert handle.forward is not None
    sizes = []
    for tiles in (TILES, TILES // 3, 2 * TILES):
        module(torch.rand(tiles, 3, SIDE, SIDE, device="cuda")).sum().backward()
        sizes.append(handle.forward.plans[-1].gpu_budget_bytes)
    return sizes


def page_locked() -> list[dict[str, int]]:
    """Bytes locked, and held at the same time, as a store grows: by plan, and by tensor."""
    store = HostStore(CUDA)
    sizes = []
    for size in (65, 130, 260):
        store.reserve(size * 2**20)
        sizes.append({"held": size * 2**20, "locked": device.counters()["locked_bytes"]})
    tickets = [store.put(torch.rand(2**18, device="cuda")) for _ in range(270)]
    sizes.append({"held": store.held_bytes, "locked": device.counters()["locked_bytes"]})
    for ticket in tickets:
        store.release(ticket)
    del store
    return sizes


def stacks() -> list[list[bool]]:
    """Whether stacks of bags, which grow beyond what can be locked, are page-locked, and on the device right."""
    laid, results = HostStacks(CUDA), []
    for count in (64, 512, 600, 1024):  # of 3 KiB: the first fits
        bag = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        stack = laid.lay([bag[:7], bag[7:]])
        on_device = stack.to(CUDA, non_blocking=True)
        laid.used()
        results.append([stack.is_pinned(), torch.equal(on_device.cpu(), bag)])
    return results


def refused() -> dict[str, Any]:
    """Gradients in mode offload where no host memory can be locked: the largest difference from the CPU's."""
    of_stacks = stacks()
    x, gradients = torch.rand(TILES, 3, 16, 16, dtype=torch.float64), []
    for device_name in ("cpu", "cuda"):
        module = encoder().double().to(device_name)
        handle = partition_layers(module, PartitionPolicy(mode="offload", chunk_size=CHUNK))
        module(x.to(device_name)).sum().backward()
        gradients.append([p.grad.cpu() for p in module.parameters() if p.grad is not None])
    assert handle.forward is not None
    assert handle.forward._store is not None
    scale = max(one.abs().max().item() for one in gradients[0])
    worst = max((one - two).abs().max().item() for one, two in zip(*gradients, strict=True))
    return {"difference": worst / scale, "sent": handle.forward._store.sent_bytes, "stacks": of_stacks}


def planning() -> dict[str, Any]:
    """What planning launches and allocates, in either precision; the search tries every mode."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    module = nn.Sequential(*layers, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).cuda()
    plans = {}
    for mode, kind in (("auto", torch.float16), ("offload", torch.bfloat16)):
        policy = PartitionPolicy(mode=mode, chunk_size=8, gpu_budget_bytes=2**20, host_budget_bytes=2**30)
        before = start()
        plan = plan_partition(module, (64, 3, 16, 16), policy, autocast=kind, device=CUDA)
        launched = device.counters()["kernels"]
        allocated = held("peak")["allocated"] - before["allocated"]
        plans[str(kind)] = {"plan": plan.mode, "kernels": launched, "allocated": allocated}
    return plans


class Depthwise(nn.Module):
    """A norm after a depthwise convolution, one of whose channels is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        with torch.no_grad():
            self.norm1.bias[2] = -50.0  # its ReLU is dead

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.depthwise(torch.relu(self.norm1(self.stem(x))))).mean((2, 3))


def uniform() -> dict[str, dict[str, Any]]:
    """Steps with a dead channel, and with one chunk of tiles of one colour: finite, and the CPU's numbers."""
    torch.manual_seed(1)
    patches = nn.Sequential(nn.Conv2d(3, 4, 4, 4, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    x, outcomes = torch.randn(8, 3, 16, 16), {}
    of_one_colour = x.clone()
    of_one_colour[:2] = 0.25
    cases: dict[str, tuple[nn.Module, Tensor]] = {"dead": (Depthwise(), x), "one chunk": (patches, of_one_colour)}
    for name, (module, tiles) in cases.items():
        state = {key: value.clone() for key, value in module.state_dict().items()}
        results = []
        for device_name in ("cpu", "cuda"):
            module.to(device_name).load_state_dict(state)
            module.zero_grad()
            handle = partition_layers(module, PartitionPolicy(mode="lean", chunk_size=2))
            out = module(tiles.to(device_name))
            out.square().sum().backward()
            handle.remove()
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            results.append([value.detach().cpu() for value in (out, *gradients, *module.buffers())])
        cpu, cuda = results
        worst = max((a - b).abs().max().item() for a, b in zip(cpu, cuda, strict=True))
        finite = all(bool(value.isfinite().all()) for value in cuda)
        outcomes[name] = {"finite": finite, "difference": worst if finite else None}
    return outcomes


MEASURES = {
    "flight": flight,
    "after_larger": after_larger,
    "budgets": budgets,
    "page_locked": page_locked,
    "refused": refused,
    "planning": planning,
    "uniform": uniform,
}

if __name__ == "__main__":
    report({name: MEASURES[name]() for name in sys.argv[1:] or MEASURES})
