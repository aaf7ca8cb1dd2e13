"""The benchmark of stacking: its bags, its frameworks, its bounds."""

import pytest
import torch

from launch.benchmarks.stacking import (
    TASKS,
    Trainer,
    _bounds,
    _interval,
    _slowest,
    fit,
)
from launch.benchmarks.stacking_bags import camelyon_lengths, digit_bags, witness_bags

CPU = torch.device("cpu")


def test_lengths_have_the_mean_and_the_tail():
    lengths = camelyon_lengths(4_000, 10_000, seed=0)
    assert abs(sum(lengths) / 4_000 / 10_000 - 1) < 0.05
    assert max(lengths) > 5 * sorted(lengths)[2_000] / 2
    bags = witness_bags(6, 20, 8, CPU, seed=0)
    assert bags.labels.tolist() == [0, 1] * 3
    assert bags.features[1].shape[1] == 8


def test_digit_bags_are_positive_with_a_nine_in_them_and_share_no_digit_with_the_test():
    train, test = digit_bags(40, 0, CPU), digit_bags(40, 0, CPU, test=True)
    lengths = torch.tensor([len(bag) for bag in digit_bags(400, 0, CPU).features]).float()
    assert abs(lengths.mean() - 10) < 0.5
    assert abs(lengths.std() - 2) < 0.4
    heavy = torch.tensor([len(bag) for bag in digit_bags(400, 0, CPU, heavy=True).features]).float()
    assert heavy.max() > 40
    rows = {tuple(row.tolist()) for bag in train.features for row in bag}
    assert not rows & {tuple(row.tolist()) for bag in test.features for row in bag}


@pytest.mark.slow
def test_every_framework_learns_and_dpgs_takes_the_steps_of_a_mean():
    train, held_out = digit_bags(120, 0, CPU), digit_bags(200, 1, CPU, test=True)
    fits = {}
    for framework, batch in (("classic", 1), ("padding", 8), ("sampling", 8), ("dpgs", 8)):
        torch.manual_seed(0)
        trainer = Trainer("abmil", 64, framework, batch, 10, 5e-4, CPU, embed=True, weight_decay=5e-3)
        fits[framework] = fit(trainer, train, held_out, epochs=30, seed=0)
        assert fits[framework].auc > 0.75, framework
    assert abs(fits["padding"].auc - fits["dpgs"].auc) < 0.02  # a mask hides the padding: the same steps, but rounding
    trainer = Trainer("abmil", 64, "dpgs", 8, 10, 5e-4, CPU, embed=True, weight_decay=5e-3)
    reached = fit(trainer, train, held_out, epochs=60, seed=0, target=0.8)
    assert reached.target_s is not None
    assert reached.auc >= 0.8


def test_bounds_name_what_does_not_hold():
    fast = {(50, 512, f, b): 100.0 * (b if f == "dpgs" else 1) for f in ("padding", "dpgs") for b in (1, 32)}
    fast[50, 512, "classic", 1] = 100.0
    fits = [
        fit(Trainer("abmil", 8, "classic", 1, 4, 1e-3, CPU), *[witness_bags(4, 4, 8, CPU, 0)] * 2, epochs=1, seed=0)
    ]
    accuracies = {(what, f): fits for what in TASKS for f in ("classic", "dpgs")}
    targets = {("abmil", "classic", 1): fits[0], ("abmil", "dpgs", 32): fits[0]}
    bounds = _bounds(fast, targets, accuracies, {"lpt": 1.2, "round_robin": 1.5}, CPU)
    broken = [bound.words for bound in bounds if not bound.holds]
    assert broken[-1] == "the slowest of 8 ranks over their mean"
    assert not any("classic" in words and "bags of" in words for words in broken)
    assert _slowest("lpt", steps=3) < 1.05 < _slowest("round_robin", steps=3)
    assert _interval([1.0, 1.0]) == "[1.000, 1.000]"
