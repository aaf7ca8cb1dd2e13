"""What the direct reader reads, proves and keeps."""

import itertools
import os
import pickle
import threading

import numpy as np
import openslide
import pytest
from direct_cases import proved
from PIL import Image
from tiled_tiff import LONG, RGB, Kind, Page, picture, write_tiff

from ds_wsi.slides.demo import write_pyramid
from ds_wsi.slides.direct import jpeg_page
from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.proof import open_direct, prove
from ds_wsi.slides.direct.reader import DirectTiff
from ds_wsi.slides.direct.shrink import decoded_scale, read_shrunk, read_tile
from ds_wsi.slides.direct.tile_cache import TileCache
from ds_wsi.slides.slide import Slide

APERIO = b"Aperio Image Library v1\r\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "slide.tiff"


def test_levels_are_proved_against_openslides(path, tmp_path, monkeypatch):
    write_tiff(path, [Page((200, 120), absent=frozenset({5})), Page((100, 60))], Kind())
    assert proved(path) is None
    other = tmp_path / "other.tiff"
    for pages, words in (
        ([Page((200, 120))], "level sizes must be OpenSlide's, ((200, 120),), got ((200, 120), (100, 60))"),
        ([Page((200, 120)), Page((100, 60))], "level 0: pixels at (64, 64) must be OpenSlide's, got others"),
    ):
        write_tiff(other, pages, Kind())
        with openslide.OpenSlide(other) as handle, DirectTiff(path) as direct:
            assert prove(direct, handle) == words
    with openslide.OpenSlide(other) as handle:
        with pytest.raises(NotDirectError, match="must be OpenSlide's"):
            open_direct(path, handle)
        cache = TileCache()
        with open_direct(other, handle, cache) as direct:
            assert direct.level_dimensions == ((200, 120), (100, 60))
        assert len(cache) == 0
    write_tiff(other, [Page((200, 120)), Page((100, 60))], Kind(description=APERIO))
    with openslide.OpenSlide(other) as handle, DirectTiff(path) as direct:
        assert prove(direct, handle) == "vendor must be OpenSlide's, aperio, got generic-tiff"
    # A decoder whose bits differ on one level is found.
    decode = jpeg_page.decode
    monkeypatch.setattr(jpeg_page, "decode", lambda *arguments: np.maximum(decode(*arguments), 60))
    assert proved(path).startswith("level 0: pixels at (")


def test_a_slide_of_broken_tiles_alone_is_not_proved(path):
    places = write_tiff(path, [Page((64, 64))], Kind())
    content = bytearray(path.read_bytes())
    (offset, size), *_ = places[0]
    content[offset + size - 2 : offset + size] = b"\0\0"  # OpenSlide does without the end of a tile
    path.write_bytes(content)
    assert proved(path) == "level 0: a tile at least must be readable, got none of those that were tried"


