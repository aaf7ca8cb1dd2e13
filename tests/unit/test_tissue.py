import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ds_wsi.slides.slide import Slide
from ds_wsi.slides.tiling import plan_coords
from ds_wsi.slides.tissue import (
    grey_mask,
    otsu_threshold,
    saturation_mask,
    tile_fractions,
    tissue_mask,
)

WHITE, BLACK, GREY, PINK = (245, 245, 245), (0, 0, 0), (128, 128, 128), (200, 100, 160)


def pixels(*colours):
    return np.array([colours], dtype=np.uint8)


def test_otsu_separates_two_classes():
    values = np.array([10] * 60 + [12] * 40 + [200] * 30, dtype=np.uint8)
    threshold = otsu_threshold(values.reshape(10, 13))
    assert 12 <= threshold < 200
    assert (values > threshold).sum() == 30


@given(st.lists(st.integers(0, 255), min_size=2, max_size=60).filter(lambda values: len(set(values)) > 1))
@settings(max_examples=60, deadline=None)
def test_otsu_is_the_best_of_all_thresholds(values):
    values = np.array(values, dtype=np.uint8)

    def variance(threshold):
        low, high = values[values <= threshold], values[values > threshold]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else -1.0

    best = max(variance(threshold) for threshold in range(256))
    assert variance(otsu_threshold(values)) == pytest.approx(best)


def test_otsu_of_one_value_leaves_nothing_above():
    values = np.full((4, 4), 9, dtype=np.uint8)
    assert not (values > otsu_threshold(values)).any()


def test_grey_keeps_neither_glass_nor_black():
    assert grey_mask(pixels(WHITE, BLACK, GREY, PINK)).tolist() == [[False, False, True, True]]
    ends = pixels((2, 2, 2), (3, 3, 3), (230, 230, 230), (231, 231, 231))
    assert grey_mask(ends).tolist() == [[False, True, True, False]]
    assert grey_mask(ends, (0, 2)).tolist() == [[True, False, False, False]]


def test_saturation_keeps_colour():
    image = pixels(WHITE, GREY, PINK, PINK)
    assert saturation_mask(image).tolist() == [[False, False, True, True]]
    assert saturation_mask(image, 127).tolist() == [[False, False, False, False]]  # 255 (200 - 100) / 200, rounded down
    assert saturation_mask(image, 126).tolist() == [[False, False, True, True]]


def test_tissue_is_both_unless_the_policy_says_otherwise():
    vivid_light = (255, 255, 120)  # coloured, but lighter than tissue is
    image = pixels(WHITE, GREY, PINK, vivid_light)
    assert tissue_mask(image, "otsu", 8.0).tolist() == [[False, False, True, False]]
    assert tissue_mask(image, "grey", 8.0).tolist() == [[False, True, True, False]]
    assert tissue_mask(image, "none", 8.0).tolist() == [[True] * 4]
    assert tissue_mask(image, "otsu", 8.0, (0, 255)).tolist() == [[False, False, True, True]]


def test_fractions_of_whole_and_cut_pixels():
    mask = np.zeros((4, 6), dtype=bool)
    mask[1:3, 2:5] = True
    corners = np.array([(2, 1), (0, 0), (1.5, 0.5), (4.5, 2.25), (4.75, 3), (0, 0)], dtype=np.float64)
    expected = [1, 0, 1.5 * 1.5 / 4, 0.5 * 0.75 / 4, 0, 0]
    np.testing.assert_allclose(tile_fractions(mask, corners, 2.0), expected, rtol=0, atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.lists(st.tuples(*[st.integers(0, 50)] * 2), min_size=1))
@settings(max_examples=60, deadline=None)
def test_fractions_equal_counting_on_a_finer_mask(seed, side, corners):
    mask = np.random.default_rng(seed).random((9, 11)) < 0.5
    fine = np.zeros((90, 90), dtype=bool)
    fine[:36, :44] = mask.repeat(4, axis=0).repeat(4, axis=1)
    counted = [fine[y : y + side, x : x + side].mean() for x, y in corners]
    fractions = tile_fractions(mask, np.array(corners) / 4, side / 4)
    np.testing.assert_allclose(fractions, counted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "tiles", "grey", "otsu", "threshold", "fixed"),
    [
        ("CMU-1-Small-Region.svs", 88, 28, 23, 63, 38),
        ("TCGA-CR-7395-01A-01-TS1.svs", 221, 143, 139, 72, 158),
    ],
)
def test_golden_counts_of_real_slides(shared_data, name, tiles, grey, otsu, threshold, fixed):
    with Slide(shared_data / "slides" / name) as slide:
        rgb, downsample = slide.read_overview_downsampled(1)
        coords = plan_coords(slide.bounds, 256.0)
    assert downsample == 1
    assert len(coords) == tiles
    saturation = np.asarray(Image.fromarray(rgb).convert("HSV"))[..., 1]
    assert (tile_fractions(grey_mask(rgb), coords, 256.0) >= 0.6).sum() == grey
    assert otsu_threshold(saturation) == threshold
    assert (tile_fractions(saturation_mask(rgb), coords, 256.0) >= 0.6).sum() == otsu
    assert (tile_fractions(saturation_mask(rgb, 20), coords, 256.0) >= 0.35).sum() == fixed
