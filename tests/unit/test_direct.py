"""The direct reader against OpenSlide, bit for bit."""

import numpy as np
import openslide
import pytest
from hypothesis import strategies as st
from PIL import Image
from random_tiffs import APERIO, FEW, MANY, cases
from tiled_tiff import write_tiff

from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.proof import prove
from ds_wsi.slides.direct.reader import DirectTiff
from ds_wsi.slides.direct.shrink import read_tile
from ds_wsi.slides.pixels import opaque

WHITE = np.full(3, 255, dtype=np.float32)


def openslide_region(handle, x0, y0, level, width, height):
    return opaque(handle.read_region((x0, y0), level, (width, height)), WHITE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiffs")


def outcome(read):
    try:
        return read()
    except (openslide.OpenSlideError, OSError) as error:
        return error


def read_alike(folder, slide, data):
    kind, pages = slide
    path = folder / "random.tiff"
    write_tiff(path, pages, kind)
    with openslide.OpenSlide(path) as handle, DirectTiff(path) as direct:
        reason = prove(direct, handle)
        if reason is not None:
            # Of a level whose tiles OpenSlide draws from the one below there can be nothing to compare.
            assert "got none of those that were tried" in reason
            assert kind.description == APERIO
            return
        assert direct.level_dimensions == handle.level_dimensions
        assert direct.level_downsamples == handle.level_downsamples
        for _ in range(6):
            level = data.draw(st.integers(0, len(pages) - 1))
            # On a pixel of the level, where it has whole ones; or before it begins, where they are rounded.
            x0, y0 = (int(data.draw(st.integers(-20, 90)) * direct.level_downsamples[level]) for _ in "xy")
            x0, y0 = (at - data.draw(st.integers(0, 2)) if at < 0 else at for at in (x0, y0))
            size = [data.draw(st.integers(1, 150)) for _ in "wh"]
            pixels = outcome(lambda: direct.read_region(x0, y0, level, *size))  # noqa: B023
            if isinstance(pixels, NotDirectError):
                assert level > 0, pixels
                assert "must begin on a pixel" in str(pixels) or "got none of its own" in str(pixels)
            else:
                np.testing.assert_array_equal(pixels, openslide_region(handle, x0, y0, level, *size))
                factor, side = data.draw(st.sampled_from([2, 3, 4, 8])), data.draw(st.integers(1, 20))
                tile = outcome(lambda: read_tile(direct, x0, y0, level, factor * side, side))  # noqa: B023
                if not isinstance(tile, NotDirectError):
                    full = Image.fromarray(openslide_region(handle, x0, y0, level, factor * side, factor * side))
                    np.testing.assert_array_equal(tile, full.resize((side, side), Image.Resampling.BOX))


def damaged_is_refused_or_read_alike(folder, slide, data):
    kind, pages = slide
    path = folder / "damaged.tiff"
    tiles = [(at, at + size) for at, size in write_tiff(path, pages, kind)[0] if size]
    content = bytearray(path.read_bytes())
    damage = data.draw(st.sampled_from(["torn", "anywhere", "tiles", "tiles"]))
    if damage == "torn":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(1, 4)) if damage != "torn" else 0):
        start, end = data.draw(st.sampled_from(tiles)) if damage == "tiles" and tiles else (0, len(content))
        content[data.draw(st.integers(start, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    direct, handle = outcome(lambda: DirectTiff(path)), outcome(lambda: openslide.OpenSlide(path))
    if isinstance(direct, NotDirectError) or isinstance(handle, openslide.OpenSlideError):
        return
    with direct, handle:
        if prove(direct, handle) is not None:
            return
        for _ in range(4):
            # Beginning in the level: beyond it OpenSlide decodes tiles of which it shows nothing.
            x0, y0 = (data.draw(st.integers(-10, side - 1)) for side in direct.dimensions)
            region = (x0, y0, 0, 60, 60)
            pixels = outcome(lambda: direct.read_region(*region))  # noqa: B023
            with openslide.OpenSlide(path) as anew:  # an error is the end of a handle
                expected = outcome(lambda: openslide_region(anew, *region))  # noqa: B023
            if isinstance(pixels, np.ndarray):
                assert isinstance(expected, np.ndarray), expected
                np.testing.assert_array_equal(pixels, expected)


@cases(FEW)
def test_random_tiffs_are_read_as_openslide_reads_them(folder, slide, data):
    read_alike(folder, slide, data)


@cases(FEW)
def test_a_damaged_file_is_refused_or_read_as_openslide_reads_it(folder, slide, data):
    damaged_is_refused_or_read_alike(folder, slide, data)


@pytest.mark.slow
@cases(MANY)
def test_many_random_tiffs(folder, slide, data):
    read_alike(folder, slide, data)


@pytest.mark.slow
@cases(MANY)
def test_many_damaged_files(folder, slide, data):
    damaged_is_refused_or_read_alike(folder, slide, data)
