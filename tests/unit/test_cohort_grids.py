"""The grids that a cohort keeps, reads again, takes from elsewhere or refuses."""

from dataclasses import fields, replace

import numpy as np
import pytest
from cohort_files import POLICY, copy_to, load, messages, one_slide, picture, row, two, write_slides

from ds_wsi.bags.manifest import ManifestError
from ds_wsi.slides.coords import export_trident, import_trident, read_grid, write_grid
from ds_wsi.slides.fingerprint import slide_fingerprint
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.slides.pyramid import write_pyramid
from ds_wsi.slides.slide import Slide
from ds_wsi.slides.tiling import tile_slide


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return write_slides(tmp_path_factory.mktemp("slides"))


def test_grids_are_kept_and_read_again_until_policy_or_mpp_change(slides, tmp_path):
    tiles = tmp_path / "tiles"
    first = load(tmp_path, two(slides), tiles_dir=tiles)
    files = {path.name: path.stat().st_mtime_ns for path in tiles.iterdir()}
    assert set(files) == {"one.safetensors", "two.safetensors"}
    second = load(tmp_path, two(slides), tiles_dir=tiles)
    assert {path.name: path.stat().st_mtime_ns for path in tiles.iterdir()} == files
    for before, after in zip(first.grids, second.grids):
        np.testing.assert_array_equal(before.coords, after.coords)
        for field in fields(before):
            if field.name != "coords":
                assert getattr(before, field.name) == getattr(after, field.name), field.name
    small = load(tmp_path, two(slides), TilingPolicy(tile_size_px=32), tiles_dir=tiles)
    assert {path.stat().st_mtime_ns for path in tiles.iterdir()}.isdisjoint(files.values())
    assert small.lengths[0] > 2 * first.lengths[0]
    assert read_grid(tiles / "one.safetensors").tile_size_px == 32
    load(tmp_path, two(slides, mpp="0.25"), TilingPolicy(tile_size_px=32), tiles_dir=tiles)
    assert read_grid(tiles / "one.safetensors").slide_mpp == 0.25


def test_a_grid_of_another_slide_file_is_tiled_anew(slides, tmp_path):
    load(tmp_path, two(slides), tiles_dir=tmp_path / "tiles")
    swapped = [row(slides, "one", "other.tiff", "a"), row(slides, "two", "good.tiff", "b")]
    cohort = load(tmp_path, swapped, tiles_dir=tmp_path / "tiles")
    assert [grid.slide_width_px for grid in cohort.grids] == [320, 256]


def test_a_torn_grid_is_a_problem_that_names_it(slides, tmp_path):
    load(tmp_path, two(slides), tiles_dir=tmp_path / "tiles")
    path = tmp_path / "tiles" / "one.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ManifestError, match=r"must be a whole safetensors file.*one\.safetensors.*HINT: delete it"):
        load(tmp_path, two(slides), tiles_dir=tmp_path / "tiles")


def test_an_imported_grid_is_taken_as_it_is_or_refused(slides, tmp_path):
    tiles = tmp_path / "tiles"
    with Slide(slides / "good.tiff", slide_id="one") as slide:
        grid = tile_slide(slide, POLICY)
        export_trident(replace(grid, coords=grid.coords[:2]), tmp_path / "one.h5")
        write_grid(import_trident(tmp_path / "one.h5", slide), tiles / "one.safetensors")
    before = (tiles / "one.safetensors").read_bytes()
    # another tissue threshold is no reason to refuse it
    cohort = load(tmp_path, two(slides), replace(POLICY, min_tissue_fraction=0.2), tiles_dir=tiles)
    np.testing.assert_array_equal(cohort.grids[0].coords, grid.coords[:2])
    # Coordinates were imported; how their tiles are shrunk is the run's.
    assert load(tmp_path, two(slides), replace(POLICY, shrink="dct"), tiles_dir=tiles).grids[0].policy.shrink == "dct"
    for policy, words in ((TilingPolicy(tile_size_px=32), "32 px at 0.5"), (replace(POLICY, mpp=1.0), "64 px at 1 ")):
        with pytest.raises(ManifestError, match="imported from trident") as caught:
            load(tmp_path, two(slides), policy, tiles_dir=tiles)
        assert words in str(caught.value)
        assert "got 64 px at 0.5" in str(caught.value)
    assert (tiles / "one.safetensors").read_bytes() == before


