"""How bags are shared out among workers."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_wsi.bags.sampler import plan_epoch
from ds_wsi.bags.step_layout import StepLayout
from ds_wsi.stacking.balance import OverCapError, assign_bags, fit_cost
from ds_wsi.stacking.packs import plan_packs
from ds_wsi.stacking.policy import StackingPolicy


def camelyon_lengths(count, seed):
    """Log-normal, mean about 10,000 tiles, as CAMELYON16's at 10x."""
    return np.random.default_rng(seed).lognormal(np.log(10_000) - 0.18, 0.6, count).astype(int).tolist()


def slowest_over_mean(lengths, workers, balance):
    loads = [sum(lengths[i] for i in bags) for bags in assign_bags(lengths, workers, balance=balance)]
    return max(loads) / np.mean(loads)


def test_the_slowest_of_eight_ranks_is_within_five_percent_of_the_mean():
    """64 bags per step; round-robin is what it is compared with."""
    steps = [camelyon_lengths(64, seed) for seed in range(50)]
    lpt = [slowest_over_mean(lengths, 8, "lpt") for lengths in steps]
    turns = [slowest_over_mean(lengths, 8, "round_robin") for lengths in steps]
    assert max(lpt) < 1.05
    assert np.mean(turns) > 1.2


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=40), st.integers(1, 9), st.sampled_from(["lpt", "round_robin"])
)
def test_every_bag_goes_to_one_worker(lengths, workers, balance):
    dealt = assign_bags(lengths, workers, balance=balance)
    assert len(dealt) == workers
    assert sorted(index for bags in dealt for index in bags) == list(range(len(lengths)))
    if balance == "lpt":
        slowest = max(([lengths[i] for i in bags] for bags in dealt), key=sum)
        # Its last bag, the shortest, went to it because all others had at least as much then.
        assert (sum(slowest) - min(slowest)) * workers <= sum(lengths) - min(slowest)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_the_slowest_worker_is_within_a_third_of_the_best_assignment(lengths, workers):
    """Graham, 1969; the best of all assignments, because its lower bound is exceeded: 2, 3, 3, 3 on three workers."""
    best = min(
        max(sum(length for length, worker in zip(lengths, dealt, strict=True) if worker == w) for w in range(workers))
        for dealt in product(range(workers), repeat=len(lengths))
    )
    slowest = max(sum(lengths[i] for i in bags) for bags in assign_bags(lengths, workers, balance="lpt"))
    assert 3 * workers * slowest <= (4 * workers - 1) * best


def test_a_bag_over_the_cap_is_named_and_so_are_bags_that_do_not_fit_together():
    with pytest.raises(OverCapError, match="at most 10 tiles, got 11") as caught:
        assign_bags([3, 11, 2], 2, max_tiles=10)
    assert caught.value.bag == 1
    with pytest.raises(OverCapError, match="3 bags of 24 tiles must fit 2 workers of 10 tiles"):
        assign_bags([8, 8, 8], 2, max_tiles=10)
    loads = [sum([5, 5, 5, 5][i] for i in bags) for bags in assign_bags([5, 5, 5, 5], 2, max_tiles=10)]
    assert loads == [10, 10]


def test_the_square_in_the_cost_changes_who_is_slow():
    lengths = [100, 70, 70, 60]
    assert assign_bags(lengths, 2, cost=StackingPolicy().cost) == ((0, 3), (1, 2))
    square = StackingPolicy(cost_per_tile=0.0, cost_per_tile_squared=1.0)
    assert assign_bags(lengths, 2, cost=square.cost) == ((0,), (1, 2, 3))


def test_a_fitted_cost_is_the_one_that_made_the_times():
    lengths = [10, 100, 1000, 5000]
    a, b = fit_cost(lengths, [2e-4 * n + 3e-7 * n * n for n in lengths])
    assert (a, b) == (pytest.approx(2e-4), pytest.approx(3e-7))
    a, b = fit_cost(lengths, [1e-3 * n for n in lengths])
    assert (a, b) == (pytest.approx(1e-3), pytest.approx(0, abs=1e-9))
    assert min(fit_cost([10, 100], [1.0, 1.1])) == 0  # neither is ever negative
    with pytest.raises(ValueError, match="at least two lengths"):
        fit_cost([5, 5], [1.0, 1.0])


def test_a_step_has_the_same_bags_however_many_workers_compute_it():
    lengths = camelyon_lengths(40, 0)
    policy = StackingPolicy(bags_per_step=16)
    plans = [
        plan_epoch(40, StepLayout(ranks, 1, workers, policy), seed=3, epoch=1, lengths=lengths)
        for ranks, workers in ((1, 1), (2, 3), (8, 1))
    ]
    steps = [
        [sorted(b for ranks in step.micro_steps for bags in ranks for b in bags) for step in plan] for plan in plans
    ]
    assert steps[0] == steps[1] == steps[2]
    assert [step.n_bags for step in plans[1]] == [16, 16, 8]
    assert all(len(step.micro_steps) == 3 and len(step.micro_steps[0]) == 2 for step in plans[1])


def test_packs_are_whole_bags_within_the_limit():
    assert plan_packs([3, 4, 9, 1, 1, 20, 2], 8) == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7)]
    assert plan_packs([5], 1) == [(0, 1)]


def test_a_policy_refuses_what_it_cannot_do():
    for values, words in (
        ({"framework": "crop"}, "framework must be one of dpgs, classic, padding, sampling, got 'crop'"),
        ({"balance": "best"}, "balance must be one of lpt, round_robin"),
        ({"bags_per_step": 0}, "bags_per_step must be at least 1, got 0"),
        ({"framework": "classic", "bags_per_step": 4}, 'bags_per_step must be 1 in framework "classic", got 4'),
        ({"pack_bytes": -1}, "pack_bytes must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=words):
            StackingPolicy(**values)
    assert StackingPolicy(framework="classic").bags_per_step == 1
