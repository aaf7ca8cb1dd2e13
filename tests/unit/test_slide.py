import math
import os
import pickle

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from ds_wsi.slides import slide as slide_module
from ds_wsi.slides.pixels import background_of, opaque, resize
from ds_wsi.slides.slide import Slide, SlideCache, SlideError, TileReadError


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
        overview, found = slide.read_overview_downsampled(downsample)
    assert found == downsample
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


PER_CM = {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "20000"}


@pytest.mark.parametrize(
    ("properties", "override", "mpp", "source"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, None, 0.25, "openslide.mpp-x and -y"),
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25", **PER_CM}, None, 0.25, "openslide.mpp-x and -y"),
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, 0.4, 0.4, "the override"),
        (PER_CM, None, 0.5, "the TIFF resolution tags"),
        ({"tiff.ResolutionUnit": "inch", "tiff.XResolution": "50800"}, None, 0.5, "the TIFF resolution tags"),
    ],
)
def test_mpp_comes_from_the_best_source(two_levels, properties, override, mpp, source):
    with Slide(two_levels, override) as slide:
        slide._properties = properties
        assert slide.mpp == pytest.approx(mpp)
        assert slide.mpp_source == source


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"tiff.ResolutionUnit": "inch"},
        {"tiff.XResolution": "50800"},
        {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "0"},
        {"openslide.mpp-x": "unknown", "openslide.mpp-y": "unknown"},
    ],
)
def test_mpp_is_not_guessed(two_levels, properties):
    with Slide(two_levels) as slide:
        slide._properties = properties
        with pytest.raises(SlideError, match=r"slide must tell its resolution.*`mpp` column, or with --slide_mpp"):
            slide.mpp  # noqa: B018


def test_resolution_tags_serve_where_openslide_names_no_mpp(tmp_path):
    # OpenSlide takes an Aperio slide's mpp from the description only, as with PANDA's files.
    path = write_slide(tmp_path / "a.svs", ramp(128, 96), mpp=0.48, description="Aperio Image Library v1")
    with Slide(path) as slide:
        assert slide.mpp == pytest.approx(0.48, rel=1e-3)
        assert slide.mpp_source == "the TIFF resolution tags"


def test_slide_without_mpp_is_refused_with_the_option(tmp_path):
    path = write_slide(tmp_path / "a.tiff", ramp(128, 96))
    with (
        Slide(path) as slide,
        pytest.raises(SlideError, match=r"tell its resolution.*slide a,.*HINT.*`mpp`.*--slide_mpp"),
    ):
        slide.mpp  # noqa: B018
    with Slide(path, mpp=0.5) as slide:
        assert slide.mpp == 0.5


@pytest.mark.parametrize("mpp", [0.025, 0.05, 0.1, 2.2, 2.5, 5.0, 10.0])
def test_a_file_that_is_wrong_by_a_factor_of_ten_is_asked_about(tmp_path, mpp):
    path = write_slide(tmp_path / "a.tiff", ramp(128, 96), mpp=mpp)
    meant = mpp * 10 if mpp < 1 else mpp / 10
    words = rf"to be plausible, got {mpp:g} from .*is {meant:g} meant\? \(slide a,.*`mpp`.*--slide_mpp"
    with Slide(path) as slide, pytest.raises(SlideError, match=words):
        slide.mpp  # noqa: B018
    for given in ({"mpp": mpp}, {"fallback_mpp": mpp}):  # who knows better says so
        if mpp >= 0.05:
            with Slide(path, **given) as slide:
                assert slide.mpp == mpp


@pytest.mark.parametrize("mpp", [0.1213, 0.1725, 0.2199, 0.25, 0.2527, 0.4990, 0.5, 0.65, 1.0, 2.0])
def test_what_scanners_have_is_believed(tmp_path, mpp):
    with Slide(write_slide(tmp_path / "a.tiff", ramp(128, 96), mpp=mpp), fallback_mpp=0.3) as slide:
        assert slide.mpp == pytest.approx(mpp, rel=1e-3)
        assert not slide.uses_fallback_mpp


