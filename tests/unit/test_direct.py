"""The direct reader against OpenSlide, bit for bit."""

import os

import numpy as np
import openslide
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiled_tiff import RGB, YCBCR, Kind, Page, write_tiff

from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.proof import prove
from ds_wsi.slides.direct.reader import DirectTiff
from ds_wsi.slides.direct.shrink import read_tile
from ds_wsi.slides.pixels import opaque

FEW, MANY = 60, int(os.environ.get("DS_WSI_DIRECT_CASES", "500"))
WHITE = np.full(3, 255, dtype=np.float32)
APERIO = b"Aperio Image Library v1\r\n64x64 |AppMag = 20|MPP = 0.5"
# What a tile may say of its colours, which OpenSlide does not believe: JFIF's marker, Adobe's of RGB and of YCbCr.
JFIF = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
ADOBE = [b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0" + bytes([transform]) for transform in (0, 1)]

kinds = st.builds(
    Kind,
    order=st.sampled_from("<>"),
    big=st.booleans(),
    photometric=st.sampled_from([RGB, YCBCR]),
    subsampling=st.sampled_from(["444", "422", "420", "440", "411"]),
    tables_apart=st.booleans(),
    progressive=st.booleans(),
    restart_rows=st.integers(0, 2),
    marker=st.sampled_from([b"", b"", JFIF, *ADOBE, b"\xff\xfe\x00\x06word"]),
    quality=st.integers(5, 95),
    short_counts=st.booleans(),
    description=st.sampled_from([b"", b"written by hand", APERIO]),
    directories_first=st.booleans(),
)


@st.composite
def slides(draw):
    """A kind of file, and the pages of its levels."""
    kind = draw(kinds)
    if kind.progressive:
        kind.tables_apart = False  # each tile has tables of its own
    # Half of the files have levels of whole downsamples, as of two; of scanners' others they are rounded down.
    step = draw(st.sampled_from([1, 12]))
    width, height = (draw(st.integers(1, 180 // step)) * step for _ in "wh")
    sides = st.sampled_from([16, 32, 48, 64])
    pages = []
    for _ in range(draw(st.integers(1, 3))):
        tile = draw(sides), draw(sides)
        n_tiles = -(-width // tile[0]) * -(-height // tile[1])
        absent = draw(st.frozensets(st.integers(0, n_tiles - 1), max_size=3))
        pages.append(Page((width, height), tile, absent))
        by = draw(st.sampled_from([2, 3, 4]))
        width, height = max(1, width // by), max(1, height // by)
    return kind, pages


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


def cases(number):
    """Random slides and what else is drawn; not made smaller where one fails, because that takes minutes."""
    options = {"deadline": None, "phases": [Phase.explicit, Phase.generate], "derandomize": number == FEW}

    def decorate(test):
        return settings(max_examples=number, **options)(given(slide=slides(), data=st.data())(test))

    return decorate


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
