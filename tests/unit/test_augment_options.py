"""Rotation, stain, jitter and blur: one draw per slide, chunk by chunk, in bounded memory."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_wsi.bags.augment import augment_bag
from ds_wsi.bags.policy import AugmentPolicy
from ds_wsi.bags.stain import STAINS, shift_stains

NOTHING = {"flips": False, "colour": 0.0}
ALL = AugmentPolicy(
    rotation=40, stain=0.1, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1, blur=2, blur_probability=1
)
EACH = {
    "rotation": 40.0,
    "stain": 0.2,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.2,
    "blur": 2.0,
}


def bag(n=6, side=32):
    generator = torch.Generator().manual_seed(7)
    tiles = torch.randint(0, 256, (n, side, side, 3), generator=generator, dtype=torch.uint8)
    return tiles.permute(0, 3, 1, 2)  # as the reader lays them out


@pytest.mark.parametrize("name", EACH)
def test_each_option_changes_tiles_alike_and_anew_for_each_slide(name):
    policy = AugmentPolicy(**NOTHING, **{name: EACH[name]}, **({"blur_probability": 1.0} if name == "blur" else {}))
    tiles = bag(1).expand(4, -1, -1, -1)
    outputs = [augment_bag(tiles, policy, (0, 0, slide)) for slide in range(3)]
    for out in outputs:
        assert out.dtype == torch.uint8
        assert not torch.equal(out, tiles)
        assert all(torch.equal(out[0], other) for other in out)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    assert torch.equal(tiles, bag(1).expand(4, -1, -1, -1))  # the input is not written


def test_the_result_depends_neither_on_chunks_nor_on_the_tiles_beside_nor_on_their_rank():
    whole = augment_bag(bag(), ALL, (1, 2, 3))
    for tiles_a_chunk in (1, 4, 5):
        assert torch.equal(augment_bag(bag(), ALL, (1, 2, 3), chunk_bytes=4 * 3 * 32 * 32 * tiles_a_chunk), whole)
    shares = [augment_bag(share, ALL, (1, 2, 3)) for share in (bag()[:1], bag()[1:4], bag()[4:])]  # tile-parallel ranks
    assert torch.equal(torch.cat(shares), whole)
    assert augment_bag(bag(), replace(ALL, flips=False), (1, 2, 3)).stride() == bag().stride()  # channels last


class LargestFloat(TorchDispatchMode):
    """Bytes of the largest floating tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_no_floating_copy_holds_the_bag():
    side, tiles_a_chunk, sizes = 32, 4, []
    margin = math.ceil(side * (math.sqrt(2) - 1) / 2) + 1
    for n_tiles in (8, 64):
        with LargestFloat() as largest:
            augment_bag(bag(n_tiles), ALL, (0, 0, 0), chunk_bytes=4 * 3 * side**2 * tiles_a_chunk)
        sizes.append(largest.bytes)
    # The largest are the hues' masks, two for each channel, or the tiles with their reflected margins.
    chunk = 4 * 3 * tiles_a_chunk * side**2
    assert sizes[0] == sizes[1] <= max(6 * chunk, chunk * (1 + 2 * margin / side) ** 2)


def test_an_option_switched_on_leaves_the_draws_of_the_others():
    defaults = augment_bag(bag(), AugmentPolicy(), (0, 0, 5))
    assert torch.equal(augment_bag(bag(), AugmentPolicy(blur=2, blur_probability=0), (0, 0, 5)), defaults)
    grey = torch.full((1, 3, 8, 8), 128, dtype=torch.uint8)
    darker = [
        augment_bag(grey, AugmentPolicy(**NOTHING, brightness=0.5, hue=hue), (0, 0, 5))[0, :, 4, 4] for hue in (0, 0.3)
    ]
    assert torch.equal(*darker)  # a grey tile has no hue


def test_a_rotation_by_a_right_angle_is_one_and_smaller_ones_reflect():
    tiles = bag(2)
    draws = {}
    for slide in range(20):
        policy = AugmentPolicy(**NOTHING, rotation=90)
        draws[slide] = augment_bag(tiles, policy, (0, 0, slide))
    white = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    for slide in range(20):  # nothing is filled with black
        assert torch.equal(augment_bag(white, AugmentPolicy(**NOTHING, rotation=180), (0, 0, slide)), white)
    assert len({out.numpy().tobytes() for out in draws.values()}) == 20
    with pytest.raises(ValueError, match=r"at least 3 px, got 1\. HINT: --augment_rotation 0"):
        augment_bag(tiles[..., :1, :1], AugmentPolicy(**NOTHING, rotation=5), (0, 0, 0))


def test_blurred_slides_are_as_many_as_the_probability_says():
    policy = AugmentPolicy(**NOTHING, blur=20, blur_probability=0.3)
    changed = sum(not torch.equal(augment_bag(bag(1, 8), policy, (0, 0, slide)), bag(1, 8)) for slide in range(300))
    assert 60 < changed < 120


def test_stains_without_a_change_are_the_tiles_and_black_stays_finite():
    levels = torch.arange(0, 256, 15.0)
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, -1, 1)
    same = shift_stains(colours, torch.ones(3), torch.zeros(3))
    assert (same - colours).abs().max() < 1e-3  # far from rounding to another level
    assert shift_stains(colours, torch.full((3,), 1.2), torch.full((3,), 0.2)).isfinite().all()


@pytest.mark.parametrize("stain", range(3))
def test_a_stain_alone_moves_along_its_own_colour(stain):
    """Beer and Lambert: a pure stain's density doubles with its gain, and the others' gains do nothing."""
    colour = torch.nn.functional.normalize(torch.tensor(STAINS, dtype=torch.float64), dim=1)[stain]
    tile = (256 * torch.exp(-0.7 * colour) - 1).view(1, 3, 1, 1)
    gains = torch.full((3,), 5.0, dtype=torch.float64)
    gains[stain] = 2
    out = shift_stains(tile, gains, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(out.flatten(), 256 * torch.exp(-1.4 * colour) - 1, rtol=1e-9, atol=1e-6)
    more = torch.zeros(3, dtype=torch.float64)
    more[stain] = 0.3
    out = shift_stains(tile, torch.ones(3), more)
    torch.testing.assert_close(out.flatten(), 256 * torch.exp(-1.0 * colour) - 1, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rotation", 181),
        ("stain", 1),
        ("brightness", -0.1),
        ("contrast", 1.1),
        ("saturation", float("nan")),
        ("hue", 0.6),
        ("blur", float("inf")),
        ("blur_probability", 2),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, .*got"):
        AugmentPolicy(**{name: value})
