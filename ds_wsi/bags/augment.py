"""Augmentation of a bag on its device: ONE draw of parameters a slide, applied to all its tiles."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_wsi.runtime.seeding import slide_seed


@dataclass(frozen=True)
class AugmentPolicy:
    """What may change between two readings of a slide.

    Args:
        flips: flip and rotate by quarter turns (the eight symmetries of a tile).
        colour: largest relative change of each channel's gain, and of its offset, in [0, 1); 0 leaves colours alone.
    """

    flips: bool = True
    colour: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a jitter that could invert a channel."""
        if not 0 <= self.colour < 1:
            raise ValueError(f"colour must be in [0, 1), got {self.colour}")


def augment_bag(tiles: Tensor, policy: AugmentPolicy, seed: tuple[int, int, int]) -> Tensor:
    """Augment uint8 tiles [N, 3, S, S] with one draw of parameters keyed by (run seed, epoch, slide).

    The draw does not depend on the rank, the device, or what was drawn before: a resumed run repeats it.
    """
    generator = torch.Generator().manual_seed(slide_seed(*seed))
    if policy.flips:
        turns, flip = torch.randint(0, 4, (1,), generator=generator).item(), torch.rand(1, generator=generator)
        tiles = tiles.rot90(int(turns), dims=(-2, -1))
        tiles = tiles.flip(-1) if flip.item() < 0.5 else tiles
    if policy.colour > 0:
        draw = torch.rand(2, 3, generator=generator) * 2 - 1
        gain = (1 + policy.colour * draw[0]).view(1, 3, 1, 1).to(tiles.device)
        offset = (255 * policy.colour / 2 * draw[1]).view(1, 3, 1, 1).to(tiles.device)
        tiles = (tiles.float() * gain + offset).round_().clamp_(0, 255).to(torch.uint8)
    return tiles
