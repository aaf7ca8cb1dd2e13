import logging
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import tifffile
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from slide_files import write_slide

from ds_wsi.config import read_section
from ds_wsi.slides import tiling
from ds_wsi.slides.policy import TilingPolicy, stored_tiling
from ds_wsi.slides.slide import Slide, SlideError, TileReadError
from ds_wsi.slides.tiling import LevelPlan, TissueFound, plan_coords, plan_level, tile_slide

POLICY = TilingPolicy(tile_size_px=64, mpp=0.5, overview_mpp=2.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tile_size_px", 0),
        ("mpp", 0.0),
        ("mpp", float("nan")),
        ("overview_mpp", -8.0),
        ("min_tissue_fraction", 60),
        ("min_tissue_fraction", -0.1),
        ("grey_range", (230, 3)),
        ("grey_range", (3, 256)),
        ("grey_range", (3,)),
    ],
)
def test_policy_names_the_field_it_refuses(field, value):
    with pytest.raises(ValueError, match=rf"^{field} must be"):
        TilingPolicy(**{field: value})


@pytest.mark.parametrize(
    ("slide_mpp", "downsamples", "mpp", "expected"),
    [
        (0.5, (1, 2, 4), 0.5, LevelPlan(0, 256, 256, False)),
        (0.499, (1,), 0.5, LevelPlan(0, 256, 256, False)),  # snapped
        (0.25, (1, 2, 4), 0.5, LevelPlan(1, 256, 512, False)),
        (0.2525, (1, 2, 4), 0.5, LevelPlan(1, 256, 512, False)),  # 1% coarser is no upsampling
        (0.25, (1, 4, 16), 0.5, LevelPlan(0, 512, 512, True)),  # level 1 is too coarse
        (0.25, (1, 4, 16), 2.0, LevelPlan(1, 512, 2048, True)),
        (0.22, (1, 2, 4), 0.5, LevelPlan(1, 291, 582, True)),
        (0.25, (1, 2.0005, 4.001), 0.5, LevelPlan(1, 256, 512.128, False)),
        (0.5, (1, 4), 0.25, LevelPlan(0, 128, 128, True)),  # upsampled
    ],
)
def test_level_plan(slide_mpp, downsamples, mpp, expected):
    plan = plan_level(slide_mpp, downsamples, mpp, 256)
    assert (plan.level, plan.read_size_px, plan.resampled) == (
        expected.level,
        expected.read_size_px,
        expected.resampled,
    )
    assert plan.tile_size_level0_px == pytest.approx(expected.tile_size_level0_px)


@given(
    st.floats(0.1, 2.0),
    st.lists(st.floats(1.3, 5.0), max_size=5),
    st.floats(0.1, 10.0),
    st.integers(16, 1024),
)
@settings(max_examples=200, deadline=None)
def test_level_plan_reads_the_asked_area_from_the_deepest_level_fine_enough(slide_mpp, steps, mpp, tile_size_px):
    downsamples = [math.prod(steps[:k]) for k in range(len(steps) + 1)]
    plan = plan_level(slide_mpp, downsamples, mpp, tile_size_px)
    level_mpp = slide_mpp * downsamples[plan.level]
    assert plan.level == 0 or level_mpp <= mpp * 1.02
    deeper = downsamples[plan.level + 1 : plan.level + 2]
    assert all(slide_mpp * downsample > mpp * 1.02 for downsample in deeper)
    assert plan.tile_size_level0_px == plan.read_size_px * downsamples[plan.level]
    assert plan.resampled or plan.read_size_px == tile_size_px
    # Within 2% (snapped) or half a pixel (resampled) of the physical size asked for.
    assume(plan.read_size_px > 1)
    error_um = abs(plan.tile_size_level0_px * slide_mpp - tile_size_px * mpp)
    assert error_um <= max(0.0201 * tile_size_px * mpp, 0.501 * level_mpp)


def test_coords_are_whole_tiles_row_by_row():
    assert plan_coords((0, 0, 300, 200), 100.0).tolist() == [
        [0, 0],
        [100, 0],
        [200, 0],
        [0, 100],
        [100, 100],
        [200, 100],
    ]
    assert plan_coords((0, 0, 299, 200), 100.0).tolist() == [[0, 0], [100, 0], [0, 100], [100, 100]]
    assert plan_coords((30, 7, 250, 100), 100.0).tolist() == [[30, 7], [130, 7]]
    assert plan_coords((0, 0, 99, 500), 100.0).shape == (0, 2)
    assert plan_coords((0, 0, 100, 500), 100.0).dtype == np.int64


