import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from tiled_tiff import Kind, Page, write_tiff

from ds_wsi.bags.bag import BagPart, FailureLog, read_bags
from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.manifest import ManifestError
from ds_wsi.bags.packing import pack_cohort, require_store
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.cli import main
from ds_wsi.slides import jpeg_tiles
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.slides.pyramid import write_pyramid
from ds_wsi.slides.slide import Slide, TileReadError
from ds_wsi.slides.tile_store import StoredSlide, StoreError, TileStore, damaged_rows, pack_slide, store_path
from ds_wsi.slides.tiling import tile_slide

ALL_TILES = {"min_tissue_fraction": 0.0, "use_saturation": False, "grey_range": (0, 255)}


def picture(side_px=600, seed=0):
    """Smooth colours with some grain, as tissue has: JPEG of noise alone would be of no quality."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(60, 220, (12, 12, 3), dtype=np.uint8)).resize((side_px, side_px))
    return np.clip(np.asarray(smooth) + rng.normal(0, 3, (side_px, side_px, 1)), 0, 255).astype(np.uint8)


@pytest.fixture
def slide(tmp_path):
    write_pyramid(tmp_path / "s.tiff", picture(1100), mpp=0.5)
    with Slide(tmp_path / "s.tiff") as opened:
        yield opened


def grid_of(slide, tile_size_px=256, mpp=0.5):
    return tile_slide(slide, TilingPolicy(tile_size_px=tile_size_px, mpp=mpp, **ALL_TILES))


def tiles_of(slide, grid):
    return [slide.read_tile(int(x), int(y), grid.level, grid.read_size_px, grid.tile_size_px) for x, y in grid.coords]


def stored_tiles(path, grid):
    with StoredSlide(path) as stored:
        out = np.zeros((len(grid), grid.tile_size_px, grid.tile_size_px, 3), dtype=np.uint8)
        # In an order of its own: access is by row.
        for row in np.random.default_rng(0).permutation(len(grid)):
            stored.read_tile(int(row), out[row])
        return out


def column(path, name):
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        return stream.read_all()[name].to_pylist()


@pytest.mark.parametrize("mpp", [0.5, 1.0])
def test_the_slides_own_jpeg_tiles_are_copied_and_decode_to_openslides_pixels(slide, tmp_path, mpp):
    grid = grid_of(slide, mpp=mpp)
    assert grid.level == (mpp == 1.0)
    assert pack_slide(slide, grid, tmp_path / "store")
    path = store_path(tmp_path / "store", "s")
    assert all(column(path, "copied"))
    assert np.array_equal(stored_tiles(path, grid), tiles_of(slide, grid))
    assert list(zip(column(path, "x"), column(path, "y"))) == [tuple(xy) for xy in grid.coords.tolist()]


def test_tiles_are_compared_with_openslides_pixels_and_not_with_a_direct_readers(slide, monkeypatch):
    grid = grid_of(slide)
    decode, read_tile = jpeg_tiles.decode, slide.read_tile
    monkeypatch.setattr(jpeg_tiles, "decode", lambda *given: 255 - decode(*given))
    monkeypatch.setattr(slide, "read_tile", lambda *given: 255 - read_tile(*given))  # with the decoder's fault
    assert jpeg_tiles.JpegTiles.of(slide, grid) is None


def test_a_tile_of_broken_codes_is_not_copied(tmp_path):
    places = write_tiff(tmp_path / "s.tiff", [Page((256, 256))], Kind())
    content = bytearray((tmp_path / "s.tiff").read_bytes())
    offset, size = places[0][5]
    # Decoders that only warn of a code that cannot be would go on with wrong pixels.
    content[offset + size // 2 : offset + size - 2] = bytes(size - 2 - size // 2)
    (tmp_path / "s.tiff").write_bytes(content)
    with Slide(tmp_path / "s.tiff", mpp=0.5) as slide:
        grid = grid_of(slide, 64)
        pack_slide(slide, grid, tmp_path / "store")
    path = store_path(tmp_path / "store", "s")
    assert column(path, "copied") == [row != 5 for row in range(16)]
    (reason,) = [reason for reason in column(path, "reason") if reason]
    assert "Corrupt JPEG data" in reason


@pytest.mark.parametrize(("tile_size_px", "mpp"), [(240, 0.5), (64, 0.5), (128, 0.7)])
def test_other_tiles_are_encoded_at_the_stated_quality(slide, tmp_path, tile_size_px, mpp):
    grid = grid_of(slide, tile_size_px, mpp)
    tiles = np.array(tiles_of(slide, grid), dtype=int)
    errors = []
    for quality in (50, 90):
        pack_slide(slide, grid, tmp_path / str(quality), quality)
        path = store_path(tmp_path / str(quality), "s")
        assert not any(column(path, "copied"))
        with StoredSlide(path) as stored:
            assert stored.header["quality"] == quality
        errors.append(np.abs(stored_tiles(path, grid) - tiles).mean())
    assert errors[1] < 1.5
    assert errors[1] < errors[0]


def test_a_packed_slide_is_kept_and_anything_else_is_packed_anew(slide, tmp_path):
    grid, path = grid_of(slide), store_path(tmp_path, "s")
    assert pack_slide(slide, grid, tmp_path)
    assert not pack_slide(slide, grid, tmp_path)
    assert pack_slide(slide, grid, tmp_path, quality=80)
    assert pack_slide(slide, grid_of(slide, 128), tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert pack_slide(slide, grid_of(slide, 128), tmp_path, quality=90)
    assert len(StoredSlide(path)) == len(grid_of(slide, 128))
    with pytest.raises(ValueError, match=r"JPEG quality must be in \[1, 100\], got 0"):
        pack_slide(slide, grid, tmp_path, quality=0)


def test_large_slides_are_written_in_batches_and_read_across_them(slide, tmp_path, monkeypatch):
    monkeypatch.setattr("ds_wsi.slides.tile_store.BATCH_TILES", 3)
    grid = grid_of(slide)
    assert len(grid) == 16
    pack_slide(slide, grid, tmp_path)
    assert np.array_equal(stored_tiles(store_path(tmp_path, "s"), grid), tiles_of(slide, grid))
    with StoredSlide(store_path(tmp_path, "s")) as stored, pytest.raises(IndexError, match="row must be in"):
        stored.jpeg(16)


def test_a_flipped_bit_is_found_at_reading_named_and_repaired(slide, tmp_path):
    grid, path = grid_of(slide), store_path(tmp_path, "s")
    pack_slide(slide, grid, tmp_path)
    with StoredSlide(path) as stored:
        offset = path.read_bytes().index(bytes(stored.jpeg(5)))
    assert damaged_rows(path) == []
    data = bytearray(path.read_bytes())
    data[offset + 500] ^= 4
    path.write_bytes(data)
    assert damaged_rows(path) == [5]
    x, y = grid.coords[5]
    with StoredSlide(path) as stored:
        out = np.zeros((256, 256, 3), dtype=np.uint8)
        stored.read_tile(4, out)
        with pytest.raises(TileReadError, match=rf"tile at \({x}, {y}\) of slide s must be .*CRC-32 must be .*HINT"):
            stored.read_tile(5, out)
    assert not pack_slide(slide, grid, tmp_path)
    assert pack_slide(slide, grid, tmp_path, verify=True)
    assert damaged_rows(path) == []


def test_tiles_that_cannot_be_read_are_recorded_with_the_reason(slide, tmp_path, monkeypatch):
    grid = grid_of(slide, 240)
    read = slide.read_tile

    def failing(x, y, *arguments, **more):
        if (x, y) == (240, 0):
            raise TileReadError("s", x, y, ValueError("the disk is on fire"))
        return read(x, y, *arguments, **more)

    monkeypatch.setattr(slide, "read_tile", failing)
    pack_slide(slide, grid, tmp_path)
    with StoredSlide(store_path(tmp_path, "s")) as stored:
        assert (stored.n_failed, len(stored)) == (1, len(grid))
        with pytest.raises(TileReadError, match=r"\(240, 0\) of slide s must be readable, got the disk is on fire"):
            stored.read_tile(1, np.zeros((240, 240, 3), dtype=np.uint8))


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "a.arrow").write_bytes(b"nothing")
    with pytest.raises(StoreError, match="must be a whole Arrow file, got"):
        StoredSlide(tmp_path / "a.arrow")
    table = pa.table({"x": [1]})
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    with pytest.raises(StoreError, match=r"must be of format ds_wsi\.TileStore 1 or 2, got another"):
        StoredSlide(tmp_path / "b.arrow")


def test_the_file_opens_with_datasets(slide, tmp_path):
    import datasets

    grid = grid_of(slide)
    pack_slide(slide, grid, tmp_path)
    loaded = datasets.Dataset.from_file(str(store_path(tmp_path, "s")))
    assert len(loaded) == len(grid)
    assert loaded[3]["jpeg"][:2] == b"\xff\xd8"


def test_open_files_are_bounded_and_do_not_travel_to_workers(slide, tmp_path):
    grid = grid_of(slide)
    pack_slide(slide, grid, tmp_path)
    for name in "abc":
        store_path(tmp_path, name).write_bytes(store_path(tmp_path, "s").read_bytes())
    store = TileStore(tmp_path, max_open=2)
    for name in "abcab":
        assert len(store.get(name)) == len(grid)
    assert len(store._open) == 2
    assert len(pickle.loads(pickle.dumps(store))._open) == 0


@pytest.fixture
def cohort(demo_manifest, tmp_path):
    return load_cohort(demo_manifest, TilingPolicy(tile_size_px=64), tiles_dir=tmp_path / "grids")


def bags_of(cohort, policy, order):
    failures = FailureLog(cohort.manifest.slides, cohort.grids, 0.0)
    return list(read_bags(cohort.manifest.slides, cohort.grids, order, policy, failures))


@pytest.mark.parametrize("workers", [0, 1])
def test_bags_from_a_store_are_the_bags_of_the_slides(cohort, tmp_path, workers):
    pack_cohort(cohort, tmp_path / "store")
    order = [3, BagPart(0, 0, 3, (1, 4, 5)), 1]
    from_store = bags_of(cohort, ReadPolicy(workers=workers, tile_store=str(tmp_path / "store")), order)
    from_slides = bags_of(cohort, ReadPolicy(workers=0), order)
    for bag, other in zip(from_store, from_slides, strict=True):
        assert bag.slide == other.slide
        assert bag.kept.tolist() == other.kept.tolist()
        assert bag.tiles.shape == other.tiles.shape
        assert (bag.tiles.int() - other.tiles.int()).abs().float().mean() < 2


def test_every_slide_that_a_store_lacks_is_listed(cohort, tmp_path):
    store = tmp_path / "store"
    slides = cohort.manifest.slides
    pack_cohort(cohort, store)
    require_store(str(store), slides, cohort.grids)
    require_store("", slides, cohort.grids)
    ids = [slide.slide_id for slide in slides]
    store_path(store, ids[1]).unlink()
    store_path(store, ids[2]).write_bytes(b"torn")
    store_path(store, ids[4]).write_bytes(store_path(store, ids[3]).read_bytes())
    with pytest.raises(ManifestError) as caught:
        require_store(str(store), slides, cohort.grids)
    assert len(caught.value.problems) == 3
    for problem, words in zip(caught.value.problems, ("got no file", "whole Arrow file", "must be that of the cohort")):
        assert words in problem
        assert "HINT: pack it again" in problem


SLOWLY = """
import sys, time
from ds_wsi.cli import main
from ds_wsi.slides import tile_store
encode = tile_store._encode
def slow(*arguments):
    time.sleep(0.02)
    return encode(*arguments)
