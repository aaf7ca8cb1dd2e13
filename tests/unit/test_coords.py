from dataclasses import fields, replace

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file
from slide_files import ramp, write_slide

from ds_wsi.slides import coords as coords_module
from ds_wsi.slides.coords import (
    export_clam,
    export_trident,
    import_clam,
    import_trident,
    read_grid,
    write_grid,
)
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.slides.slide import Slide, SlideError
from ds_wsi.slides.tiling import TileGrid, plan_coords, plan_level


@pytest.fixture
def slide(tmp_path):
    """520 x 390 px at 0.25 um/px, two levels."""
    path = write_slide(tmp_path / "s.tiff", ramp(520, 390), ramp(260, 195))
    with Slide(path, mpp=0.25) as slide:
        yield slide


def grid_of(slide, mpp=0.5, tile_size_px=32):
    """All whole tiles of the slide, but the first: coordinates are not symmetric in x and y."""
    plan = plan_level(slide.mpp, slide.level_downsamples, mpp, tile_size_px)
    return TileGrid(
        slide_id=slide.slide_id,
        coords=plan_coords(slide.bounds, plan.tile_size_level0_px)[1:],
        tile_size_px=tile_size_px,
        tile_size_level0_px=plan.tile_size_level0_px,
        level=plan.level,
        read_size_px=plan.read_size_px,
        mpp=slide.mpp * plan.tile_size_level0_px / tile_size_px,
        slide_mpp=slide.mpp,
        slide_width_px=slide.width_px,
        slide_height_px=slide.height_px,
        policy=TilingPolicy(tile_size_px, mpp, 0.3, grey_range=(5, 220)),
    )


def assert_same(grid, other, but=()):
    np.testing.assert_array_equal(grid.coords, other.coords)
    assert other.coords.dtype == np.int64
    names = [entry.name for entry in fields(grid) if entry.name not in ("coords", *but)]
    assert {name: getattr(grid, name) for name in names} == {name: getattr(other, name) for name in names}


def test_grid_round_trip(slide, tmp_path):
    grid = replace(grid_of(slide), slide_mpp=0.1 + 0.2)
    write_grid(grid, tmp_path / "new" / "s.safetensors")
    read = read_grid(tmp_path / "new" / "s.safetensors")
    assert_same(grid, read)
    assert isinstance(read.policy.grey_range, tuple)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["s.safetensors"]


def test_grid_of_a_view_round_trips(slide, tmp_path):
    grid = grid_of(slide)
    swapped = replace(grid, coords=grid.coords[:, ::-1])  # negative strides
    write_grid(swapped, tmp_path / "s.safetensors")
    assert_same(swapped, read_grid(tmp_path / "s.safetensors"))


def test_killed_writer_leaves_the_old_grid(slide, tmp_path, monkeypatch):
    path, grid = tmp_path / "s.safetensors", grid_of(slide)
    write_grid(grid, path)

    def die(tensors, temporary, metadata):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(coords_module, "save_file", die)
    with pytest.raises(KeyboardInterrupt):
        write_grid(replace(grid, slide_id="other"), path)
    assert_same(grid, read_grid(path))


@pytest.mark.parametrize("left", [0, 5, 200, -8])
def test_torn_grid_is_refused(slide, tmp_path, left):
    path = tmp_path / "s.safetensors"
    write_grid(grid_of(slide), path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(
        SlideError, match=r"tile grid must be a whole safetensors file, got .*s.safetensors\)\. HINT: delete it"
    ):
        read_grid(path)


def test_missing_grid_is_refused(tmp_path):
    with pytest.raises(SlideError, match=r"tile grid must be a whole .*none.safetensors"):
        read_grid(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        (None, "None None"),
        ({"format": "pt"}, "pt None"),
        ({"format": coords_module.FORMAT, "version": "9"}, "9"),
    ],
)
def test_foreign_grid_is_refused(tmp_path, metadata, found):
    path = tmp_path / "other.safetensors"
    save_file({"coords": np.zeros((1, 2), np.int64)}, path, metadata)
    with pytest.raises(SlideError, match=rf"must be of format {coords_module.FORMAT} 1, got .*{found} "):
        read_grid(path)