@pytest.mark.parametrize(("y", "good"), [("0.2505", True), ("0.26", True), ("0.27", False), ("0.5", False)])
def test_pixels_must_be_square(two_levels, y, good):
    mean = pytest.approx((0.25 + float(y)) / 2)
    told = {"openslide.mpp-x": "0.25", "openslide.mpp-y": y}
    tags = {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "40000", "tiff.YResolution": str(1e4 / float(y))}
    for properties in (told, tags):
        with Slide(two_levels) as slide, Slide(two_levels, fallback_mpp=0.3) as helped, Slide(two_levels, 0.4) as given:
            for one in (slide, helped, given):
                one._properties = properties
            assert given.mpp == 0.4
            assert helped.mpp == (mean if good else 0.3)
            if good:
                assert slide.mpp == mean
                continue
            with pytest.raises(SlideError, match=rf"square, within 5%, got 0.25 x {y} um from .*--slide_mpp"):
                slide.mpp  # noqa: B018


@pytest.mark.parametrize("mpp", [0.00499, 352.78, -0.5, float("nan")])
def test_implausible_override_is_refused(two_levels, mpp):
    with (
        Slide(two_levels, mpp=mpp) as slide,
        pytest.raises(SlideError, match=rf"mpp must be in .*, got {mpp:g} from the override \(slide two,.*--slide_mpp"),
    ):
        slide.mpp  # noqa: B018


def test_implausible_tags_are_refused_with_value_and_source(tmp_path):
    path = write_slide(tmp_path / "dpi.tiff", ramp(128, 96), mpp=25400 / 72)
    with (
        Slide(path) as slide,
        pytest.raises(SlideError, match=r"got 352\.77\d* from openslide.mpp-x and -y \(slide dpi,.*--slide_mpp"),
    ):
        slide.mpp  # noqa: B018


def test_missing_foreign_and_unopenable_files_each_have_their_message(tmp_path):
    with pytest.raises(SlideError, match=r"slide must be a file, got none \(slide s1, .*none.svs\)"):
        Slide(tmp_path / "none.svs", slide_id="s1")
    (tmp_path / "text.svs").write_text("no slide")
    with pytest.raises(SlideError, match=r"in a format of OpenSlide's, .* \(slide s2, .*text.svs\)"):
        Slide(tmp_path / "text.svs", slide_id="s2")
    path = write_slide(tmp_path / "odd.tiff", ramp(64, 64))
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(52479)  # a code that libtiff does not know
    with pytest.raises(SlideError, match=r"readable by OpenSlide, got .*ompression.* \(slide s3, .*odd.tiff\)"):
        Slide(path, slide_id="s3")


def corrupt_tile(path, index):
    with tifffile.TiffFile(path) as tiff:
        offset, size = tiff.pages[0].dataoffsets[index], tiff.pages[0].databytecounts[index]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * size)


@pytest.fixture
def one_bad_tile(tmp_path):
    """256 x 64 px, deflated; the TIFF tile at x = 128 is broken."""
    path = write_slide(tmp_path / "bad.tiff", ramp(256, 64), compression="zlib")
    corrupt_tile(path, 2)
    return path


def test_failed_tile_is_reported_and_the_slide_read_on(one_bad_tile):
    with Slide(one_bad_tile, slide_id="s") as slide:
        for _ in range(2):
            with pytest.raises(TileReadError, match=r"tile at \(128, 0\) of slide s must be readable, got .") as caught:
                slide.read_tile(128, 0, 0, 64, 64)
            assert (caught.value.slide_id, caught.value.x, caught.value.y) == ("s", 128, 0)
            assert str(caught.value.__cause__) in str(caught.value)
        np.testing.assert_array_equal(slide.read_tile(64, 0, 0, 64, 64), ramp(256, 64)[:, 64:128])