tile_store._encode = slow
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_packing_goes_on_without_a_lost_or_doubled_tile(demo_manifest, cohort, tmp_path, capsys):
    store = tmp_path / "store"
    arguments = ["tile", "--manifest", str(demo_manifest), "--tile_size_px", "64"]
    arguments += ["--output_dir", str(tmp_path / "grids"), "--store", str(store)]
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, *arguments], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    # Within a slide: one is whole, the next is being written.
    while not (list(store.glob("[!.]*.arrow")) and list(store.glob(".ds_wsi-*.tmp/*.arrow"))):
        assert process.poll() is None, "the packing ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    whole = {path: path.stat().st_mtime_ns for path in store.glob("[!.]*.arrow")}
    assert 0 < len(whole) < len(cohort.grids)
    assert main(arguments) == 0
    assert f"{len(cohort.grids) - len(whole)} slides packed now, 0 tiles unreadable" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    assert not list(store.glob(".*")), "a half-written file was left"
    for grid in cohort.grids:
        path = store_path(store, grid.slide_id)
        assert list(zip(column(path, "x"), column(path, "y"))) == [tuple(xy) for xy in grid.coords.tolist()]
        assert damaged_rows(path) == []
    assert main([*arguments, "--verify"]) == 0
    assert "0 slides packed now" in capsys.readouterr().out