@given(
    st.tuples(st.integers(0, 500), st.integers(0, 500), st.integers(1, 4000), st.integers(1, 4000)),
    st.floats(20.0, 600.0),
)
@settings(max_examples=200, deadline=None)
def test_coords_are_all_the_whole_tiles_there_are(bounds, size):
    x, y, width, height = bounds
    coords = plan_coords(bounds, size)
    assert len(coords) == math.floor(width / size + 1e-6) * math.floor(height / size + 1e-6)
    if len(coords):
        assert coords.min(axis=0).tolist() == [x, y]
        # Positions are whole pixels: a tile reaches over the edge, and neighbours overlap, by a fraction of one.
        assert (coords + size <= [x + width + 0.501, y + height + 0.501]).all()
        columns = np.unique(coords[:, 0])
        assert (np.abs(np.diff(columns) - size) < 1).all()


def draw(width, height, tissue, scale=1):
    """White glass with one rectangle (left, top, right, bottom) of tissue."""
    image = np.full((height * scale, width * scale, 3), 244, dtype=np.uint8)
    left, top, right, bottom = (edge * scale for edge in tissue)
    image[top:bottom, left:right] = (200, 110, 160)
    return image


def test_tissue_tiles_of_a_slide(tmp_path):
    path = write_slide(tmp_path / "s.tiff", draw(520, 390, (128, 64, 320, 192)), mpp=0.5)
    with Slide(path) as slide:
        grid = tile_slide(slide, POLICY)
    assert grid.coords.tolist() == [[128, 64], [192, 64], [256, 64], [128, 128], [192, 128], [256, 128]]
    assert (grid.slide_id, len(grid), grid.coords.dtype) == ("s", 6, np.int64)
    assert (grid.tile_size_px, grid.tile_size_level0_px, grid.level, grid.read_size_px) == (64, 64, 0, 64)
    assert (grid.slide_width_px, grid.slide_height_px) == (520, 390)
    assert grid.mpp == grid.slide_mpp == pytest.approx(0.5, rel=1e-3)
    assert grid.policy == POLICY


@pytest.mark.parametrize(("fraction", "kept"), [(0.6, 1), (0.5, 2), (0.0, 48)])
def test_least_tissue_fraction(tmp_path, fraction, kept):
    # One tile is covered, its right neighbour by half.
    path = write_slide(tmp_path / "s.tiff", draw(520, 390, (64, 64, 160, 128)), mpp=0.5)
    with Slide(path) as slide:
        grid = tile_slide(slide, TilingPolicy(64, 0.5, min_tissue_fraction=fraction, overview_mpp=4.0))
    assert len(grid) == kept


def test_same_tissue_at_another_magnification(tmp_path):
    tissue = (128, 64, 320, 192)
    levels = [draw(512, 384, tissue, scale) for scale in (2, 1)]
    with Slide(write_slide(tmp_path / "s.tiff", *levels, mpp=0.25)) as slide:
        grid = tile_slide(slide, POLICY)
        assert (grid.level, grid.read_size_px, grid.tile_size_level0_px) == (1, 64, 128)
        assert grid.coords.tolist() == [[256, 128], [384, 128], [512, 128], [256, 256], [384, 256], [512, 256]]
        assert grid.mpp == pytest.approx(0.5, rel=1e-3)
        tile = slide.read_tile(*grid.coords[0], grid.level, grid.read_size_px, grid.tile_size_px)
        assert (tile == (200, 110, 160)).all()
    with Slide(write_slide(tmp_path / "flat.tiff", levels[0], mpp=0.25)) as slide:
        flat = tile_slide(slide, POLICY)
    assert (flat.level, flat.read_size_px, flat.tile_size_px) == (0, 128, 64)
    np.testing.assert_array_equal(flat.coords, grid.coords)


def test_grid_starts_at_the_scanned_area(tmp_path):
    with Slide(write_slide(tmp_path / "s.tiff", draw(520, 390, (128, 64, 320, 192)), mpp=0.5)) as slide:
        bounds = {"x": 100, "y": 50, "width": 300, "height": 300}
        slide._properties |= {f"openslide.bounds-{name}": str(value) for name, value in bounds.items()}
        grid = tile_slide(slide, POLICY)
    assert ((grid.coords - (100, 50)) % 64 == 0).all()
    assert grid.coords.min(axis=0).tolist() == [164, 50]  # 58% of the tiles at x = 100 is tissue, 78% at y = 50