def test_clam_round_trip(slide, tmp_path):
    grid = grid_of(slide)
    assert grid.level == 1
    export_clam(grid, tmp_path / "patches" / "s.h5")
    with h5py.File(tmp_path / "patches" / "s.h5") as file:
        assert list(file) == ["coords"]
        attributes = dict(file["coords"].attrs)
        assert file["coords"].dtype == np.int64
    names = ["patch_size", "patch_level", "downsample", "downsampled_level_dim", "level_dim", "name", "save_path"]
    assert sorted(attributes) == sorted(names)
    assert (attributes["patch_size"], attributes["patch_level"], attributes["name"]) == (32, 1, "s")
    assert attributes["downsample"].tolist() == [2, 2]
    assert attributes["level_dim"].tolist() == attributes["downsampled_level_dim"].tolist() == [260, 195]
    assert attributes["save_path"] == str(tmp_path / "patches")
    imported = import_clam(tmp_path / "patches" / "s.h5", slide)
    assert_same(grid, imported, but=("policy", "source"))
    assert imported.policy == TilingPolicy(32, 0.5, 0.0)


def test_clam_holds_the_squares_of_resampled_tiles(slide, tmp_path):
    grid = grid_of(slide, mpp=0.375)
    assert (grid.level, grid.read_size_px, grid.tile_size_px) == (0, 48, 32)
    export_clam(grid, tmp_path / "s.h5")
    imported = import_clam(tmp_path / "s.h5", slide)
    assert (imported.tile_size_px, imported.read_size_px, imported.tile_size_level0_px) == (48, 48, 48)
    np.testing.assert_array_equal(imported.coords, grid.coords)
    assert imported.mpp == 0.25


@pytest.mark.parametrize("mpp", [0.25, 0.375, 0.5, 0.6, 0.125])
def test_trident_round_trip(slide, tmp_path, mpp):
    grid = grid_of(slide, mpp=mpp)
    path = tmp_path / "patches" / "s_patches.h5"
    export_trident(grid, path)
    assert_same(grid, import_trident(path, slide), but=("policy", "source"))


def test_trident_attributes(slide, tmp_path):
    export_trident(grid_of(slide), tmp_path / "s_patches.h5")
    with h5py.File(tmp_path / "s_patches.h5") as file:
        assert list(file) == ["coords"]
        assert file["coords"].dtype == np.int64
        attributes = dict(file["coords"].attrs)
    assert attributes == {
        "patch_size": 32,
        "patch_size_level0": 64,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "name": "s",
        "level0_width": 520,
        "level0_height": 390,
    }
    assert np.issubdtype(attributes["target_magnification"].dtype, np.integer)


