"""Centres of a demo cohort: how each stains and scans."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from ds_wsi.slides.demo_drawing import EOSIN, GLASS

MIN_SATURATION, MIN_LIGHT = 0.15, 0.2  # of what eosin stains, at a centre


@dataclass(frozen=True)
class Centre:
    """How a laboratory stains and a scanner sees.

    Args:
        stain: factors of the optical density of red, green and blue.
        gamma: the exponent of the transmitted light.
        white: factors of red, green and blue, brightness included.
        blur_px: standard deviation at BASE_MPP.
    """

    stain: tuple[float, float, float]
    gamma: float
    white: tuple[float, float, float]
    blur_px: float

    @classmethod
    def draw(cls, seed: int, number: int) -> "Centre":
        """The centre of this number, alike in every cohort of the seed."""
        rng = np.random.default_rng([seed, 77, number])
        while True:
            amount, colour = rng.uniform(-0.3, 0.6), rng.normal(0, 0.25, 3)
            white, bright = rng.uniform(-0.04, 0.04, 3), rng.uniform(-0.12, 0.05)
            blur, gamma = rng.uniform(0, 0.9), rng.uniform(-0.25, 0.25)
            drawn = cls(_triple(np.exp(amount + colour)), math.exp(gamma), _triple((1 + white) * (1 + bright)), blur)
            if drawn.shows_tissue:
                return drawn

    def of_slide(self, rng: np.random.Generator) -> "Centre":
        """The same centre on another day."""
        while True:
            stain = np.array(self.stain) * np.exp(rng.normal(0, 0.15) + rng.normal(0, 0.08, 3))
            gamma = self.gamma * math.exp(rng.normal(0, 0.06))
            white = np.array(self.white) * (1 + rng.normal(0, 0.01, 3)) * (1 + rng.normal(0, 0.03))
            drawn = Centre(_triple(stain), gamma, _triple(white), max(0.0, self.blur_px + rng.normal(0, 0.1)))
            if drawn.shows_tissue:
                return drawn

    @property
    def shows_tissue(self) -> bool:
        """Whether tissue is told from glass and pen: what is paler or greyer is glass, what is darker is pen."""
        pale, inked = self.light(EOSIN), self.light((EOSIN + GLASS) / 2)
        saturation = min(1 - float(shown.min() / shown.max()) for shown in (pale, inked))
        return saturation > MIN_SATURATION and float(pale.min()) > MIN_LIGHT

    def light(self, colours: np.ndarray) -> np.ndarray:
        """Colours [..., 3] in [0, 255] as this centre shows them, in [0, 1] and a little above."""
        density = -np.log((colours.astype(np.float32) + 1) / 256) * np.array(self.stain, dtype=np.float32)
        return np.exp(-density * self.gamma) * np.array(self.white, dtype=np.float32)

    def scan(self, image: np.ndarray) -> np.ndarray:
        """A slide, uint8 [H, W, 3], as this centre shows it."""
        picture = Image.fromarray(np.clip(self.light(image) * 255, 0, 255).astype(np.uint8))
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(self.blur_px)))


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