def test_upsampling_is_told_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tiling.logger, "propagate", True)
    path = write_slide(tmp_path / "s.tiff", draw(520, 390, (128, 64, 320, 192)), mpp=0.5)
    with Slide(path, mpp=0.5) as slide, caplog.at_level(logging.WARNING, "ds_wsi"):
        tile_slide(slide, POLICY)
        assert not caplog.records
        grid = tile_slide(slide, TilingPolicy(64, mpp=0.25, overview_mpp=2.0))
    assert [record.getMessage() for record in caplog.records] == [
        "slide s has 0.5 um/px, coarser than the requested 0.25: its tiles are enlarged"
    ]
    assert (grid.read_size_px, grid.tile_size_px, grid.mpp) == (32, 64, 0.25)


def broken(path, *tiles, levels=1):
    """1024 x 1024 px, tissue but for glass around; the TIFF tiles (column, row) of 128 px at level 0 are broken."""
    image = draw(1024, 1024, (128, 128, 896, 896))
    write_slide(path, image, *([image[::4, ::4]] if levels > 1 else []), mpp=0.5, compression="zlib", tile_px=128)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        places = [(page.dataoffsets[y * 8 + x], page.databytecounts[y * 8 + x]) for x, y in tiles]
    with open(path, "r+b") as file:
        for offset, size in places:
            file.seek(offset)
            file.write(b"\xff" * size)
    return path


@pytest.mark.parametrize("levels", [1, 2])
def test_a_broken_tile_is_kept_to_be_reported_and_the_others_are_as_before(tmp_path, levels):
    policy = TilingPolicy(tile_size_px=128)
    with Slide(broken(tmp_path / "whole.tiff", levels=levels)) as slide:
        whole = tile_slide(slide, policy)
    with Slide(broken(tmp_path / "s.tiff", (3, 4), (0, 0), levels=levels)) as slide:
        grid = tile_slide(slide, policy)
        unknown = grid.tissue.n_unreadable
        failed = []
        for x, y in grid.coords.tolist():
            try:
                slide.read_tile(x, y, grid.level, grid.read_size_px, 128)
            except TileReadError:
                failed.append((x, y))
    kept, expected = (
        {tuple(corner) for corner in grid.coords.tolist()},
        {tuple(corner) for corner in whole.coords.tolist()},
    )
    if levels == 2:  # the overview is whole
        assert (kept, unknown) == (expected, 0)
        assert failed == [(384, 512)]
    else:
        assert kept == expected | {(0, 0)}  # glass or tissue, in the broken corner
        assert unknown == 2
        assert failed == [(0, 0), (384, 512)]


def test_a_slide_that_is_mostly_broken_is_refused(tmp_path):
    many = [(x, y) for x in range(8) for y in range(8) if (x, y) != (4, 4)]
    words = r"readable for its overview in most tiles, got \d+ of \d+ .*slide s, .*HINT.*--skip_bad_slides"
    with Slide(broken(tmp_path / "s.tiff", *many)) as slide, pytest.raises(SlideError, match=words):
        tile_slide(slide, TilingPolicy(tile_size_px=128))


def test_a_slide_whose_level_0_is_dead_is_refused_when_it_is_tiled(tmp_path):
    every = [(x, y) for x in range(8) for y in range(8)]
    words = r"must have readable tiles, got .* at all 5 that were tried \(slide s, .*HINT.*--skip_bad_slides"
    with Slide(broken(tmp_path / "s.tiff", *every, levels=2)) as slide, pytest.raises(SlideError, match=words):
        tile_slide(slide, TilingPolicy(tile_size_px=128))


def test_every_tile_is_taken_without_a_rule(tmp_path):
    with Slide(write_slide(tmp_path / "s.tiff", draw(520, 390, (128, 64, 320, 192)), mpp=0.5)) as slide:
        grid = tile_slide(slide, TilingPolicy(64, tissue="none"))
    np.testing.assert_array_equal(grid.coords, plan_coords((0, 0, 520, 390), 64.0))
    assert grid.tissue == TissueFound(1.0, None, 48)