def test_file_that_vanishes_after_an_error_fails_tile_by_tile(one_bad_tile):
    with Slide(one_bad_tile) as slide:
        with pytest.raises(TileReadError):
            slide.read_tile(128, 0, 0, 64, 64)
        one_bad_tile.unlink()
        with pytest.raises(TileReadError, match=r"must be a file"):
            slide.read_tile(0, 0, 0, 64, 64)


def test_overview_of_a_slide_without_a_readable_part_is_an_error(one_bad_tile):
    for index in range(4):
        corrupt_tile(one_bad_tile, index)
    words = r"must be readable for its overview.*slide bad.*HINT.*--skip_bad_slides"
    with Slide(one_bad_tile) as slide, pytest.raises(SlideError, match=words):
        slide.read_overview_downsampled(4)


def broken_in_the_middle(path):
    """1024 x 1024 px, deflated, whose TIFF tile at (512, 512) is broken."""
    write_slide(path, ramp(1024, 1024), compression="zlib", tile_px=256)
    corrupt_tile(path, 10)
    return path


@pytest.mark.parametrize("downsample", [1, 4, 16, 5.3])
def test_a_broken_part_of_an_overview_is_narrowed_down_and_told(tmp_path, monkeypatch, caplog, downsample):
    monkeypatch.setattr(slide_module.logger, "propagate", True)
    path = broken_in_the_middle(tmp_path / "a.tiff")
    whole = write_slide(tmp_path / "b.tiff", ramp(1024, 1024), compression="zlib", tile_px=256)
    with Slide(path) as slide, Slide(whole) as intact:
        found = slide.read_overview_with_gaps(downsample)
        expected, _ = intact.read_overview_downsampled(downsample)
    assert "slide a: " in caplog.text
    assert str(path) in caplog.text
    difference = np.abs(found.pixels.astype(int) - expected)[~found.unreadable]
    assert difference.max() <= (1 if downsample != int(downsample) else 0)  # Pillow's rounding, which is of the block
    assert (found.pixels[found.unreadable] == 255).all()
    rows, columns = found.unreadable.nonzero()
    low, high = np.array([rows.min(), columns.min()]), np.array([rows.max(), columns.max()]) + 1
    assert (low * downsample <= 512 + downsample).all()  # the broken tile is in it
    assert (high * downsample >= 768 - downsample).all()
    assert (low * downsample >= 512 - 64 - 2 * downsample).all()  # and not much more
    assert (high * downsample <= 768 + 64 + 2 * downsample).all()


def test_a_broken_part_is_read_from_a_finer_level(tmp_path):
    image, half = ramp(1024, 1024), ramp(1024, 1024)[::2, ::2]
    path = write_slide(tmp_path / "a.tiff", image, half, compression="zlib", tile_px=256)
    with tifffile.TiffFile(path) as file:
        offset, size = file.pages[1].dataoffsets[3], file.pages[1].databytecounts[3]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * size)
    with Slide(path) as slide:
        found = slide.read_overview_with_gaps(4)
    assert not found.unreadable.any()
    expected = np.asarray(Image.fromarray(image).reduce(4)).astype(float)
    assert np.abs(found.pixels - expected).max() <= 2


def test_the_search_for_broken_parts_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(slide_module, "MAX_FAILED_READS", 3)
    path = broken_in_the_middle(tmp_path / "a.tiff")
    with Slide(path) as slide:
        found = slide.read_overview_with_gaps(16)
    assert 1 / 16 <= found.unreadable.mean() <= 1 / 4


@pytest.fixture
def three_paths(tmp_path):
    return [write_slide(tmp_path / f"{name}.tiff", ramp(64, 64)) for name in "abc"]


def test_cache_closes_the_slide_used_longest_ago(three_paths):
    a, b, c = three_paths
    cache = SlideCache(max_open=2)
    slide_a, slide_b = cache.get(a, 0.5, "A"), cache.get(b)
    assert cache.get(a, 0.5, "A") is slide_a
    assert (slide_a.slide_id, slide_a.mpp) == ("A", 0.5)
    cache.get(c)
    assert len(cache) == 2
    assert slide_b._handle is None
    assert slide_a._handle is not None
    assert cache.get(b) is not slide_b
    cache.close()
    assert len(cache) == 0
    assert slide_a._handle is None