@pytest.mark.parametrize(
    ("slide_mpp", "tile_size_level0_px", "magnification", "target"),
    [(0.499, 32, 20, 20), (0.2457, 64.02, 40, 20), (0.23, 70, 40, 40 * 32 / 70), (1.0, 32, 10, 10), (2.5, 32, 4, 4)],
)
def test_trident_magnifications(slide, tmp_path, slide_mpp, tile_size_level0_px, magnification, target):
    grid = replace(grid_of(slide), slide_mpp=slide_mpp, tile_size_level0_px=tile_size_level0_px)
    export_trident(grid, tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5") as file:
        attributes = file["coords"].attrs
        assert attributes["level0_magnification"] == magnification
        assert attributes["target_magnification"] == pytest.approx(target)


@pytest.mark.parametrize("left_out", ["grid", "policy"])
def test_grid_without_its_fields_is_refused(slide, tmp_path, left_out):
    path = tmp_path / "s.safetensors"
    metadata = {"format": coords_module.FORMAT, "version": coords_module.VERSION, "grid": "{}", "policy": "{}"}
    del metadata[left_out]
    save_file({"coords": np.zeros((1, 2), np.int64)}, path, metadata)
    with pytest.raises(SlideError, match="tile grid must have the fields"):
        read_grid(path)


def test_clam_file_of_another_pyramid_is_refused(slide, tmp_path):
    path = tmp_path / "s.h5"
    export_clam(grid_of(slide), path)
    with h5py.File(path, "r+") as file:
        file["coords"].attrs["downsample"] = [4.0, 4.0]
    with pytest.raises(SlideError, match=r"downsample must be 2, .*got \[4.0, 4.0\]"):
        import_clam(path, slide)


def test_trident_file_of_another_slide_is_refused(slide, tmp_path):
    path = tmp_path / "s.h5"
    export_trident(replace(grid_of(slide), slide_height_px=391), path)
    with pytest.raises(SlideError, match=r"level0_height must be 390, .*got 391"):
        import_trident(path, slide)


IMPORTERS = {"clam": (export_clam, import_clam), "trident": (export_trident, import_trident)}


@pytest.fixture(params=IMPORTERS)
def foreign(request, slide, tmp_path):
    """An exported file, the reader for it, and a way to change it."""
    exporter, importer = IMPORTERS[request.param]
    path = tmp_path / f"{request.param}.h5"
    exporter(grid_of(slide), path)

    def change(coords=None, drop=None, **attributes):
        with h5py.File(path, "r+") as file:
            old = dict(file["coords"].attrs)
            if coords is not None:
                del file["coords"]
                file["coords"] = coords
                file["coords"].attrs.update(old)
            file["coords"].attrs.update(attributes)
            if drop:
                del file["coords"].attrs[drop]

    return path, importer, change


def test_import_keeps_the_files_order_and_tiles_over_the_edge(foreign, slide):
    path, importer, change = foreign
    coords = np.array([[500, 380], [0, 64], [64, 0]], dtype=np.int32)
    change(coords)
    np.testing.assert_array_equal(importer(path, slide).coords, coords)
    assert importer(path, slide).coords.dtype == np.int64


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        ([[0, 0], [519, 390]], r"must lie on slide s \(520 x 390 px\), got up to \(519, 390\) \(.*h5\)"),
        ([[390, 0], [520, 0]], r"got up to \(520, 0\)"),
        ([[0, 0], [-1, 0]], r"must lie on slide s"),
        ([[0.0, 0.5]], r"must be integers \[N, 2\], got float64 \[1, 2\]"),
        ([[0, 0, 0]], r"got int64 \[1, 3\]"),
        (np.zeros((0, 2), np.int64), r"got int64 \[0, 2\]"),
    ],
)
def test_import_refuses_coordinates(foreign, slide, coords, message):
    path, importer, change = foreign
    change(np.array(coords))
    with pytest.raises(SlideError, match=message):
        importer(path, slide)


def test_import_names_a_missing_attribute(foreign, slide):
    path, importer, change = foreign
    change(drop="patch_size")
    with pytest.raises(SlideError, match=r"must have the attributes .*, got none of \['patch_size'\]"):
        importer(path, slide)


def test_import_refuses_a_file_without_coords(foreign, slide):
    path, importer, _ = foreign
    with h5py.File(path, "r+") as file:
        del file["coords"]
    with pytest.raises(SlideError, match=r"must be in a dataset `coords`, got \[\]"):
        importer(path, slide)


@pytest.mark.parametrize("left", [0, 100, 1000])
def test_import_refuses_a_torn_file(foreign, slide, left):
    path, importer, _ = foreign
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(SlideError, match=r"must be in an h5 file, got .*h5\)"):
        importer(path, slide)


def test_clam_level_that_the_slide_lacks_is_refused(slide, tmp_path):
    path = tmp_path / "s.h5"
    export_clam(grid_of(slide), path)
    with h5py.File(path, "r+") as file:
        file["coords"].attrs["patch_level"] = 2
    with pytest.raises(SlideError, match=r"patch_level must be a level of slide s, got 2"):
        import_clam(path, slide)


def test_imported_grid_needs_the_slides_mpp(slide, tmp_path):
    export_clam(grid_of(slide), tmp_path / "s.h5")
    with Slide(slide.path) as unknown, pytest.raises(SlideError, match="must tell its resolution"):
        import_clam(tmp_path / "s.h5", unknown)