def test_what_was_found_is_told_of_the_scanned_area(tmp_path):
    with Slide(write_slide(tmp_path / "s.tiff", draw(512, 384, (128, 64, 320, 192)), mpp=0.5)) as slide:
        whole = tile_slide(slide, POLICY).tissue
        bounds = {"x": 128, "y": 64, "width": 192, "height": 256}
        slide._properties |= {f"openslide.bounds-{name}": str(value) for name, value in bounds.items()}
        area = tile_slide(slide, POLICY).tissue
    assert whole == TissueFound(pytest.approx(0.125), pytest.approx(0.125), 48)
    assert area == TissueFound(pytest.approx(0.5), pytest.approx(0.5), 12)


def test_the_rule_of_earlier_versions_is_kept():
    assert TilingPolicy().tissue == "auto"
    assert TilingPolicy(use_saturation=True) == TilingPolicy(tissue="otsu")
    assert TilingPolicy(use_saturation=False) == TilingPolicy(tissue="grey")
    assert replace(TilingPolicy(use_saturation=False), mpp=1.0).tissue == "grey"
    stored = {"tile_size_px": 64, "use_saturation": True}  # a model's of an earlier version
    assert stored_tiling(stored) == {"tile_size_px": 64, "tissue": "otsu"}
    assert read_section({"tiling": stored}).tiling == TilingPolicy(64, tissue="otsu")
    assert read_section({"tiling": asdict(TilingPolicy(64))}).tiling == TilingPolicy(64)
    for words, values in {
        "tissue must be one of auto, ": {"tissue": "hsv"},
        "tissue_version must be 1, got 2": {"tissue_version": 2},
    }.items():
        with pytest.raises(ValueError, match=words):
            TilingPolicy(**values)


def test_slide_smaller_than_a_tile_is_refused(tmp_path):
    with (
        Slide(write_slide(tmp_path / "s.tiff", draw(520, 63, (0, 0, 520, 63)), mpp=0.5)) as slide,
        pytest.raises(
            SlideError, match=r"hold a tile of 64 px at level 0, got 520 x 63 px \(slide s,.*HINT.*smaller tile_size_px"
        ),
    ):
        tile_slide(slide, POLICY)


def test_slide_without_tissue_is_refused(tmp_path):
    with (
        Slide(write_slide(tmp_path / "s.tiff", draw(512, 384, (0, 0, 0, 0)), mpp=0.5)) as slide,
        pytest.raises(SlideError, match=r"60% tissue, got at most 0.0% in 48 tiles \(slide s,.*--min_tissue_fraction"),
    ):
        tile_slide(slide, POLICY)
    with (
        Slide(write_slide(tmp_path / "little.tiff", draw(512, 384, (0, 0, 32, 32)), mpp=0.5)) as slide,
        pytest.raises(SlideError, match=r"got at most 25.0% in 48 tiles \(slide little,"),
    ):
        tile_slide(slide, POLICY)


def test_slide_without_mpp_is_refused(tmp_path):
    with (
        Slide(write_slide(tmp_path / "s.tiff", draw(512, 384, (0, 0, 256, 256)))) as slide,
        pytest.raises(SlideError, match=r"must tell its resolution"),
    ):
        tile_slide(slide, POLICY)


def test_small_real_slide_is_refused(shared_data):
    with (
        Slide(shared_data / "broken" / "small.svs") as slide,
        pytest.raises(SlideError, match=r"got 16 x 16 px \(slide small,"),
    ):
        tile_slide(slide, TilingPolicy())


@pytest.mark.parametrize(
    ("name", "slide_mpp", "tiles"),
    [("CMU-1-Small-Region.svs", None, 28), ("TCGA-CR-7395-01A-01-TS1.svs", 0.5, 143)],
)
def test_golden_grids_of_real_slides(shared_data, name, slide_mpp, tiles):
    policy = TilingPolicy(overview_mpp=0.5, use_saturation=False)  # the mask at level 0, grey only
    with Slide(shared_data / "slides" / name, slide_mpp) as slide:
        grid = tile_slide(slide, policy)
        coarse = tile_slide(slide, TilingPolicy())
    assert len(grid) == tiles
    assert (grid.level, grid.read_size_px, grid.tile_size_level0_px) == (0, 256, 256)
    assert 0 < len(coarse) <= 1.1 * tiles