def test_cache_bounds_open_files(three_paths):
    descriptors = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731
    cache = SlideCache(max_open=1)
    cache.get(three_paths[0]).read_tile(0, 0, 0, 64, 64)
    before = descriptors()
    for path in three_paths * 5:
        cache.get(path).read_tile(0, 0, 0, 64, 64)
    assert descriptors() == before
    cache.close()


def test_cache_does_not_mix_up_overrides(three_paths):
    cache = SlideCache()
    assert cache.get(three_paths[0], 0.5).mpp == 0.5
    assert cache.get(three_paths[0], 0.25).mpp == 0.25
    cache.close()


def test_cache_keeps_its_slides_when_a_file_fails_to_open(three_paths, tmp_path):
    cache = SlideCache(max_open=1)
    slide = cache.get(three_paths[0])
    with pytest.raises(SlideError, match="must be a file"):
        cache.get(tmp_path / "none.tiff")
    assert cache.get(three_paths[0]) is slide
    cache.close()


def test_tile_error_survives_the_way_out_of_a_worker():
    error = pickle.loads(pickle.dumps(TileReadError("s", 3, 4, OSError("disk"))))
    assert (error.slide_id, error.x, error.y, str(error.cause)) == ("s", 3, 4, "disk")


def test_cache_drops_one_slide(three_paths):
    cache = SlideCache()
    slide, kept = cache.get(three_paths[0]), cache.get(three_paths[1])
    cache.drop(three_paths[0])
    cache.drop(three_paths[2])
    assert len(cache) == 1
    assert slide._handle is None
    assert kept._handle is not None
    cache.close()


def test_cache_is_empty_after_a_fork(three_paths):
    cache = SlideCache()
    slide = cache.get(three_paths[0])
    cache._pid = -1  # another process's
    assert cache.get(three_paths[0]) is not slide
    slide.close()
    cache.close()


def test_pickled_cache_is_empty(three_paths):
    cache = SlideCache(max_open=3)
    cache.get(three_paths[0])
    copy = pickle.loads(pickle.dumps(cache))
    assert (len(copy), copy.max_open, len(cache)) == (0, 3, 1)
    cache.close()


def test_closed_slide_is_opened_again(two_levels):
    slide = Slide(two_levels)
    slide.close()
    slide.close()
    np.testing.assert_array_equal(slide.read_tile(64, 32, 0, 32, 32), ramp(256, 192)[32:64, 64:96])
    slide.close()


def test_cache_must_hold_a_slide():
    with pytest.raises(ValueError, match="max_open must be at least 1, got 0"):
        SlideCache(0)


def test_broken_files_each_say_what_they_are(shared_data):
    broken = shared_data / "broken"
    with pytest.raises(SlideError, match=r"in a format of OpenSlide's, .* \(slide broken, "):
        Slide(broken / "broken.svs")
    with pytest.raises(SlideError, match=r"got Unsupported TIFF compression: 52479 \(slide unopenable, "):
        Slide(broken / "unopenable.tiff")
    with Slide(broken / "boxes.tiff") as slide, pytest.raises(SlideError, match=r"got 352\.778 .*--slide_mpp"):
        slide.mpp  # noqa: B018
    with Slide(broken / "small.svs") as slide:
        assert (slide.width_px, slide.height_px, slide.mpp) == (16, 16, 0.499)


def test_real_slides_tell_their_mpp_or_are_refused(shared_data):
    with Slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        assert slide.mpp == 0.499
    path = shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs"
    with Slide(path) as slide, pytest.raises(SlideError, match=r"must tell its resolution"):
        slide.mpp  # noqa: B018
    with Slide(path, mpp=0.5) as slide:
        tile = slide.read_tile(2048, 1024, 1, 256, 256)  # JPEG 2000
        assert tile.std() > 5
