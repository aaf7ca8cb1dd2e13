"""Every mode of the partition against the module as it is, in float64, on both axes; calls of other kinds."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.policy import MODES
from simulated_cuda.cases import report

INPUTS = {"batch": (12, 3, 16, 16), "spatial": (2, 3, 32, 16)}


def tiles(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    """An input."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """Residual, as those of a ResNet."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(y + self.shortcut(x))


def encoder() -> nn.Sequential:
    """Four norms, a residual block."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().train()


def copied(values: Iterable[Tensor | None]) -> list[Tensor]:
    """Values as they are now, flat and on the CPU, by one copy: the sanitizer takes long over each wait of the host."""
    flat = [value.detach().double().flatten() for value in values if value is not None]
    return list(torch.cat(flat).to("cpu", copy=True).split([len(value) for value in flat]))


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and running statistics of one step."""
    out = module(x)
    out.square().sum().backward()
    return copied([out, *(p.grad for p in module.parameters()), *module.buffers()])


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, over the largest number of the same tensor; infinite for what is not a number."""
    worst = [(a - b).abs().max() / b.abs().max().clamp_min(1e-12) for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(worst).nan_to_num(torch.inf).max())


def two_forwards(mode: str) -> float:
    """Two calls before the first backward: the difference from the module as it is, on the CPU."""
    results = []
    for device_name in ("cpu", "cuda"):
        module = encoder().to(device_name)
        if device_name == "cuda":
            partition_layers(module, PartitionPolicy(mode=mode, chunk_size=4))
        outs = [module(tiles(INPUTS["batch"], seed).to(device_name)) for seed in (2, 3)]
        for out in reversed(outs):
            out.square().sum().backward()
        results.append(copied([*outs, *(p.grad for p in module.parameters())]))
    return difference(results[1], results[0])


class Masked(nn.Module):
    """Computes with a tensor that is no parameter, and lies on the host."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1).double()
        self.mask = torch.rand(8, 1, 1, dtype=torch.float64)
        self.table = torch.rand(2**10, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        kept = _OnHost.apply(self.conv(x), self.table)
        return (kept * self.mask.to(x.device)).mean((2, 3))


class _OnHost(torch.autograd.Function):
    """The identity, which saves a tensor of the host beside one of the device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(x, table)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _, table = ctx.saved_tensors
        assert table.device.type == "cpu"
        return grads[0] * table.mean().to(grads[0].device), None


def on_host(mode: str) -> float:
    """An input in host memory that requires gradient, through a module that saves a tensor of the host."""
    results = []
    for device_name in ("cpu", "cuda"):
        module, x = Masked().to(device_name), tiles(INPUTS["batch"]).requires_grad_()
        if device_name == "cuda":
            partition_layers(module, PartitionPolicy(mode=mode, chunk_size=4))
        results.append([*step(module, x), *copied([x.grad])])
    return difference(results[1], results[0])


def main() -> None:
    """Measure."""
    results: dict[str, float] = {}
    on_device = encoder().cuda()
    for axis, shape in INPUTS.items():
        x = tiles(shape)
        expected, x = step(encoder(), x), x.cuda()
        results[f"native, {axis}"] = difference(step(copy.deepcopy(on_device), x), expected)
        for mode in MODES:
            module = copy.deepcopy(on_device)
            partition_layers(module, PartitionPolicy(mode=mode, axis=axis, chunk_size=4))
            results[f"{mode}, {axis}"] = difference(step(module, x), expected)
    for mode in ("lean", "offload", "stream"):
        results[f"{mode}, two forwards"] = two_forwards(mode)
    for mode in ("keep", "offload"):
        results[f"{mode}, on the host"] = on_host(mode)
    report(results)


if __name__ == "__main__":
    main()