@pytest.mark.parametrize("keeps_size_and_time", [False, True])
def test_a_grid_is_known_by_its_slides_content_not_by_name_size_or_time(slides, tmp_path, caplog, keeps_size_and_time):
    tiles, path = tmp_path / "tiles", copy_to(tmp_path / "slide.tiff", slides / "good.tiff", touch=True)
    load(tmp_path, one_slide(slides, path), tiles_dir=tiles)
    before = read_grid(tiles / "one.safetensors")
    written = (tiles / "one.safetensors").stat().st_mtime_ns
    # the same bytes as another file, at another time, under another name, by a link: the grid is kept
    for same in (copy_to(tmp_path / "copy.tiff", path), copy_to(tmp_path / "slide.tiff", slides / "good.tiff")):
        load(tmp_path, one_slide(slides, same), tiles_dir=tiles)
    (tmp_path / "link.tiff").symlink_to(path)
    load(tmp_path, one_slide(slides, tmp_path / "link.tiff"), tiles_dir=tiles)
    assert (tiles / "one.safetensors").stat().st_mtime_ns == written
    assert messages(caplog) == []
    # another picture of the same size in px, written without compression: perhaps of the same bytes and time
    other = picture()
    other[32:128] = 243
    write_pyramid(tmp_path / "new.tiff", other, mpp=0.5)
    n_bytes = (slides / "good.tiff").stat().st_size
    if keeps_size_and_time:
        content = (tmp_path / "new.tiff").read_bytes()
        (tmp_path / "new.tiff").write_bytes(content + b"\0" * (n_bytes - len(content)))
        assert (tmp_path / "new.tiff").stat().st_size == n_bytes
    copy_to(path, tmp_path / "new.tiff", touch=True)
    load(tmp_path, one_slide(slides, path), tiles_dir=tiles)
    assert read_grid(tiles / "one.safetensors").coords.tolist() != before.coords.tolist()
    (message,) = messages(caplog)
    assert "1 of 2 grids were of another policy, mask or slide file" in message


def test_a_grid_of_an_earlier_version_is_taken_with_one_line(slides, tmp_path, caplog):
    tiles = tmp_path / "tiles"
    cohort = load(tmp_path, two(slides))
    for grid in cohort.grids:
        write_grid(grid, tiles / f"{grid.slide_id}.safetensors")  # without its slide's fingerprint, as they were
    before = {path.name: path.read_bytes() for path in tiles.iterdir()}
    load(tmp_path, two(slides), tiles_dir=tiles)
    assert {path.name: path.read_bytes() for path in tiles.iterdir()} == before
    (message,) = messages(caplog)
    assert "2 of 2 grids are of an earlier version" in message


@pytest.mark.parametrize("with_fingerprint", [False, True])
def test_an_imported_grid_of_another_slide_is_refused(slides, tmp_path, with_fingerprint):
    tiles = tmp_path / "tiles"
    name = "good.tiff" if with_fingerprint else "other.tiff"  # of the other size in px
    with Slide(slides / name, slide_id="one") as slide:
        export_trident(tile_slide(slide, POLICY), tmp_path / "one.h5")
        fingerprint = slide_fingerprint(slides / "other.tiff") if with_fingerprint else None
        write_grid(import_trident(tmp_path / "one.h5", slide), tiles / "one.safetensors", fingerprint)
    before = (tiles / "one.safetensors").read_bytes()
    with pytest.raises(
        ManifestError, match=r"imported from trident must be of the slide's present file.*import it again"
    ):
        load(tmp_path, two(slides), tiles_dir=tiles)
    assert (tiles / "one.safetensors").read_bytes() == before


def test_without_write_grids_nothing_is_written(slides, tmp_path):
    load(tmp_path, two(slides), tiles_dir=tmp_path / "tiles", write_grids=False)
    assert not (tmp_path / "tiles").exists()
    load(tmp_path, two(slides), tiles_dir=tmp_path / "tiles")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "tiles").iterdir()}
    small = load(tmp_path, two(slides), TilingPolicy(tile_size_px=32), tiles_dir=tmp_path / "tiles", write_grids=False)
    assert small.tile_grids[0].tile_size_px == 32
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "tiles").iterdir()} == before
