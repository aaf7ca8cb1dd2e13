"""Tiles that are shrunk as their JPEG is decoded, against Pillow's decoder, and where that is refused."""

import io
import math

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image
from random_tiffs import APERIO, FEW, MANY, cases
from tiled_tiff import Kind, Page, write_tiff

from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.manifest import ManifestError
from ds_wsi.bags.slide_policy import SlidePolicy
from ds_wsi.config import read_section
from ds_wsi.slides.coords import read_grid, write_grid
from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.reader import DirectTiff
from ds_wsi.slides.direct.shrink import decoded_scale
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.slides.slide import Slide, SlideError, TileReadError
from ds_wsi.slides.tile_store import StoredSlide, pack_slide, store_path, store_problem
from ds_wsi.slides.tiling import tile_slide
from ds_wsi.training import same_run


@pytest.fixture
def path(tmp_path):
    return tmp_path / "slide.tiff"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiffs")


def shrunk_level(direct, number, scale):
    """uint8 [H, W, 3]: the level at 1 / scale, each tile decoded by Pillow."""
    page = direct.levels[number].page
    tile_width, tile_height = page.tile_width_px // scale, page.tile_height_px // scale
    picture = np.full((page.rows * tile_height, page.columns * tile_width, 3), 255, dtype=np.uint8)
    for index in range(page.rows * page.columns):
        jpeg = page.jpeg(direct.file, index)
        if jpeg is not None:
            image = Image.open(io.BytesIO(jpeg))
            image.draft("RGB", (tile_width, tile_height))
            assert image.size == (tile_width, tile_height)
            row, column = divmod(index, page.columns)
            window = slice(row * tile_height, (row + 1) * tile_height), slice(column * tile_width, None)
            picture[window][:, :tile_width] = np.asarray(image.convert("RGB"))
    return picture[: math.ceil(page.height_px / scale), : math.ceil(page.width_px / scale)]


def plain_tile(picture, downsample, x, y, read_px, tile_px, scale):
    """What a tile must be: a square of the shrunk level, white outside, averaged to its size."""
    side = int(read_px / scale + 0.5)
    left, top = (math.floor(at / downsample / scale + 0.5) for at in (x, y))
    around = Image.new("RGB", (side, side), "white")
    around.paste(Image.fromarray(picture), (-left, -top))
    return np.asarray(around if side == tile_px else around.resize((tile_px, tile_px), Image.Resampling.BOX))


def shrunk_as_by_pillow(folder, slide, data):
    kind, pages = slide
    path = folder / "random.tiff"
    write_tiff(path, pages, kind)
    with Slide(path, mpp=0.5) as slide, DirectTiff(path) as direct:
        levels = {}
        for _ in range(4):
            number = data.draw(st.integers(0, len(pages) - 1))
            x, y = (data.draw(st.integers(-20, side + 10)) for side in direct.dimensions)
            tile_px, finer = data.draw(st.integers(1, 20)), data.draw(st.sampled_from([2, 2.4, 3, 4, 5.1, 8, 17]))
            read_px = math.ceil(tile_px * finer)
            scale = decoded_scale("dct", read_px, tile_px)
            assert scale == max(s for s in (2, 4, 8) if s <= read_px / tile_px)
            arguments = x, y, number, read_px, tile_px
            try:
                slide.require_shrink("dct", *arguments[2:])
            except SlideError as error:
                refused = str(error)
            else:
                refused = ""
            if kind.description != APERIO or not direct.levels[number].redrawn.any():
                assert not refused
            else:
                # Where all tiles that were tried are drawn so, there was none to compare.
                reasons = ("which OpenSlide draws from the level below", "a tile at least must be readable, got none")
                assert any(reason in refused for reason in reasons)
                continue
            tile = slide.read_tile(*arguments, shrink="dct")
            if (number, scale) not in levels:
                levels[number, scale] = shrunk_level(direct, number, scale)
            downsample = direct.levels[number].downsample
            np.testing.assert_array_equal(
                tile, plain_tile(levels[number, scale], downsample, x, y, read_px, tile_px, scale)
            )