def test_training_and_evaluation_read_from_a_store(demo_manifest, cohort, tmp_path, monkeypatch, capsys):
    pack_cohort(cohort, tmp_path / "store")
    monkeypatch.setattr(Slide, "read_tile", None)  # nothing is read from the slides
    shared = ["--manifest", str(demo_manifest), "--tile-store", str(tmp_path / "store")]
    options = ["--tile_size_px", "64", "--encoder", "resnet10t", "--num_train_epochs", "1", "--tiles_dir"]
    options += [str(tmp_path / "grids"), "--dataloader_num_workers", "0", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *shared, *options]) == 0
    evaluate = ["evaluate", "--model", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out"), *shared]
    evaluate += ["--tiles_dir", str(tmp_path / "grids")]  # tiling anew would try some tiles of each slide
    assert main([*evaluate, "--dataloader_num_workers", "0"]) == 0
    store_path(tmp_path / "store", cohort.grids[0].slide_id).unlink()
    assert main(["train", *shared, *options[:-1], str(tmp_path / "other")]) == 2
    assert "tile store must hold every slide" in capsys.readouterr().err


def test_real_slides_tiles_are_copied_where_they_are_jpeg(shared_data, tmp_path):
    with Slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        grid = tile_slide(slide, TilingPolicy(tile_size_px=240, mpp=0.499))
        pack_slide(slide, grid, tmp_path)
        path = store_path(tmp_path, grid.slide_id)
        assert all(column(path, "copied"))  # tables apart from the tiles, RGB without a marker, chroma halved
        assert np.array_equal(stored_tiles(path, grid), tiles_of(slide, grid))
    with Slide(shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs", mpp=0.25) as slide:  # JPEG 2000
        grid = tile_slide(slide, TilingPolicy(mpp=0.25))
        pack_slide(slide, grid, tmp_path)
        assert not any(column(store_path(tmp_path, grid.slide_id), "copied"))
