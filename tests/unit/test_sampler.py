import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_wsi.bags.sampler import choose_tiles, deal_by_cost, plan_epoch, share_tiles
from ds_wsi.bags.step_layout import StepLayout

layouts = st.fixed_dictionaries(
    {"groups": st.integers(1, 6), "bags_per_group": st.integers(1, 4), "micro_steps": st.integers(1, 4)}
)


def slides_of(step):
    return [slide for ranks in step.micro_steps for bags in ranks for slide in bags]


@given(n=st.integers(0, 120), seed=st.integers(0, 2**31), epoch=st.integers(0, 1000), layout=layouts)
def test_every_slide_exactly_once_an_epoch(n, seed, epoch, layout):
    plan = plan_epoch(n, StepLayout(**layout), seed=seed, epoch=epoch)
    assert sorted(slide for step in plan for slide in slides_of(step)) == list(range(n))
    assert len(plan) == StepLayout(**layout).steps_per_epoch(n)
    assert sum(step.n_bags for step in plan) == n
    assert all(step.n_bags == len(slides_of(step)) for step in plan)


@given(n=st.integers(1, 120), seed=st.integers(0, 99), layout=layouts)
def test_ranks_take_the_same_number_of_micro_steps_and_are_within_one_bag(n, seed, layout):
    for step in plan_epoch(n, StepLayout(**layout), seed=seed, epoch=1):
        assert len(step.micro_steps) == layout["micro_steps"]
        for ranks in step.micro_steps:
            assert len(ranks) == layout["groups"]
            assert all(len(bags) <= layout["bags_per_group"] for bags in ranks)
        loads = [sum(len(ranks[rank]) for ranks in step.micro_steps) for rank in range(layout["groups"])]
        assert max(loads) - min(loads) <= 1


@given(n=st.integers(1, 120), layout=layouts)
def test_only_the_last_step_is_short(n, layout):
    per_step = math.prod(layout.values())
    plan = plan_epoch(n, StepLayout(**layout), seed=0, epoch=0)
    assert [step.n_bags for step in plan[:-1]] == [per_step] * (len(plan) - 1)
    assert 1 <= plan[-1].n_bags <= per_step


@given(n=st.integers(1, 120), seed=st.integers(0, 99), epoch=st.integers(0, 9), layout=layouts)
def test_a_steps_slides_depend_on_the_product_alone(n, seed, epoch, layout):
    dealt = plan_epoch(n, StepLayout(**layout), seed=seed, epoch=epoch)
    alone = plan_epoch(n, StepLayout(micro_steps=math.prod(layout.values())), seed=seed, epoch=epoch)
    assert [set(slides_of(step)) for step in dealt] == [set(slides_of(step)) for step in alone]


def test_a_plan_repeats_and_epochs_and_seeds_differ():
    keys = [(seed, epoch) for seed in range(4) for epoch in range(4)]
    plans = {key: plan_epoch(32, StepLayout(), seed=key[0], epoch=key[1]) for key in keys}
    assert plans[2, 3] == plan_epoch(32, StepLayout(), seed=2, epoch=3)
    assert len(set(plans.values())) == len(plans)


def test_a_known_deal():
    (step,) = plan_epoch(5, StepLayout(groups=2, micro_steps=3), seed=0, epoch=0)
    order = [slide for step in plan_epoch(5, StepLayout(), seed=0, epoch=0) for slide in slides_of(step)]
    assert step.micro_steps == (
        ((order[0],), (order[1],)),
        ((order[2],), (order[3],)),
        ((order[4],), ()),
    )


@given(costs=st.lists(st.integers(1, 10_000), max_size=60), world_size=st.integers(1, 8))
def test_deal_by_cost_covers_all_and_is_balanced_within_the_largest(costs, world_size):
    dealt = deal_by_cost(costs, world_size)
    assert len(dealt) == world_size
    assert sorted(item for items in dealt for item in items) == list(range(len(costs)))
    loads = [sum(costs[item] for item in items) for items in dealt]
    assert max(loads) - min(loads) <= max(costs, default=0)


@pytest.mark.parametrize(("world_size", "expected"), [(1, ((0, 1, 2, 3),)), (2, ((0,), (1, 2, 3)))])
def test_deal_by_cost_gives_the_costliest_a_rank_of_its_own(world_size, expected):
    assert deal_by_cost([9, 3, 3, 3], world_size) == expected


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    shares=st.lists(st.floats(0, 5), min_size=1, max_size=6).filter(lambda shares: sum(shares) > 0.1),
)
def test_every_tile_goes_to_one_rank_in_proportion_to_its_share(lengths, shares):
    dealt = share_tiles(lengths, shares)
    assert len(dealt) == len(shares)
    for bag, length in enumerate(lengths):
        rows = [row for stretches in dealt for row in range(*stretches[bag])]
        assert rows == list(range(length))  # each once, in the slide's order over the ranks
    loads = [sum(stop - start for start, stop in stretches) for stretches in dealt]
    for load, share in zip(loads, shares, strict=True):
        assert abs(load - sum(lengths) * share / sum(shares)) <= 1


def test_equal_shares_differ_by_one_tile_over_all_bags_of_a_step_together():
    loads = [sum(stop - start for start, stop in rank) for rank in share_tiles([7, 1, 5], [1.0] * 4)]
    assert sorted(loads) == [3, 3, 3, 4]


def test_the_tiles_of_a_slide_depend_on_seed_epoch_and_slide_alone():
    assert choose_tiles(10, None, (0, 0, 0)) is None
    assert choose_tiles(10, 10, (0, 0, 0)) is None
    rows = choose_tiles(1000, 50, (0, 1, 2))
    assert rows == choose_tiles(1000, 50, (0, 1, 2))
    assert len(set(rows)) == 50
    assert list(rows) == sorted(rows)
    others = [choose_tiles(1000, 50, key) for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3))]
    assert all(len(set(rows) & set(other)) < 20 for other in others)
