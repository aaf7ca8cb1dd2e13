"""A training step on bags of other lengths, the bag's tiles in host memory: the device's memory, and the gradients."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.bags.augment import augmentation
from ds_wsi.bags.policy import AugmentPolicy
from ds_wsi.models.output import SlideOutput
from ds_wsi.models.slide_model import SlideModel
from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.stacking.host_tiles import HostStacks, HostTiles
from ds_wsi.stacking.stacked_bags import StackedBags, bounds_on
from simulated_cuda.cases import report

SIDE, CHUNK, WIDTH = 16, 64, 16


class Mean(nn.Module):
    """The mean of a bag's features, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, bags: StackedBags) -> SlideOutput:
        logits = self.head(torch.stack([bag.mean(0) for bag in bags.split()]))
        return SlideOutput(logits, logits.new_zeros(len(bags.values)))


def model(place: str, dtype: torch.dtype) -> SlideModel:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(3):
        layers += [nn.Conv2d(WIDTH if index else 3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    slide_model = SlideModel(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), Mean())
    return slide_model.to(device=place, dtype=dtype).train()


def stack(bags: list[Tensor], stacks: HostStacks) -> StackedBags:
    """Bags with an augmentation each, as the main job lays them."""
    lengths = [len(bag) for bag in bags]
    changes = [augmentation(AugmentPolicy(), (0, 0, slide)) for slide in range(len(bags))]
    values: Any = HostTiles(stacks.lay(bags), lengths, changes)
    return StackedBags(values, bounds_on(stacks.device, lengths))


def tiles(count: int) -> Tensor:
    """Tiles as the reader gives them, channels last in memory."""
    generator = torch.Generator().manual_seed(count)
    read = torch.randint(0, 256, (count, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    return read.permute(0, 3, 1, 2)


def growth() -> dict[str, dict[str, int]]:
    """Active bytes, and allocated ones, at the peak of a step, by the number of tiles."""
    slide_model, device = model("cuda", torch.float32), torch.device("cuda", 0)
    partition_layers(slide_model.encoder, PartitionPolicy(mode="recompute", chunk_size=CHUNK))
    stacks, peaks = HostStacks(device), {}
    for count in (128, 512, 4096):  # the first one makes the gradients
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        slide_model(stack([tiles(count)], stacks)).logits.sum().backward()
        stacks.used()
        stats = torch.cuda.memory_stats()
        peaks[str(count)] = {name: stats[f"{name}_bytes.all.peak"] for name in ("active", "allocated")}
    return peaks


def gradients() -> float:
    """The largest relative difference from the CPU's, over three steps on stacks of bags: two buffers take turns."""
    results = []
    for device in ("cpu", "cuda"):
        slide_model = model(device, torch.float64)
        partition_layers(slide_model.encoder, PartitionPolicy(mode="offload", chunk_size=7, bn_population="bag"))
        stacks = HostStacks(torch.device(device))
        for step in range(3):
            bags = [tiles(10 + step), tiles(23), tiles(3)]
            slide_model(stack(bags, stacks)).logits.square().sum().backward()
            stacks.used()
        results.append([parameter.grad.cpu() for parameter in slide_model.parameters() if parameter.grad is not None])
    cpu, cuda = results
    return max(((a - b).abs().max() / a.abs().max().clamp(min=1e-9)).item() for a, b in zip(cpu, cuda, strict=True))


MEASURES = {"growth": growth, "gradients": gradients}

if __name__ == "__main__":
    report({name: MEASURES[name]() for name in sys.argv[1:] or MEASURES})
