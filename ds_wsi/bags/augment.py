"""Augmentation of a bag on its device: ONE draw of parameters a slide, applied to all its tiles."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ds_wsi.bags.policy import AugmentPolicy
from ds_wsi.bags.stain import shift_stains
from ds_wsi.runtime.seeding import slide_seed

CHUNK_BYTES = 64 * 2**20  # of one float32 copy of the tiles that are changed together


@dataclass(frozen=True)
class _Draw:
    """A slide's parameters: what its tiles share."""

    turns: int
    mirrored: bool
    gain: Tensor | None
    offset: Tensor | None
    angle: float
    stain: Tensor
    brightness: float
    contrast: float
    saturation: float
    hue: float
    sigma: float


def augment_bag(
    tiles: Tensor, policy: AugmentPolicy, seed: tuple[int, int, int], *, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Augment uint8 tiles [N, 3, S, S] with one draw of parameters keyed by (run seed, epoch, slide).

    The draw does not depend on the rank, the device, or what was drawn before: a resumed run repeats it, and ranks that
    share a slide change their tiles alike.

    Args:
        tiles: one slide's, or a rank's share of them; not written.
        policy: what may change, and how much.
        seed: run seed, epoch, slide.
        chunk_bytes: size of the float32 copy of the tiles that are changed at a time; the result does not depend on it.

    Raises:
        ValueError: a rotation of tiles too small to be continued by reflection.
    """
    return augmentation(policy, seed, chunk_bytes=chunk_bytes)(tiles)


def augmentation(
    policy: AugmentPolicy, seed: tuple[int, int, int], *, chunk_bytes: int = CHUNK_BYTES
) -> Callable[[Tensor], Tensor]:
    """`augment_bag` as a function of the tiles: what it makes of a tile does not depend on the others given with it."""
    return partial(_augment, policy=policy, draw=_draw(policy, seed), chunk_bytes=chunk_bytes)


def _augment(tiles: Tensor, policy: AugmentPolicy, draw: "_Draw", chunk_bytes: int) -> Tensor:
    if policy.flips:
        tiles = tiles.rot90(draw.turns, dims=(-2, -1))
        tiles = tiles.flip(-1) if draw.mirrored else tiles
    if not any((policy.colour, policy.rotation, policy.stain, draw.sigma, _jitters(policy))):
        return tiles
    changed = torch.empty_like(tiles)  # with its strides: encoders get the memory format that the reader chose
    n_chunk = max(1, chunk_bytes // max(1, 4 * math.prod(tiles.shape[1:])))
    for source, target in zip(tiles.split(n_chunk), changed.split(n_chunk), strict=True):
        target.copy_(_change(source, policy, draw))
    return changed


def _draw(policy: AugmentPolicy, seed: tuple[int, int, int]) -> _Draw:
    generator = torch.Generator().manual_seed(slide_seed(*seed))
    turns, mirrored, gain, offset = 0, False, None, None
    if policy.flips:
        turns = int(torch.randint(0, 4, (1,), generator=generator).item())
        mirrored = torch.rand(1, generator=generator).item() < 0.5
    if policy.colour > 0:
        ways = torch.rand(2, 3, generator=generator) * 2 - 1
        gain = (1 + policy.colour * ways[0]).view(1, 3, 1, 1)
        offset = (255 * policy.colour / 2 * ways[1]).view(1, 3, 1, 1)
    # All of them, wanted or not: switching one on does not change the others.
    stain = (torch.rand(2, 3, generator=generator, dtype=torch.float64) * 2 - 1) * policy.stain
    angle, brightness, contrast, saturation, hue = (torch.rand(5, generator=generator) * 2 - 1).tolist()
    sigma, chance = torch.rand(2, generator=generator).tolist()
    return _Draw(
        turns,
        mirrored,
        gain,
        offset,
        angle=angle * policy.rotation,
        stain=stain,
        brightness=1 + brightness * policy.brightness,
        contrast=1 + contrast * policy.contrast,
        saturation=1 + saturation * policy.saturation,
        hue=hue * policy.hue,
        sigma=(1 - sigma) * policy.blur if chance < policy.blur_probability else 0.0,  # never 0, which is no Gaussian
    )


def _jitters(policy: AugmentPolicy) -> bool:
    return any((policy.brightness, policy.contrast, policy.saturation, policy.hue))


def _change(tiles: Tensor, policy: AugmentPolicy, draw: _Draw) -> Tensor:
    """A chunk of tiles, uint8 to uint8: rounded once, at the end."""
    grey = tiles.float()
    if policy.rotation:
        grey = _rotate(grey, draw.angle)
    if policy.stain:
        grey = shift_stains(grey, 1 + draw.stain[0], draw.stain[1])
    if _jitters(policy) or draw.sigma:
        grey = _jitter((grey / 255).clamp_(0, 1), policy, draw) * 255
    if draw.gain is not None and draw.offset is not None:
        grey = grey * draw.gain.to(grey.device) + draw.offset.to(grey.device)
    return grey.round_().clamp_(0, 255).to(torch.uint8)


def _jitter(tiles: Tensor, policy: AugmentPolicy, draw: _Draw) -> Tensor:
    """Floating tiles in [0, 1], by torchvision's functions, in one order."""
    # Here, because its import takes seconds that the policy's does not need.
    from torchvision.transforms.v2 import functional as transforms

    if policy.brightness:
        tiles = transforms.adjust_brightness(tiles, draw.brightness)
    if policy.contrast:
        tiles = transforms.adjust_contrast(tiles, draw.contrast)
    if policy.saturation:
        tiles = transforms.adjust_saturation(tiles, draw.saturation)
    if policy.hue:
        tiles = transforms.adjust_hue(tiles, draw.hue)
    if draw.sigma:
        radius = min(math.ceil(3 * draw.sigma), tiles.shape[-1] - 1)  # three deviations; reflection allows no more
        tiles = transforms.gaussian_blur(tiles, [2 * radius + 1] * 2, [draw.sigma] * 2)
    return tiles


def _rotate(tiles: Tensor, angle: float) -> Tensor:
    """Rotate about the centre; what comes from outside a tile is its reflection."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as transforms

    side = tiles.shape[-1]
    margin = math.ceil(side * (math.sqrt(2) - 1) / 2) + 1  # a diagonal reaches as far beyond an edge
    if margin >= side:
        raise ValueError(f"rotated tiles must have sides of at least 3 px, got {side}. HINT: --augment_rotation 0.")
    wide = transforms.pad(tiles, [margin], padding_mode="reflect")
    turned = transforms.rotate(wide, angle, interpolation=InterpolationMode.BILINEAR)
    return transforms.center_crop(turned, [side, side])
