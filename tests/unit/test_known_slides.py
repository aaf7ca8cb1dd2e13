"""What is known of a slide that was opened before, by which OpenSlide need not open it again."""

import os

import numpy as np
import pytest
from tiled_tiff import Kind, Page, write_tiff

from ds_wsi.slides import pixel_source
from ds_wsi.slides.direct import proved
from ds_wsi.slides.readers import open_handle
from ds_wsi.slides.slide import Slide, SlideCache, TileReadError

TWO_LEVELS = [Page((400, 300)), Page((200, 150))]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "slide.tiff"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    for name in ("_known", "_facts"):
        monkeypatch.setattr(proved, name, {})


def test_a_known_slide_is_opened_by_openslide_where_openslide_is_asked_for_pixels(path, tmp_path, monkeypatch):
    write_tiff(path, [Page((401, 300)), Page((200, 150))], Kind())
    opened = []
    monkeypatch.setattr(pixel_source, "open_handle", lambda *of: opened.append(of) or open_handle(*of))
    cache = SlideCache(max_open=1)
    first = cache.get(path, 0.5)
    first.read_tile(0, 0, 0, 64, 64)
    cache.close()
    assert len(opened) == 1
    slide, by_openslide = cache.get(path, 0.5), Slide(path, mpp=0.5, reader="openslide")
    np.testing.assert_array_equal(slide.read_tile(0, 0, 0, 64, 64), by_openslide.read_tile(0, 0, 0, 64, 64))
    assert (slide.bounds, slide.level_downsamples) == (first.bounds, first.level_downsamples)
    assert len(opened) == 2  # by the other reader
    slide.read_tile(64, 64, 1, 64, 64)  # between pixels of a level that is not proved
    assert len(opened) == 3
    cache.close()
    slide = cache.get(path, 0.5)
    slide.read_tile(0, 0, 0, 64, 64)
    write_tiff(tmp_path / "other.tiff", TWO_LEVELS, Kind(quality=30))
    os.replace(tmp_path / "other.tiff", path)
    with pytest.raises(TileReadError, match="must stay as it was when it was opened, got another file"):
        slide.read_tile(65, 64, 1, 64, 64)  # not of the other file
    cache.close()
    assert cache.get(path, 0.5).width_px == 400
    assert len(opened) == 5


def test_what_is_known_of_slides_is_bounded(path, monkeypatch):
    monkeypatch.setattr(proved, "MAX_TOLD", 2)
    for side in (100, 200, 300):
        write_tiff(path, [Page((side, side))], Kind())
        Slide(path, mpp=0.5)
    assert [facts.dimensions for facts in proved._facts.values()] == [(200, 200), (300, 300)]


def test_the_level_of_an_overview_is_openslides(path):
    write_tiff(path, [Page((400, 300)), Page((200, 150)), Page((50, 37))], Kind())
    with Slide(path, mpp=0.5) as slide:
        for downsample in (0.5, 1, 1.99, 2, 2.5, 7.9, *slide.level_downsamples, 100):
            expected = slide._open().handle.get_best_level_for_downsample(downsample)
            assert slide._best_level(downsample) == expected