def test_a_broken_tile_is_an_error_and_its_neighbours_are_read(path):
    places = write_tiff(path, [Page((192, 192))], Kind())
    content = bytearray(path.read_bytes())
    offset, size = places[0][4]
    content[offset + size // 2] ^= 0xFF
    content[offset + size // 2 + 1 : offset + size - 2] = bytes(size - 2 - size // 2 - 1)
    path.write_bytes(content)
    assert proved(path) is None
    with DirectTiff(path) as direct, Slide(path, mpp=0.5, reader="openslide") as slide:
        with pytest.raises(NotDirectError, match=r"tile \(1, 1\) of level 0 must be readable: JPEG must be whole, got"):
            direct.read_region(60, 60, 0, 8, 8)
        np.testing.assert_array_equal(direct.read_region(0, 0, 0, 64, 64), slide.read_tile(0, 0, 0, 64, 64))


def test_a_file_that_shrinks_while_it_is_open_is_an_error(path):
    places = write_tiff(path, [Page((192, 192))], Kind())
    with DirectTiff(path) as direct:
        os.truncate(path, places[0][5][0] + 10)
        direct.read_region(0, 0, 0, 64, 64)
        with pytest.raises(NotDirectError, match=r"tile \(2, 1\) of level 0 must be readable: file must hold bytes"):
            direct.read_region(128, 64, 0, 64, 64)


def test_an_aperio_files_absent_tiles_are_drawn_by_openslide(path):
    # Tile 3 of level 0 lies under tile 1 of level 1; tile 2 of level 1 is absent itself.
    pages = [Page((256, 256), absent=frozenset({3})), Page((128, 128), absent=frozenset({2}))]
    write_tiff(path, pages, Kind(description=APERIO, subsampling="444"))
    assert proved(path) is None
    with DirectTiff(path) as direct, Slide(path, mpp=0.5, reader="openslide") as slide:
        assert direct.vendor == "aperio"
        assert (direct.read_region(192, 0, 0, 64, 64) == 255).all()
        for x, y in ((128, 0), (0, 128)):
            with pytest.raises(NotDirectError, match="level 1 must be in the file, got none of its own"):
                direct.read_region(x, y, 1, 64, 64)
        np.testing.assert_array_equal(direct.read_region(128, 128, 1, 64, 64), slide.read_tile(128, 128, 1, 64, 64))


def test_regions_larger_than_openslides_pieces(path):
    write_tiff(path, [Page((4400, 40)), Page((2200, 20))], Kind())
    with openslide.OpenSlide(path) as handle, DirectTiff(path) as direct:
        for x, level, size in ((-30, 0, (4500, 33)), (200, 0, (4200, 20)), (-4, 1, (4200, 9))):
            rgba = np.asarray(handle.read_region((x, -2), level, size))
            expected = np.where(rgba[..., 3:] == 0, 255, rgba[..., :3])
            np.testing.assert_array_equal(direct.read_region(x, -2, level, *size), expected)


def test_before_the_first_pixel_places_are_rounded_as_openslide_rounds_them(path):
    write_tiff(path, [Page((200, 120)), Page((100, 60))], Kind(subsampling="444"))
    with openslide.OpenSlide(path) as handle, DirectTiff(path) as direct:
        for x, y in itertools.product(range(-4, 1), repeat=2):
            rgba = np.asarray(handle.read_region((x, y), 1, (20, 20)))
            expected = np.where(rgba[..., 3:] == 0, 255, rgba[..., :3])
            np.testing.assert_array_equal(direct.read_region(x, y, 1, 20, 20), expected)


def test_wrong_arguments_are_told(path):
    write_tiff(path, [Page((64, 64))], Kind())
    with DirectTiff(path) as direct:
        for arguments, words in (
            ((0, 0, 1, 8, 8), r"level must be in \[0, 1\), got 1"),
            ((0, 0, 0, 8, 0), "region must have at least 1 px, got 8 x 0"),
            ((0, 0, 0, 8, 8, 3), "scale must be 1, 2, 4 or 8 and divide the region, got 3"),
            ((0, 0, 0, 9, 8, 2), "scale must be 1, 2, 4 or 8 and divide the region, got 2"),
        ):
            with pytest.raises(ValueError, match=words):
                direct.read_region(*arguments)
    with pytest.raises(NotDirectError, match="must be open"):
        direct.read_region(0, 0, 0, 8, 8)


def test_between_pixels_of_a_level_openslide_interpolates(path):
    write_tiff(path, [Page((203, 150)), Page((101, 75))], Kind())
    with DirectTiff(path) as direct:
        assert direct.level_downsamples[1] == (203 / 101 + 2) / 2
        with pytest.raises(NotDirectError, match="must begin on a pixel of its level, got 49"):
            direct.read_region(100, 0, 1, 8, 8)


def test_a_place_very_near_to_a_pixel_is_that_pixel(path):
    # A downsample of 2.00025: places drift from the pixels, slowly.
    write_tiff(path, [Page((4001, 32), (64, 16)), Page((2000, 16), (64, 16))], Kind(subsampling="444"))
    n_read = 0
    with openslide.OpenSlide(path) as handle, DirectTiff(path) as direct:
        for x in range(0, 200):
            try:
                pixels = direct.read_region(x, 0, 1, 70, 16)
            except NotDirectError:
                continue
            n_read += 1
            np.testing.assert_array_equal(pixels, np.asarray(handle.read_region((x, 0), 1, (70, 16)).convert("RGB")))
    assert 10 < n_read < 20


def test_levels_are_found_as_openslide_finds_them(path):
    pages = [Page((200, 100)), Page((50, 25)), Page((100, 50)), Page((25, 12), tags={254: (LONG, [0])})]
    write_tiff(path, pages, Kind())
    assert proved(path) is None
    with DirectTiff(path) as direct:
        assert direct.dimensions == (200, 100)
        assert direct.level_dimensions == ((200, 100), (100, 50), (50, 25))
    # An Aperio file's are all that are in tiles, in their order, and a larger one behind another is none.
    write_tiff(path, [pages[0], pages[2], pages[3]], Kind(description=APERIO))
    assert proved(path) is None
    with DirectTiff(path) as direct:
        assert direct.level_dimensions == ((200, 100), (100, 50), (25, 12))
    write_tiff(path, [pages[0], pages[1], pages[2]], Kind(description=APERIO))
    with pytest.raises(NotDirectError, match="levels must be ever smaller, got a larger one behind another"):
        DirectTiff(path)


def test_kept_tiles_are_bounded_shared_and_let_go(path, tmp_path):
    write_tiff(path, [Page((256, 128))], Kind())
    tile_bytes = 64 * 64 * 3
    cache = TileCache(3 * tile_bytes)
    with DirectTiff(path, cache) as one, DirectTiff(path, cache) as other:
        for x in (1, 65, 129):
            one.read_region(x, 1, 0, 8, 8)
        assert (len(cache), cache.n_bytes) == (3, 3 * tile_bytes)
        other.read_region(1, 1, 0, 8, 8)
        assert (len(cache), cache.n_bytes) == (3, 3 * tile_bytes)
        read = []
        one.file.read = lambda offset, n_bytes: read.append(offset)
        one.read_region(129, 1, 0, 8, 8)  # kept
        assert not read
        with pytest.raises(AttributeError):
            one.read_region(1, 1, 0, 8, 8)  # the oldest, which went
    assert (len(cache), cache.n_bytes) == (0, 0)
    cache.put((0, 0, 0, 1, "box"), np.zeros((64, 64, 4), dtype=np.uint8))  # as large as may be, and kept twice
    cache.put((0, 0, 0, 1, "box"), np.zeros((64, 64, 3), dtype=np.uint8))
    assert cache.n_bytes == tile_bytes
    cache.put((0, 0, 1, 1, "box"), np.zeros((65, 64, 9), dtype=np.uint8))  # larger than all that may be kept
    assert (len(cache), cache.n_bytes) == (1, tile_bytes)
    assert len(pickle.loads(pickle.dumps(cache))) == 0
    with pytest.raises(ValueError, match="max_bytes must be at least 0, got -1"):
        TileCache(-1)


def test_threads_and_a_forked_process_read_the_same(path):
    write_tiff(path, [Page((512, 512))], Kind(subsampling="444"))
    regions = [(int(x), int(y), 0, 50, 70) for x, y in np.random.default_rng(0).integers(-20, 500, (60, 2))]
    with DirectTiff(path) as direct:
        expected = [direct.read_region(*region) for region in regions]
    different = []
    with DirectTiff(path, TileCache(10 * 64 * 64 * 3)) as direct:

        def read():
            for region, pixels in zip(regions, expected):
                if not np.array_equal(direct.read_region(*region), pixels):
                    different.append(region)

        child = os.fork()
        if not child:
            read()
            os._exit(len(different))
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not different
        assert os.waitpid(child, 0)[1] == 0


def read_by_dct(direct, x, y, read_px, tile_px):
    out = np.empty((tile_px, tile_px, 3), dtype=np.uint8)
    scale = decoded_scale("dct", read_px, tile_px)
    assert scale > 1
    return read_shrunk(direct, x, y, 0, read_px, scale, out)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_shrinking_as_it_is_decoded_is_the_mean_of_the_pixels(path, factor):
    # Neither colours at half resolution nor values that are cut at 0 or 255: what is left are roundings.
    write_tiff(path, [Page((512, 256), contrast=0.5)], Kind(photometric=RGB, subsampling="444", quality=90))
    with DirectTiff(path) as direct, Slide(path, mpp=0.5, reader="openslide") as slide:
        full = slide.read_tile(128, 0, 0, 256, 256).astype(np.float64)
        assert full.min() > 0
        assert full.max() < 255
        side = 256 // factor
        means = full.reshape(side, factor, side, factor, 3).mean(axis=(1, 3))
        shrunk = read_by_dct(direct, 128, 0, 256, side)
        assert np.abs(shrunk - means).max() <= 1
        # One and a half times more: the rest is averaged.
        smaller = side * 2 // 3
        rest = Image.fromarray(np.rint(means).astype(np.uint8)).resize((smaller, smaller), Image.Resampling.BOX)
        assert np.abs(read_by_dct(direct, 128, 0, 256, smaller) - np.asarray(rest, dtype=int)).max() <= 1


def test_pixels_are_averaged_as_openslides_are(path):
    write_pyramid(path, picture(300, 420), mpp=0.5)
    with DirectTiff(path) as direct, Slide(path, reader="openslide") as slide:
        for x, y, read_px, tile_px in ((3, 0, 128, 64), (0, 2, 128, 32), (0, 0, 100, 100), (350, 0, 128, 64)):
            expected = slide.read_tile(x, y, 0, read_px, tile_px)
            np.testing.assert_array_equal(read_tile(direct, x, y, 0, read_px, tile_px), expected)


def test_a_real_slide_is_read_as_openslide_reads_it(shared_data):
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    assert proved(path) is None
    with DirectTiff(path) as direct, Slide(path, reader="openslide") as slide:
        for y in range(0, 2967, 256):
            for x in range(0, 2220, 512):
                np.testing.assert_array_equal(read_tile(direct, x, y, 0, 256, 256), slide.read_tile(x, y, 0, 256, 256))
        shrunk = np.stack([read_by_dct(direct, x, 512, 512, 256) for x in (0, 512, 1024)]).astype(int)
        boxes = np.stack([slide.read_tile(x, 512, 0, 512, 256) for x in (0, 512, 1024)])
        assert 0 < np.abs(shrunk - boxes).mean() < 0.5
    with pytest.raises(NotDirectError, match="compression must be 7, got 33005"):
        DirectTiff(shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs")


def test_files_broken_in_many_ways_are_refused_or_read_alike(shared_data):
    outcomes = {}
    for path in sorted((shared_data / "broken").iterdir()):
        try:
            DirectTiff(path).close()
            outcomes[path.name] = proved(path)
        except NotDirectError as error:
            outcomes[path.name] = str(error)
    assert outcomes == {
        "boxes.tiff": "compression must be 7, got 8 (directory 0)",
        "broken.svs": "file must be a TIFF, got another format",
        "small.svs": None,
        "unopenable.tiff": "compression must be 7, got 52479 (directory 0)",
    }
