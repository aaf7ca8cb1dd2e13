"""Pyramidal tiled JPEG TIFFs, as OpenSlide opens them."""

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from ds_wsi.runtime.files import atomic_path

TIFF_TILE_PX = 256


def write_pyramid(path: Path, image: np.ndarray, mpp: float, min_side_px: int = 192) -> None:
    """Write uint8 [H, W, 3] as a tiled JPEG TIFF, halved level by level while its shorter side is >= min_side_px."""
    pixels_per_cm = 1e4 / mpp
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary) as tiff:
        level, downsample = Image.fromarray(image), 1
        while True:
            tiff.write(
                np.asarray(level),
                tile=(TIFF_TILE_PX, TIFF_TILE_PX),
                photometric="rgb",  # of the input; stored as YCbCr
                subsampling=(1, 1),
                compression="jpeg",
                compressionargs={"level": 88},
                subfiletype=0 if downsample == 1 else 1,
                resolution=(pixels_per_cm / downsample, pixels_per_cm / downsample),
                resolutionunit="CENTIMETER",
                metadata=None,
                software=False,
            )
            if min(level.size) // 2 < min_side_px:
                return
            level = level.reduce(2)
            downsample *= 2
