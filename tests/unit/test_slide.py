"""A slide's geometry, its tiles, and its overview."""

import math

import numpy as np
import openslide
import pytest
from PIL import Image
from slide_files import ramp, write_slide

from ds_wsi.slides import slide as slide_module
from ds_wsi.slides.pixels import background_of, opaque, resize
from ds_wsi.slides.slide import Slide, SlideError


@pytest.fixture
def two_levels(tmp_path):
    """256 x 192 px at 0.25 um/px, and the same at half the size with another blue."""
    return write_slide(tmp_path / "two.tiff", ramp(256, 192), ramp(128, 96, blue=99), mpp=0.25)


def test_geometry(two_levels):
    with Slide(two_levels) as slide:
        assert slide.slide_id == "two"
        assert (slide.width_px, slide.height_px) == (256, 192)
        assert slide.level_dimensions == ((256, 192), (128, 96))
        assert slide.level_downsamples == (1.0, 2.0)
        assert slide.bounds == (0, 0, 256, 192)
        assert slide.mpp == pytest.approx(0.25, rel=1e-3)
        assert slide.mpp_source == "openslide.mpp-x and -y"
    with Slide(two_levels, mpp=0.3, slide_id="named") as slide:
        assert (slide.slide_id, slide.mpp, slide.mpp_source) == ("named", 0.3, "the override")


def test_tile_is_the_square_at_xy_of_the_level(two_levels):
    with Slide(two_levels) as slide:
        tile = slide.read_tile(100, 40, 0, 32, 32)
        np.testing.assert_array_equal(tile, ramp(256, 192)[40:72, 100:132])
        tile = slide.read_tile(100, 40, 1, 32, 32)
        np.testing.assert_array_equal(tile, ramp(128, 96, blue=99)[20:52, 50:82])
        assert tile.dtype == np.uint8


def test_tile_is_written_to_out(two_levels):
    batch = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    with Slide(two_levels) as slide:
        assert slide.read_tile(64, 32, 0, 32, 32, out=batch[1]).base is batch
        np.testing.assert_array_equal(batch[1], ramp(256, 192)[32:64, 64:96])
        assert not batch[0].any()
        with pytest.raises(ValueError, match=r"out must be uint8 \[32, 32, 3\], got uint8 \[2, 32, 32, 3\]"):
            slide.read_tile(64, 32, 0, 32, 32, out=batch)
        assert slide.read_tile(64, 32, 0, 32, 32).flags.writeable


def test_level_that_is_not_there_is_refused(two_levels):
    # OpenSlide itself would return a transparent square, a white tile to the model.
    with Slide(two_levels) as slide, pytest.raises(ValueError, match=r"level must be in \[0, 2\), got 2"):
        slide.read_tile(0, 0, 2, 32, 32)


def test_resampling_by_a_whole_factor_averages(two_levels):
    with Slide(two_levels) as slide:
        tile = slide.read_tile(64, 32, 0, 64, 32)
    square = ramp(256, 192)[32:96, 64:128].astype(np.float64)
    mean = square.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(tile - mean).max() <= 0.5


@pytest.mark.parametrize(("read_size_px", "tile_size_px"), [(48, 32), (32, 48)])
def test_resampling_covers_the_same_square(two_levels, read_size_px, tile_size_px):
    with Slide(two_levels) as slide:
        tile = slide.read_tile(64, 32, 0, read_size_px, tile_size_px).astype(np.float64)
    assert tile.shape == (tile_size_px, tile_size_px, 3)
    # A ramp stays a ramp: centre of tile pixel j lies at 64 + (j + 1/2) read/tile - 1/2.
    centres = (np.arange(tile_size_px) + 0.5) * read_size_px / tile_size_px - 0.5
    inner = slice(4, -4)
    assert np.abs(tile[:, inner, 0] - (64 + centres[inner])).max() < 1
    assert np.abs(tile[inner, :, 1] - (32 + centres[inner, None])).max() < 1


def test_resampling_is_antialiased(tmp_path):
    stripes = np.zeros((96, 96, 3), dtype=np.uint8)
    stripes[:, ::2] = 254
    with Slide(write_slide(tmp_path / "stripes.tiff", stripes)) as slide:
        tile = slide.read_tile(0, 0, 0, 96, 40)
    assert np.abs(tile[4:-4, 4:-4].astype(int) - 127).max() < 60  # nearest: 0 or 254


