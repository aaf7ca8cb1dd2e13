"""The device itself: kernels, memory, page-locked memory, streams, mismatches, random numbers, Adam, autocast."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from simulated_cuda import device
from simulated_cuda.cases import report


def network() -> nn.Sequential:
    """A little of everything."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2))


def trained(on: str, steps: int, **options: Any) -> list[Tensor]:
    """Parameters and buffers after some steps of Adam."""
    net = network().to(on)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, **options)
    for step in range(steps):
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(on)
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    return [value.detach().cpu().double() for value in net.state_dict().values()]


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest, absolute."""
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def message_of(work: Callable[[], object]) -> str:
    """The error that work raises, its kind first."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def drawn_again() -> bool:
    """Whether the device's generator gives other numbers at each call, and the same after its state is put back."""
    torch.manual_seed(3)
    host = torch.get_rng_state()
    state = torch.cuda.get_rng_state()
    one, other = torch.rand(64, device="cuda"), torch.rand(64, device="cuda")
    torch.cuda.set_rng_state(state)
    again = torch.rand(64, device="cuda")
    untouched = torch.equal(torch.get_rng_state(), host)
    return torch.equal(one, again) and not torch.equal(one, other) and untouched


def page_locked() -> list[int]:
    """Bytes counted after torch's allocator took memory, and after some was registered and unregistered."""
    locked = []
    held = torch.empty(1000, dtype=torch.uint8, pin_memory=True)
    locked.append(device.counters()["locked_bytes"])
    memory, runtime = torch.empty(5000, dtype=torch.uint8), torch.cuda.cudart()
    assert held.is_pinned()
    assert not memory.is_pinned()
    assert int(runtime.cudaHostRegister(memory.data_ptr(), 5000, 0)) == 0
    assert memory.is_pinned()
    locked.append(device.counters()["locked_bytes"] - locked[0])
    assert int(runtime.cudaHostUnregister(memory.data_ptr())) == 0
    locked.append(device.counters()["locked_bytes"] - locked[0])
    return locked


def retries() -> int:
    """How often torch freed its cache for a cudaMalloc that failed once."""
    before = torch.cuda.memory_stats()["num_alloc_retries"]
    device.fail_mallocs(1)
    torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    return torch.cuda.memory_stats()["num_alloc_retries"] - before


def out_of_memory() -> str:
    """What torch raises when cudaMalloc fails for good."""
    torch.cuda.empty_cache()
    device.fail_mallocs(3)
    message = message_of(lambda: torch.empty(65 * 2**20, dtype=torch.uint8, device="cuda"))
    device.fail_mallocs(0)
    return message


def inference() -> float:
    """The difference from the CPU in inference mode, where operations come whole that autograd takes apart."""
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return difference([network().cuda().eval()(x.cuda()).cpu()], [network().eval()(x)])


def half_precision() -> dict[str, str]:
    """Dtypes under autocast."""
    net = network().cuda()
    with torch.autocast("cuda", dtype=torch.float16):
        hidden = net[:2](torch.randn(8, 3, 8, 8, device="cuda"))
        mean, _ = torch.batch_norm_update_stats(hidden, None, None, 0.0)
    scaler = torch.amp.GradScaler("cuda")
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    scaler.scale(hidden.float().square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    return {"hidden": str(hidden.dtype), "mean": str(mean.dtype)}


def main() -> None:
    """Measure."""
    expected = trained("cpu", 3)
    one, other = torch.randn(3, device="cuda"), torch.randn(3)
    two = torch.zeros(2, 4, 2, 2, device="cuda")
    report(
        {
            "name": torch.cuda.get_device_name(),
            "plain": difference(trained("cuda", 3, foreach=False), expected),
            "foreach": difference(trained("cuda", 3, foreach=True), expected),
            "fused": difference(trained("cuda", 3, fused=True), expected),
            "mismatch": message_of(lambda: one + other),
            "scalar": message_of(lambda: one + torch.tensor(2.0)),
            "fresh": torch.empty(2**21, device="cuda").isnan().all().item(),
            "drawn_again": drawn_again(),
            "invstd": torch.batch_norm_stats(two, 0.0)[1].tolist(),
            "page_locked": page_locked(),
            "retries": retries(),
            "out_of_memory": out_of_memory(),
            "inference": inference(),
            "half": half_precision(),
            "kernels": device.counters()["kernels"],
        }
    )


if __name__ == "__main__":
    main()
