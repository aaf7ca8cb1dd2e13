"""The cache of open slides."""

import os
import pickle

import numpy as np
import pytest
from slide_files import ramp, write_slide

from ds_wsi.slides.slide import Slide, SlideCache, SlideError, TileReadError


@pytest.fixture
def two_levels(tmp_path):
    """256 x 192 px at 0.25 um/px, and the same at half the size with another blue."""
    return write_slide(tmp_path / "two.tiff", ramp(256, 192), ramp(128, 96, blue=99), mpp=0.25)


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
