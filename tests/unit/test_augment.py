import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_wsi.bags.augment import augment_bag
from ds_wsi.bags.policy import AugmentPolicy

FLIPS = AugmentPolicy(flips=True, colour=0.0)
COLOUR = AugmentPolicy(flips=False, colour=0.2)


def bag(n=5, side=6):
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)


def symmetries(tiles):
    turned = [tiles.rot90(turns, dims=(-2, -1)) for turns in range(4)]
    return turned + [tiles.flip(-1) for tiles in turned]


@given(seed=st.tuples(st.integers(0, 2**31), st.integers(0, 10_000), st.integers(0, 10**6)))
def test_one_draw_for_all_tiles_of_a_bag(seed):
    tile = bag(1)
    out = augment_bag(tile.expand(4, -1, -1, -1), AugmentPolicy(), seed)
    assert out.dtype == torch.uint8
    assert out.shape == (4, 3, 6, 6)
    assert all(torch.equal(out[0], other) for other in out)
    # a tile's augmentation does not depend on the tiles beside it
    assert torch.equal(augment_bag(bag(5), AugmentPolicy(), seed)[2:3], augment_bag(bag(5)[2:3], AugmentPolicy(), seed))


def test_a_draw_repeats_whatever_was_drawn_before():
    first = augment_bag(bag(), AugmentPolicy(), (3, 1, 4))
    torch.rand(11)
    augment_bag(bag(), AugmentPolicy(), (9, 9, 9))
    state = torch.get_rng_state()
    assert torch.equal(augment_bag(bag(), AugmentPolicy(), (3, 1, 4)), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_run_epoch_and_slide_each_change_the_draw():
    seeds = [(run, epoch, slide) for run in range(3) for epoch in range(3) for slide in range(3)]
    outcomes = {augment_bag(bag(), AugmentPolicy(), seed).numpy().tobytes() for seed in seeds}
    assert len(outcomes) == len(seeds)


def test_all_eight_symmetries_occur_and_only_they():
    expected = symmetries(bag())
    counts = [0] * 8
    for slide in range(400):
        out = augment_bag(bag(), FLIPS, (0, 0, slide))
        (which,) = [index for index, symmetry in enumerate(expected) if torch.equal(out, symmetry)]
        counts[which] += 1
    assert min(counts) > 20


def test_without_flips_and_colour_nothing_changes_and_the_input_is_never_written():
    tiles = bag()
    assert torch.equal(augment_bag(tiles, AugmentPolicy(flips=False, colour=0.0), (1, 2, 3)), bag())
    augment_bag(tiles, AugmentPolicy(), (1, 2, 3))
    assert torch.equal(tiles, bag())


@given(slide=st.integers(0, 10**6), value=st.integers(0, 255), colour=st.floats(0.01, 0.99))
def test_colour_stays_within_its_bounds_and_in_the_range_of_bytes(slide, value, colour):
    out = augment_bag(torch.full((2, 3, 2, 2), value, dtype=torch.uint8), AugmentPolicy(False, colour), (0, 0, slide))
    change = (out.float() - value).abs()
    assert change.max() <= colour * value + 255 * colour / 2 + 0.51
    assert torch.equal(out.amin(dim=(0, 2, 3)), out.amax(dim=(0, 2, 3)))  # one gain and offset a channel


def test_channels_are_changed_independently():
    out = augment_bag(torch.full((1, 3, 2, 2), 128, dtype=torch.uint8), COLOUR, (0, 0, 0))
    assert len(set(out[0, :, 0, 0].tolist())) == 3


@pytest.mark.parametrize("colour", [-0.1, 1.0, float("nan")])
def test_a_jitter_that_could_invert_a_channel_is_refused(colour):
    with pytest.raises(ValueError, match="colour must be in"):
        AugmentPolicy(colour=colour)
