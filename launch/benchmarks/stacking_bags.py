"""Bags that stacking is measured on: of lengths as CAMELYON16 has them, of digits, of demo slides."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from ds_wsi.bags.bag import FailureLog, read_bags
from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.models import SlideModel, build_aggregator
from ds_wsi.models.loss import stack_loss
from ds_wsi.slides.demo import make_demo
from ds_wsi.slides.policy import DEMO_TILE_SIZE_PX, TilingPolicy
from ds_wsi.stacking.stacked_bags import stack_bags

DEMO_EPOCHS = 4
SIGMA = 0.6  # of the logarithm of CAMELYON16's bag lengths


@dataclass(frozen=True)
class Bags:
    """Feature bags and their labels.

    Attributes:
        features: [N_i, D] each, on the device.
        labels: int64 [n], on the device.
    """

    features: list[Tensor]
    labels: Tensor


def camelyon_lengths(count: int, mean_tiles: float, seed: int) -> list[int]:
    """Log-normal lengths of this mean."""
    draws = np.random.default_rng(seed).lognormal(np.log(mean_tiles) - SIGMA**2 / 2, SIGMA, count)
    return np.maximum(1, draws).astype(int).tolist()


def witness_bags(count: int, mean_tiles: float, width: int, device: torch.device, seed: int) -> Bags:
    """Bags of normal noise; in positive ones a tenth of the instances, one at least, is shifted along one direction."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(width, generator=torch.Generator().manual_seed(12345))
    direction *= 6 / direction.norm()
    features, labels = [], torch.arange(count) % 2
    for length, label in zip(camelyon_lengths(count, mean_tiles, seed), labels.tolist(), strict=True):
        bag = torch.randn(length, width, generator=generator)
        if label:
            bag[: max(1, length // 10)] += direction
        features.append(bag.to(device))
    return Bags(features, labels.to(device))


def digit_bags(count: int, seed: int, device: torch.device, *, heavy: bool = False, test: bool = False) -> Bags:
    """scikit-learn's digits in bags: positive with a 9 in it. Lengths are N(10, 2), or log-normal of the same mean.

    Half of the digits are for training, the other half for testing.
    """
    data = load_digits()
    half = np.arange(len(data.target)) % 2 == int(test)
    pixels = torch.tensor(data.data[half] / 16, dtype=torch.float32)
    target = data.target[half]
    nines, others = np.flatnonzero(target == 9), np.flatnonzero(target != 9)
    rng = np.random.default_rng(seed)
    features, labels = [], []
    for index in range(count):
        draw = rng.lognormal(np.log(10) - 0.5, 1.0) if heavy else rng.normal(10, 2)
        length = max(1, round(draw))
        rows = rng.choice(others, length)
        if index % 2:
            rows[: max(1, rng.binomial(length, 0.1))] = rng.choice(nines)
        features.append(pixels[rows].to(device))
        labels.append(index % 2)
    return Bags(features, torch.tensor(labels, device=device))


def demo_bags(folder: str, device: torch.device) -> tuple[Bags, Bags]:
    """The demo cohort's features, of a small encoder trained on its training slides: to train on, and to test on."""
    policy = TilingPolicy(tile_size_px=DEMO_TILE_SIZE_PX)
    cohort = load_cohort(make_demo(folder), policy, tiles_dir=Path(folder) / "tiles")
    log = FailureLog(cohort.manifest.slides, cohort.grids, 0.0)
    tiles, labels = {}, {}
    for split in ("train", "test"):
        rows = cohort.rows(split)
        bags = read_bags(cohort.manifest.slides, cohort.grids, rows, ReadPolicy(workers=0), log)
        tiles[split] = [bag.tiles.contiguous().to(device) for bag in bags]
        labels[split] = torch.tensor([int(cohort.manifest.slides[row].label or 0) for row in rows], device=device)
    torch.manual_seed(0)
    encoder = timm.create_model("resnet10t", num_classes=0)
    model = SlideModel(encoder, build_aggregator("gated_abmil", 512, 2)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(DEMO_EPOCHS):
        for index in torch.randperm(len(tiles["train"])).tolist():
            output = model(stack_bags([tiles["train"][index]]))
            optimizer.zero_grad()
            stack_loss(output, labels["train"][index : index + 1]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        features = {split: [model.encode(bag).float() for bag in bags] for split, bags in tiles.items()}
    return Bags(features["train"], labels["train"]), Bags(features["test"], labels["test"])
