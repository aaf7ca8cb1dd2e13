"""Files that are no slides, and slides of which a part cannot be read."""

import numpy as np
import pytest
import tifffile
from PIL import Image
from slide_files import corrupt_tile, ramp, write_slide

from ds_wsi.slides import overview as overview_module
from ds_wsi.slides import slide as slide_module
from ds_wsi.slides.slide import Slide, SlideError, TileReadError


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
        overview = slide.read_overview_with_gaps(downsample)
        expected, _ = intact.read_overview_downsampled(downsample)
    assert "slide a: " in caplog.text
    assert str(path) in caplog.text
    difference = np.abs(overview.pixels.astype(int) - expected)[~overview.unreadable]
    assert difference.max() <= (1 if downsample != int(downsample) else 0)  # Pillow's rounding, which is of the block
    assert (overview.pixels[overview.unreadable] == 255).all()
    rows, columns = overview.unreadable.nonzero()
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
        overview = slide.read_overview_with_gaps(4)
    assert not overview.unreadable.any()
    expected = np.asarray(Image.fromarray(image).reduce(4)).astype(float)
    assert np.abs(overview.pixels - expected).max() <= 2


def test_the_search_for_broken_parts_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(overview_module, "MAX_FAILED_READS", 3)
    path = broken_in_the_middle(tmp_path / "a.tiff")
    with Slide(path) as slide:
        overview = slide.read_overview_with_gaps(16)
    assert 1 / 16 <= overview.unreadable.mean() <= 1 / 4


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
