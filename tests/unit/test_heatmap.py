"""The heat map's geometry, and the pictures written."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps
from PIL import Image

from ds_wsi.evaluation.curves import draw_curves, series
from ds_wsi.evaluation.heatmap import (
    COLOR_MAP,
    OPACITY,
    attention_rgba,
    composite,
    draw_attention,
    percentile_rank,
    tile_boxes,
)

# A slide of 4,000 x 1,600 level-0 px on a thumbnail of 250 x 100 px; tiles of 320 are 20 thumbnail px.
DOWNSAMPLE, TILE, SHAPE = 16.0, 320, (100, 250)
COORDS = np.array([[0, 0], [3200, 640], [640, 1280], [320, 0]])
ATTENTION = np.array([0.1, 0.6, 0.2, 0.1])


def brightness(rgba: np.ndarray) -> np.ndarray:
    return rgba[..., :3].astype(float).sum(-1) * (rgba[..., 3] > 0)


def test_each_tile_lies_where_the_slide_has_it():
    overlay = attention_rgba(COORDS, TILE, ATTENTION, DOWNSAMPLE, SHAPE)
    assert overlay.shape == (100, 250, 4)
    assert overlay.dtype == np.uint8
    covered = np.zeros(SHAPE, dtype=bool)
    for x, y in [(0, 0), (200, 40), (40, 80), (20, 0)]:
        covered[y : y + 20, x : x + 20] = True
    np.testing.assert_array_equal(overlay[..., 3], np.where(covered, round(255 * OPACITY), 0))


def test_the_brightest_is_the_tile_of_highest_attention():
    light = brightness(attention_rgba(COORDS, TILE, ATTENTION, DOWNSAMPLE, SHAPE))
    rows, columns = np.nonzero(light == light.max())
    assert (columns.min(), columns.max()) == (200, 219)
    assert (rows.min(), rows.max()) == (40, 59)


def test_colours_are_the_percentile_rank():
    overlay = attention_rgba(COORDS, TILE, ATTENTION, DOWNSAMPLE, SHAPE)
    # Ranks of 0.1, 0.6, 0.2, 0.1: the two equal ones share (0 + 1) / 2.
    for (x, y), rank in zip([(0, 0), (200, 40), (40, 80), (20, 0)], [0.5 / 3, 1.0, 2 / 3, 0.5 / 3], strict=True):
        assert tuple(overlay[y + 5, x + 5, :3]) == colormaps[COLOR_MAP](rank, bytes=True)[:3]


def test_rank_of_equal_and_of_single_values():
    np.testing.assert_array_equal(percentile_rank(np.full(5, 0.2)), 0.5)
    np.testing.assert_array_equal(percentile_rank(np.array([1.0])), 0.5)
    np.testing.assert_array_equal(percentile_rank(np.array([1e-9, 0.9, 1e-8])), [0, 1, 0.5])


@given(st.floats(1.01, 97.3), st.integers(16, 400), st.integers(0, 50))
def test_neighbouring_tiles_share_an_edge(downsample: float, tile: int, first: int):
    boxes = tile_boxes(np.array([[first, 0], [first + tile, tile]]), tile, downsample)
    if tile >= downsample:  # a tile of less than a pixel covers the whole pixel
        assert boxes[0, 2] == boxes[1, 0]
        assert boxes[0, 3] == boxes[1, 1]
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_tiles_below_a_pixel_show_the_highest():
    coords = np.array([[0, 0], [2, 0], [4, 2]])
    overlay = attention_rgba(coords, 2, np.array([0.2, 0.7, 0.1]), 16.0, (2, 3))
    assert tuple(overlay[0, 0, :3]) == colormaps[COLOR_MAP](1.0, bytes=True)[:3]
    assert (overlay[..., 3] > 0).sum() == 1


def test_border_tiles_are_cut():
    overlay = attention_rgba(np.array([[3840, 1440]]), TILE, np.array([1.0]), DOWNSAMPLE, SHAPE)
    assert (overlay[..., 3] > 0).sum() == 10 * 10


def test_composite_leaves_the_rest_untouched():
    image = np.random.default_rng(0).integers(0, 256, size=(*SHAPE, 3), dtype=np.uint8)
    overlay = attention_rgba(COORDS, TILE, ATTENTION, DOWNSAMPLE, SHAPE)
    result = composite(image, overlay)
    outside = overlay[..., 3] == 0
    np.testing.assert_array_equal(result[outside], image[outside])
    mixed = image + (overlay[..., :3].astype(float) - image) * OPACITY
    assert np.abs(result[~outside] - mixed[~outside]).max() <= 1


@pytest.mark.parametrize(
    ("coords", "attention", "tile", "downsample", "message"),
    [
        (COORDS, ATTENTION[:3], TILE, DOWNSAMPLE, r"shapes \[N, 2\] and \[N\]"),
        (COORDS[:0], ATTENTION[:0], TILE, DOWNSAMPLE, "N >= 1"),
        (COORDS, np.array([1, math.nan, 1, 1]), TILE, DOWNSAMPLE, r"finite, got nan \(tile 1\)"),
        (COORDS, ATTENTION, TILE, 4.0, r"lie on the thumbnail of 250 x 100 px, got level-0 \(3200, 640\)"),
        (COORDS[:, ::-1], ATTENTION, TILE, DOWNSAMPLE, r"level-0 \(640, 3200\)"),
        (COORDS, ATTENTION, 0, DOWNSAMPLE, "tile_size_level0_px must be positive"),
        (COORDS, ATTENTION, TILE, -1.0, "downsample must be positive"),
    ],
)
def test_bad_tiles_are_refused(coords, attention, tile, downsample, message):
    with pytest.raises(ValueError, match=message) as error:
        attention_rgba(coords, tile, attention, downsample, SHAPE)
    assert "HINT: " in str(error.value)


@pytest.mark.parametrize("shape", [(100, 250), (250, 100), (20, 250)])
def test_the_picture_has_the_slide_left_and_the_attention_right(tmp_path: Path, shape: tuple[int, int]):
    """A tile at the upper left, half as high as the slide: its colour is in the right panel's upper half only."""
    height, width = shape
    path = tmp_path / "new folder" / "slide.png"
    tissue = np.array([200, 140, 180], dtype=np.uint8)
    coords = np.array([[0, 0], [width // 2, 0]])
    draw_attention(np.full((*shape, 3), tissue), coords, height // 2, np.array([0.9, 0.1]), 1.0, path, "$5 and $6 <b>")
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    tint = tissue * (1 - OPACITY) + np.array(colormaps[COLOR_MAP](1.0, bytes=True)[:3]) * OPACITY
    tile_rows, tile_columns = np.nonzero(np.abs(picture - tint).max(-1) <= 3)
    panel_rows, panel_columns = np.nonzero(np.abs(picture - tissue).max(-1) <= 1)
    assert panel_columns.min() < picture.shape[1] / 2 < tile_columns.min()
    assert abs(tile_rows.min() - panel_rows.min()) <= 2
    assert np.ptp(tile_rows) / np.ptp(panel_rows) == pytest.approx(0.5, abs=0.03)
    assert not list(path.parent.glob(".*")), "no temporary file is left"


def test_thumbnail_must_be_rgb(tmp_path: Path):
    with pytest.raises(ValueError, match=r"uint8 \[h, w, 3\], got uint8 \[100, 250, 4\] \(slide_1\)"):
        draw_attention(
            np.zeros((100, 250, 4), np.uint8), COORDS, TILE, ATTENTION, DOWNSAMPLE, tmp_path / "a", "slide_1"
        )


HISTORY = [
    {"epoch": 1, "train_loss": 0.7, "eval_loss": 0.69, "eval_auc": 0.5, "eval_accuracy": 0.5},
    {"epoch": 2, "train_loss": 0.5},
    {"epoch": 3, "train_loss": math.nan, "eval_loss": 0.6, "eval_auc": None, "eval_f1": 0.8},
]


def test_series_leaves_gaps_for_what_is_missing():
    epochs, values = series(HISTORY, "eval_auc")
    assert epochs == [1, 2, 3]
    np.testing.assert_array_equal(values, [0.5, math.nan, math.nan])
    np.testing.assert_array_equal(series(HISTORY, "train_loss")[1], [0.7, 0.5, math.nan])


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:1], HISTORY[1:2], []])
@pytest.mark.parametrize("metric", ["auc", "eval_f1", "eval_loss"])
def test_curves_of_incomplete_histories(tmp_path: Path, history: list[dict], metric: str):
    path = tmp_path / "curves.png"
    draw_curves(history, path, best_epoch=3, metric=metric)
    assert Image.open(path).size[0] > 1000


def test_the_best_epoch_is_a_line_in_each_panel(tmp_path: Path):
    draw_curves(HISTORY, tmp_path / "marked.png", best_epoch=2, metric="auc")
    draw_curves(HISTORY, tmp_path / "plain.png")
    marked, plain = (grey_lines(tmp_path / f"{name}.png") for name in ("marked", "plain"))
    assert plain.size == 0
    assert marked.min() < 0.5 < marked.max()


def grey_lines(path: Path) -> np.ndarray:
    """Columns (as fractions of the width) of which a fifth or more is the mark's grey."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    grey = (np.abs(picture - round(0.45 * 255)) <= 25).all(-1)
    return np.flatnonzero(grey.mean(axis=0) > 0.2) / picture.shape[1]


def test_curves_show_the_values(tmp_path: Path):
    draw_curves(HISTORY, tmp_path / "one.png")
    draw_curves([{**HISTORY[0], "eval_auc": 0.9}, *HISTORY[1:]], tmp_path / "two.png")
    one, two = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("one", "two"))
    changed = np.flatnonzero((one != two).any(axis=(0, 2))) / one.shape[1]
    assert changed.size
    assert changed.min() > 0.45, "the losses stay as they are"
