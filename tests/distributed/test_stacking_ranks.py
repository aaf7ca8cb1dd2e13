"""Every aggregator's step over ranks and virtual workers is the mean of its bags' own gradients, in float64."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ds_wsi.bags.sampler import plan_epoch
from ds_wsi.bags.step_layout import StepLayout
from ds_wsi.models import build_aggregator
from ds_wsi.models.aggregators import AGGREGATORS
from ds_wsi.models.loss import stack_loss
from ds_wsi.runtime.seeding import step_seed
from ds_wsi.stacking import stack_bags
from ds_wsi.stacking.packs import pack_bags
from ds_wsi.stacking.policy import StackingPolicy
from ds_wsi.stacking.randomness import bag_randomness, key_dropouts
from ds_wsi.training.step import bag_weight
from harness import run_ranks

pytestmark = pytest.mark.distributed
WIDTH = 6
SMALL = {"transmil": {"embed_dim": 16, "heads": 2, "landmarks": 8}, "rrtmil": {"embed_dim": 16, "heads": 2}}
SMALL |= {name: {"embed_dim": 16} for name in ("clam_sb", "clam_mb", "dtfd", "abmilx")}
# (virtual workers, seed of the lengths): each of the seeds deals seven bags in another way.
LAYOUTS = ((1, 0), (2, 1), (3, 2))


def lengths_of(seed):
    """Seven lengths from 1 to 1,000, one of each."""
    return [1, 1000, *np.random.default_rng(seed).integers(1, 60, 5).tolist()]


def make(name, dtype):
    torch.manual_seed(0)
    module = build_aggregator(name, WIDTH, 2, dropout=0.3, **SMALL.get(name, {})).to(dtype).train()
    key_dropouts(module)
    pack_bags(module, 0)
    return module


def make_bags(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, WIDTH, dtype=torch.float64, generator=generator).to(dtype) for n in lengths_of(seed)]


def loss_of(module, bags, chosen):
    labels = torch.tensor([bag % 2 for bag in chosen])
    stack = stack_bags([bags[bag] for bag in chosen])
    with bag_randomness([step_seed(0, 0, bag) for bag in chosen]):
        out = module(stack, labels) if getattr(module, "needs_labels", False) else module(stack)
    return stack_loss(out, labels)


def gradient(module):
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters()])


def on_ranks(names, dtype):
    """Per aggregator and layout the sum over ranks of the weighted gradients, over W: what an engine's mean is."""
    rank, world, means = dist.get_rank(), dist.get_world_size(), []
    policy = StackingPolicy(bags_per_step=7)
    for name in names:
        for workers, seed in LAYOUTS:
            module, bags = make(name, dtype), make_bags(seed, dtype)
            layout = StepLayout(world, 1, workers, policy)
            (step,) = plan_epoch(7, layout, seed=seed, epoch=0, lengths=lengths_of(seed))
            weight = bag_weight(step.n_bags, world, workers)
            for ranks in step.micro_steps:
                if ranks[rank]:
                    (loss_of(module, bags, ranks[rank]) * weight / workers).backward()
            total = gradient(module)
            dist.all_reduce(total)
            means.append(total / world)
    return means


def per_bag(name, seed, dtype, *, wrong=False):
    """The mean of the bags' own gradients; `wrong`: the mean of the means of two halves, of one bag and of six."""
    module, bags = make(name, dtype), make_bags(seed, dtype)
    for bag in range(7):
        loss = loss_of(module, bags, [bag])
        (loss / (2 if bag == 0 else 12) if wrong else loss / 7).backward()
    return gradient(module)


# Float32: its rounding alone; of ABMILX 1.3e-6 with torch 2.14, below 1e-6 with 2.15.
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6}


def in_both(names):
    return [on_ranks(names, dtype) for dtype in LIMITS]


@pytest.mark.parametrize("world", [2, 4])
def test_the_step_is_the_mean_of_the_bags(world):
    names = list(AGGREGATORS)
    by_rank = run_ranks(in_both, world, names)
    for index, name in enumerate(names):
        for layout, (_, seed) in enumerate(LAYOUTS):
            # Against float64: float32 against float32 would count its own rounding twice.
            expected = per_bag(name, seed, torch.float64)
            for rank in (0, world - 1):
                for results, limit in zip(by_rank[rank], LIMITS.values(), strict=True):
                    gradient = results[index * len(LAYOUTS) + layout].double()
                    difference = ((gradient - expected).norm() / expected.norm()).item()
                    assert difference < limit, (name, seed, difference)


def test_a_mean_of_means_would_be_noticed():
    right, wrong = per_bag("abmil", 0, torch.float64), per_bag("abmil", 0, torch.float64, wrong=True)
    assert (right - wrong).norm() > 0.05 * right.norm()
