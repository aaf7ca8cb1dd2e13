"""One byte of a binary file is another: the right values, or a named error; never a dead process or wrong values."""

import json
import multiprocessing
import shutil
from functools import partial
from itertools import cycle
from pathlib import Path

import datasets
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from test_tile_store import ALL_TILES, picture

from ds_wsi.bags.features import FeatureFileError, read_about, read_features, read_places, read_shape, write_features
from ds_wsi.bags.problems import ManifestError
from ds_wsi.bags.tables.read import read_table_file
from ds_wsi.runtime.fingerprint import Fingerprint
from ds_wsi.slides import tile_store
from ds_wsi.slides.coords import export_clam, import_clam, read_grid, read_slide_fingerprint, write_grid
from ds_wsi.slides.masks import MaskFile, read_mask, write_mask
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.slides.pyramid import write_pyramid
from ds_wsi.slides.slide import Slide, SlideError, TileReadError
from ds_wsi.slides.tile_store import StoredSlide, StoreError, damaged_rows, pack_slide, store_path
from ds_wsi.slides.tiling import tile_slide

MASKS = (0xFF, 0x01, 0x80)


def damage_all(path, check, masks=MASKS):
    """Call `check` with every byte of a file changed, in a process of its own; what it returned, counted.

    The masks take turns: each byte is changed once.
    """
    context = multiprocessing.get_context("fork")
    damaged_path = Path(f"{path.parent}/damaged/{path.name}")
    damaged_path.parent.mkdir()
    counted = path.parent / "counted.json"

    def run():
        whole, counts = path.read_bytes(), {}
        for position, mask in zip(range(len(whole)), cycle(masks), strict=False):
            damaged = bytearray(whole)
            damaged[position] ^= mask
            damaged_path.write_bytes(damaged)
            try:
                word = check(damaged_path)
            except BaseException as error:
                word = f"{type(error).__name__} (byte {position} ^ {mask:02x}: {str(error)[:200]})"
            counts[word] = counts.get(word, 0) + 1
        counted.write_text(json.dumps(counts))

    process = context.Process(target=run)
    process.start()
    process.join(170)
    if process.is_alive():
        process.kill()
        process.join()
        pytest.fail("reading a damaged file did not end")
    assert process.exitcode == 0, f"reading a damaged file ended the process: {process.exitcode}"
    return json.loads(counted.read_text())


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A store of 9 small tiles in three batches, one of them unreadable, and the tiles."""
    monkeypatch.setattr(tile_store, "BATCH_TILES", 4)
    write_pyramid(tmp_path / "s.tiff", picture(96), mpp=0.5)
    with Slide(tmp_path / "s.tiff") as slide:
        grid = tile_slide(slide, TilingPolicy(tile_size_px=32, mpp=0.5, **ALL_TILES))
        read = slide.read_tile

        def failing(x, y, *arguments, **more):
            if (x, y) == (32, 32):
                raise TileReadError("s", x, y, ValueError("the disk is on fire"))
            return read(x, y, *arguments, **more)

        monkeypatch.setattr(slide, "read_tile", failing)

        def pack(version):
            if version == "1":
                monkeypatch.setattr(tile_store, "VERSION", "1")
                monkeypatch.setattr(tile_store, "seal", lambda path, column: None)
            pack_slide(slide, grid, tmp_path, quality=30)
            monkeypatch.setattr(tile_store, "VERSION", "2")
            path = store_path(tmp_path, "s")
            return path, tiles_of(path), grid, slide

        yield pack


def tiles_of(path):
    tiles = {}
    with StoredSlide(path) as stored:
        for row in range(len(stored)):
            out = np.zeros((32, 32, 3), dtype=np.uint8)
            try:
                stored.read_tile(row, out)
            except TileReadError:
                continue
            tiles[row] = out
        _ = stored.n_failed
    return tiles


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_store_with_a_changed_byte_is_never_read_wrongly(packed, version):
    path, whole, grid, slide = packed(version)
    assert len(grid) - len(whole) == 1

    def check(damaged):
        try:
            tiles = tiles_of(damaged)
            _ = damaged_rows(damaged), tile_store.store_problem(damaged, grid, slide.path)
        except StoreError as error:
            return "refused" if str(damaged) in str(error) else f"without its name: {error}"
        assert {*tiles} <= {*whole}
        assert all(np.array_equal(tiles[row], whole[row]) for row in tiles)
        return "read" if len(tiles) == len(whole) else "a tile refused"

    counts = damage_all(path, check)
    assert counts["refused"] > 1000
    assert {*counts} <= {"read", "refused", "a tile refused"}
    if version == "2":
        assert "read" not in counts  # every byte is covered by a checksum


def test_a_store_without_its_end_is_refused_at_every_length(packed):
    path, whole, *_ = packed("2")
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(StoreError):
            tiles_of(path)
    path.write_bytes(data)
    assert len(tiles_of(path)) == len(whole)


def bag():
    generator = torch.Generator().manual_seed(0)
    coords = torch.tensor([[x, y] for x in range(0, 1280, 256) for y in range(0, 768, 256)])
    return torch.randn(15, 6, generator=generator), coords


def all_of(path):
    """Everything that is read of a file of features, as plain values."""
    features, coords = read_features(path)
    places = read_places(path)
    about = read_about(path) if path.suffix == ".safetensors" else None
    told = None if places is None else (places[0].tolist(), places[1])
    return features.tolist(), None if coords is None else coords.tolist(), read_shape(path), about, told


def features_file(folder, suffix):
    path = folder / f"s{suffix}"
    features, coords = bag()
    if suffix == ".safetensors":
        write_features(path, features, coords, 256, {"encoder": "e", "slide": "123"})
    elif suffix == ".pt":
        torch.save({"features": features, "coords": coords}, path)
    elif suffix == "_old.pt":
        torch.save(features, path, _use_new_zipfile_serialization=False)
    else:
        with h5py.File(path, "w") as file:
            how = {"compression": "gzip", "chunks": (5, 6), "maxshape": (None, 6)} if suffix == "_packed.h5" else {}
            file.create_dataset("features", data=features.numpy(), **how)
            file.create_dataset("coords", data=coords.numpy()).attrs["patch_size_level0"] = 256
    return path


def what_comes(read, refusal, whole, damaged):
    """What comes of reading a damaged file: a refusal by its name, the values of the whole one, or others."""
    try:
        value = read(damaged)
    except refusal as error:
        return "refused" if str(damaged) in str(error) else f"without its name: {error}"
    return "read" if value == whole else "other values"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", "_old.pt", ".h5", "_packed.h5"])
def test_a_file_of_features_with_a_changed_byte_ends_no_process(suffix, tmp_path):
    path = features_file(tmp_path, suffix)
    whole = all_of(path)

    counts = damage_all(path, partial(what_comes, all_of, FeatureFileError, whole))
    # Ours, and torch's archives, have checksums; h5 files and torch's old files have none of their values.
    allowed = {"read", "refused"} if suffix in (".safetensors", ".pt") else {"read", "refused", "other values"}
    assert {*counts} <= allowed
    assert counts["refused"] > 100


def test_a_grid_with_a_changed_byte_is_refused_or_right(tmp_path):
    write_pyramid(tmp_path / "s.tiff", picture(300), mpp=0.5)
    with Slide(tmp_path / "s.tiff") as slide:
        grid = tile_slide(slide, TilingPolicy(tile_size_px=32, mpp=0.5, **ALL_TILES))
    path = tmp_path / "s.safetensors"
    write_grid(grid, path, Fingerprint(5, "abc"))

    def everything(place):
        grid_read = read_grid(place)
        values = {name: getattr(grid_read, name) for name in grid_read.__dataclass_fields__ if name != "coords"}
        return values, grid_read.coords.tolist(), read_slide_fingerprint(place)

    whole = everything(path)

    counts = damage_all(path, partial(what_comes, everything, SlideError, whole))
    assert {*counts} <= {"read", "refused"}
    assert counts["refused"] > 1000


def test_foreign_coordinates_with_a_changed_byte_end_no_process(tmp_path):
    write_pyramid(tmp_path / "s.tiff", picture(300), mpp=0.5)
    with Slide(tmp_path / "s.tiff") as slide:
        export_clam(tile_slide(slide, TilingPolicy(tile_size_px=32, mpp=0.5, **ALL_TILES)), tmp_path / "s.h5")

        def check(damaged):
            try:
                import_clam(damaged, slide)
            except SlideError as error:
                return "refused" if str(damaged) in str(error) else f"without its name: {error}"
            return "read"  # without a checksum other places on the slide are places

        counts = damage_all(tmp_path / "s.h5", check)
    assert {*counts} <= {"read", "refused"}


@pytest.mark.parametrize("suffix", [".png", ".geojson"])
def test_a_mask_with_a_changed_byte_ends_no_process(suffix, tmp_path):
    write_pyramid(tmp_path / "s.tiff", picture(300), mpp=0.5)
    tissue = np.zeros((30, 30), dtype=bool)
    tissue[5:20, 8:25] = True
    path = tmp_path / f"s{suffix}"
    with Slide(tmp_path / "s.tiff") as slide:
        if suffix == ".png":
            Image.fromarray(tissue).save(path)
        else:
            write_mask(path, tissue, 10, slide)
        whole = read_mask(MaskFile(path), slide, 10)
        assert np.array_equal(whole, tissue)

        def check(damaged):
            try:
                mask = read_mask(MaskFile(damaged), slide, 10)
            except SlideError as error:
                return "refused" if str(damaged) in str(error) else f"without its name: {error}"
            return "read" if np.array_equal(mask, whole) else "other values"

        counts = damage_all(path, check)
    # GeoJSON is text: another digit is another corner.
    assert {*counts} <= ({"read", "refused"} if suffix == ".png" else {"read", "refused", "other values"})


@pytest.mark.parametrize("kind", ["arrow", "feather", "parquet", "saved"])
def test_a_table_with_a_changed_byte_ends_no_process(kind, tmp_path):
    """Arrow believes its files: an offset that leads out of one ended the process."""
    table = pa.table({"slide_id": [f"s{number}" for number in range(6)], "label": ["a", "b"] * 3})
    path = tmp_path / f"m.{kind}"
    if kind == "saved":
        datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
        path = next((tmp_path / "saved").glob("*.arrow"))
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path, write_statistics=False)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, path, compression="uncompressed")
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)

    def check(damaged):
        target = damaged
        if kind == "saved":
            target = path.parent / "damaged"
            for name in ("state.json", "dataset_info.json"):
                shutil.copy(path.parent / name, target / name)
        try:
            read_table_file(target)
        except ManifestError as error:
            return "refused" if str(target) in str(error) else f"without its name: {error}"
        return "read"

    counts = damage_all(path, check)
    assert {*counts} <= {"read", "refused"}
    assert counts["refused"] > 200
