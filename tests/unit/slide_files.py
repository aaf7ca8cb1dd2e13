"""Small slides as files, whole and broken."""

import numpy as np
import tifffile


def write_slide(path, *levels, mpp=None, compression=None, description=None, tile_px=64):
    """Write a tiled TIFF, one page a level; without compression OpenSlide returns exactly these pixels."""
    with tifffile.TiffWriter(path) as tiff:
        for index, level in enumerate(levels):
            tags = {}
            if mpp is not None:
                density = 1e4 / mpp * level.shape[1] / levels[0].shape[1]
                tags = {"resolution": (density, density), "resolutionunit": "CENTIMETER"}
            tiff.write(
                level,
                tile=(tile_px, tile_px),
                photometric="rgb",
                compression=compression,
                subfiletype=int(index > 0),
                description=description if index == 0 else None,
                metadata=None,
                software=False,
                **tags,
            )
    return path


def ramp(width, height, blue=7):
    """Red tells x, green tells y."""
    image = np.full((height, width, 3), blue, dtype=np.uint8)
    image[..., 0] = np.arange(width)[None, :] % 256
    image[..., 1] = np.arange(height)[:, None] % 256
    return image


def corrupt_tile(path, index):
    with tifffile.TiffFile(path) as tiff:
        offset, size = tiff.pages[0].dataoffsets[index], tiff.pages[0].databytecounts[index]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * size)