@cases(FEW)
def test_random_tiffs_are_shrunk_as_pillow_decodes_them(folder, slide, data):
    shrunk_as_by_pillow(folder, slide, data)


@pytest.mark.slow
@cases(MANY)
def test_many_random_tiffs_are_shrunk_as_pillow_decodes_them(folder, slide, data):
    shrunk_as_by_pillow(folder, slide, data)


def test_less_than_twice_as_fine_is_averaged_whoever_reads(path):
    write_tiff(path, [Page((400, 300))], Kind())
    with Slide(path, mpp=0.5) as slide, Slide(path, mpp=0.5, reader="openslide") as by_openslide:
        for read_px, tile_px in ((64, 64), (127, 64), (102, 64), (32, 64)):
            by_openslide.require_shrink("dct", 0, read_px, tile_px)
            expected = slide.read_tile(10, 20, 0, read_px, tile_px)
            for one in (slide, by_openslide):
                np.testing.assert_array_equal(one.read_tile(10, 20, 0, read_px, tile_px, shrink="dct"), expected)
        assert not np.array_equal(slide.read_tile(0, 0, 0, 128, 64, shrink="dct"), slide.read_tile(0, 0, 0, 128, 64))


def test_slides_that_are_not_read_directly_are_refused(path, tmp_path):
    write_tiff(path, [Page((400, 300))], Kind())
    policy = TilingPolicy(tile_size_px=64, mpp=1.0, tissue="none", shrink="dct")
    with Slide(path, mpp=0.5, slide_id="S-001", reader="openslide") as slide:
        with pytest.raises(
            SlideError, match=r"read directly to be shrunk by dct, got: --slide_reader openslide \(slide S"
        ):
            tile_slide(slide, policy)
        with pytest.raises(TileReadError, match="must be read directly to be shrunk by dct, got --slide_reader"):
            slide.read_tile(0, 0, 0, 128, 64, shrink="dct")
    grey = {262: (3, [1])}
    write_tiff(path, [Page((400, 300), tags=grey)], Kind())
    with (
        Slide(path, mpp=0.5) as slide,
        pytest.raises(SlideError, match="got: photometric interpretation must be 2 or 6"),
    ):
        tile_slide(slide, policy)
    Image.new("RGB", (400, 300)).save(tmp_path / "plain.png")
    plain = Slide(tmp_path / "plain.png", mpp=0.5)
    with plain as slide, pytest.raises(SlideError, match="got: an image that is no tiled TIFF"):
        tile_slide(slide, policy)
    pages = [Page((256, 256), absent=frozenset({3})), Page((128, 128))]
    write_tiff(path, pages, Kind(description=APERIO, subsampling="444"))
    with Slide(path, mpp=0.25) as slide, pytest.raises(SlideError, match="tiles of level 1 that the file has not"):
        tile_slide(slide, TilingPolicy(tile_size_px=16, mpp=1.0, tissue="none", shrink="dct"))