def test_transparent_pixels_are_white(two_levels):
    with Slide(two_levels) as slide:
        tile = slide.read_tile(240, 0, 0, 32, 32)
        np.testing.assert_array_equal(tile[:, :16], ramp(256, 192)[:32, 240:])
        assert (tile[:, 16:] == 255).all()
        halved = slide.read_tile(240, 0, 0, 32, 16)
        assert (halved[:, 8:] == 255).all()


def test_transparency_mixes_with_the_background():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 100, 0, 255), (200, 100, 0, 51), (1, 2, 3, 0)])
    flat = opaque(image, background_of({"openslide.background-color": "204060"}))
    # 51 / 255 is a fifth: 0.2 * (200, 100, 0) + 0.8 * (0x20, 0x40, 0x60).
    assert np.abs(flat[0].astype(int) - [[200, 100, 0], [66, 71, 77], [0x20, 0x40, 0x60]]).max() <= 1


def test_bounds_are_the_scanned_area(two_levels):
    properties = {f"openslide.bounds-{name}": str(value) for name, value in zip(("x", "y", "width"), (10, 20, 200))}
    with Slide(two_levels) as slide:
        slide._properties = properties
        assert slide.bounds == (0, 0, 256, 192)
        properties["openslide.bounds-height"] = "150"
        assert slide.bounds == (10, 20, 200, 150)


@pytest.mark.parametrize("factor", [2, 3, 4, 8, 16])
def test_shrinking_is_pillows_box_to_the_bit(factor):
    rng = np.random.default_rng(factor)
    for low in (0, 250):
        tile = rng.integers(low, 256, (48 * factor, 48 * factor, 3), dtype=np.uint8)
        expected = Image.fromarray(tile).resize((48, 48), Image.Resampling.BOX)
        np.testing.assert_array_equal(resize(tile, 48), expected)


@pytest.mark.parametrize("downsample", [8, 7.5, 40, 1])
def test_overview_averages_exact_squares(tmp_path, monkeypatch, downsample):
    monkeypatch.setattr(slide_module, "OVERVIEW_BLOCK_PX", 64)  # several blocks, some cut by the edge
    # A ramp along each axis, without a jump: the mean over a square is the ramp at its centre.
    image = np.zeros((150, 203, 3), dtype=np.uint8)
    image[..., 0], image[..., 1] = np.arange(203)[None, :], np.arange(150)[:, None]
    with Slide(write_slide(tmp_path / "ramp.tiff", image)) as slide:
        overview, factor = slide.read_overview_downsampled(downsample)
    assert factor == downsample
    height, width = math.ceil(150 / downsample), math.ceil(203 / downsample)
    assert overview.shape == (height, width, 3)
    inner = overview[:-1, :-1].astype(float)  # the last may reach over the edge
    columns, rows = (np.arange(width - 1) + 0.5) * downsample - 0.5, (np.arange(height - 1) + 0.5) * downsample - 0.5
    # Rounding of the mean; Pillow weighs pixels that a square cuts only roughly.
    tolerance = 0.51 if downsample == int(downsample) else 1.01
    assert np.abs(inner[..., 0] - columns[None, :]).max() <= tolerance
    assert np.abs(inner[..., 1] - rows[:, None]).max() <= tolerance


def test_overview_reads_the_best_level_at_the_wanted_mpp(two_levels):
    with Slide(two_levels) as slide:
        overview, downsample = slide.read_overview(2.0)
        assert downsample == pytest.approx(8, rel=1e-3)
        assert overview.shape == (24, 32, 3)
        assert (overview[..., 2] == 99).all()  # level 1, four of its pixels a side
        overview, downsample = slide.read_overview_downsampled(1)
        np.testing.assert_array_equal(overview, ramp(256, 192))
        assert slide.read_overview(0.1)[1] == 1  # never finer than the slide


def test_overview_needs_no_mpp_when_asked_by_downsample(tmp_path):
    with Slide(write_slide(tmp_path / "a.tiff", ramp(128, 96))) as slide:
        assert slide.read_overview_downsampled(4)[0].shape == (24, 32, 3)
        with pytest.raises(SlideError, match="mpp"):
            slide.read_overview(8.0)


def test_overview_reads_no_more_than_a_block_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(slide_module, "OVERVIEW_BLOCK_PX", 100)
    areas = []
    read = openslide.OpenSlide.read_region
    monkeypatch.setattr(
        openslide.OpenSlide,
        "read_region",
        lambda self, location, level, size: areas.append(size) or read(self, location, level, size),
    )
    with Slide(write_slide(tmp_path / "a.tiff", ramp(1024, 704))) as slide:
        slide.read_overview_downsampled(16)
    assert len(areas) > 1
    assert max(max(size) for size in areas) <= 100 + 1  # one pixel for a square that starts inside one