def test_a_broken_tile_is_an_error_and_never_averaged(path):
    places = write_tiff(path, [Page((192, 192))], Kind())
    content = bytearray(path.read_bytes())
    offset, size = places[0][1]
    content[offset + size // 2 : offset + size - 2] = b"\xff" * (size - 2 - size // 2)
    path.write_bytes(content)
    with Slide(path, mpp=0.5) as slide:
        with pytest.raises(TileReadError, match=r"tile \(1, 0\) of level 0 must be readable"):
            slide.read_tile(64, 0, 0, 64, 32, shrink="dct")
        slide.read_tile(64, 64, 0, 64, 32, shrink="dct")
    with DirectTiff(path) as direct, pytest.raises(NotDirectError, match="sides of multiples of 128 px, got 64 x 64"):
        direct.read_shrunk(0, 0, 0, 8, 8, 128)


def test_a_checkpoint_without_it_was_of_box(monkeypatch, tmp_path):
    saved = {"tiling": {"mpp": 1.0}}
    monkeypatch.setattr(same_run, "read_state", lambda _: {"fingerprint": saved})
    same_run.require_same({"tiling": {"mpp": 1.0, "shrink": "box"}}, tmp_path)
    with pytest.raises(ValueError, match=r"must be the checkpoint's, .*shrink.*box.*got .*dct"):
        same_run.require_same({"tiling": {"mpp": 1.0, "shrink": "dct"}}, tmp_path)


def test_a_model_without_it_is_evaluated_by_box():
    assert read_section({"tiling": {"tile_size_px": 64, "mpp": 1.0}}).tiling.shrink == "box"
    assert read_section({"tiling": {"tile_size_px": 64, "shrink": "dct"}}).tiling.shrink == "dct"


def test_every_slide_of_a_cohort_that_cannot_be_shrunk_is_listed(tmp_path):
    lines = ["slide_id,path,label,mpp"]
    for name, how in (("direct", {}), ("grey", {262: (3, [1])}), ("ink", {262: (3, [1])})):
        write_tiff(tmp_path / f"{name}.tiff", [Page((400, 300), tags=how)], Kind())
        lines.append(f"{name},{name}.tiff,{len(how)},0.5")
    (tmp_path / "slides.csv").write_text("\n".join(lines))
    policy = TilingPolicy(tile_size_px=64, mpp=1.0, tissue="none", shrink="dct")
    folder = tmp_path / "tiles"
    # Kept grids too: of the same policy they were made where the slides could be read.
    for _ in range(2):
        with pytest.raises(ManifestError, match="2 problems") as caught:
            load_cohort(tmp_path / "slides.csv", policy, tiles_dir=folder, need_splits=False)
        assert all(words in str(caught.value) for words in ("(slide grey", "(slide ink", "--shrink box"))
    reader = SlidePolicy(reader="openslide")
    with pytest.raises(ManifestError, match="3 problems") as caught:
        load_cohort(tmp_path / "slides.csv", policy, tiles_dir=folder, need_splits=False, slides=reader)
    assert "(slide direct" in str(caught.value)


def test_grids_and_stores_say_how_their_tiles_are_shrunk(path, tmp_path):
    write_tiff(path, [Page((400, 300))], Kind())
    grids = {}
    with Slide(path, mpp=0.5) as slide:
        for shrink in ("box", "dct"):
            grids[shrink] = tile_slide(slide, TilingPolicy(tile_size_px=64, mpp=1.0, tissue="none", shrink=shrink))
            write_grid(grids[shrink], tmp_path / "grid.safetensors")
            assert read_grid(tmp_path / "grid.safetensors").policy.shrink == shrink
            pack_slide(slide, grids[shrink], tmp_path / shrink, quality=100)
        other = {"box": "dct", "dct": "box"}
        for shrink, grid in grids.items():
            x, y = grid.coords[1].tolist()
            ways = (slide.read_tile(x, y, 0, 128, 64, shrink=one) for one in (shrink, other[shrink]))
            expected, different = (pixels.astype(int) for pixels in ways)
            store = store_path(tmp_path / shrink, grid.slide_id)
            with StoredSlide(store) as stored:
                tile = np.empty((64, 64, 3), dtype=np.uint8)
                stored.read_tile(1, tile)
            assert np.abs(tile - expected).mean() < np.abs(tile - different).mean()
            assert store_problem(store, grid, path) is None
            words = f"tile store's shrink must be that of the cohort, {other[shrink]}, got {shrink}"
            assert words in store_problem(store, grids[other[shrink]], path)
    with pytest.raises(ValueError, match="shrink must be one of box, dct, got 'fft'"):
        TilingPolicy(shrink="fft")
