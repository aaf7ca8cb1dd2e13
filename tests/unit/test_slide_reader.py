"""What `Slide` reads directly: the pixels and errors of a `Slide` that reads by OpenSlide alone."""

import os
import pickle
import shutil

import numpy as np
import openslide
import pytest
from hypothesis import strategies as st
from random_tiffs import APERIO, FEW, MANY, cases
from tiled_tiff import Kind, Page, write_tiff

from ds_wsi.runtime.log import logger
from ds_wsi.slides.direct import proved
from ds_wsi.slides.direct.proof import prove_level
from ds_wsi.slides.direct.reader import DirectTiff
from ds_wsi.slides.direct.tile_cache import TileCache
from ds_wsi.slides.slide import Slide, SlideCache, SlideError, TileReadError

TWO_LEVELS = [Page((400, 300)), Page((200, 150))]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "slide.tiff"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiffs")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(proved, "_known", {})
    monkeypatch.setattr(proved, "_facts", {})
    monkeypatch.setattr(proved, "_told", bytearray(1))


@pytest.fixture
def read_directly(monkeypatch):
    """The regions that are read directly, as they come."""
    regions = []
    read = DirectTiff.read_region
    monkeypatch.setattr(DirectTiff, "read_region", lambda self, *region: regions.append(region) or read(self, *region))
    return regions


@pytest.fixture
def read_by_openslide(monkeypatch):
    """The regions that OpenSlide is asked for, as they come."""
    regions = []
    read = openslide.OpenSlide.read_region
    monkeypatch.setattr(
        openslide.OpenSlide, "read_region", lambda self, *region: regions.append(region) or read(self, *region)
    )
    return regions


@pytest.fixture
def told(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", logger="ds_wsi")
    return lambda: [record.getMessage() for record in caplog.records if "read by OpenSlide" in record.getMessage()]


def both(path):
    return Slide(path, mpp=0.5), Slide(path, mpp=0.5, reader="openslide")


def outcome(read):
    try:
        return read()
    except SlideError as error:
        return error


def read_alike(path, data):
    """Random tiles and an overview: the same of both readers."""
    slide, by_openslide = outcome(lambda: Slide(path, mpp=0.5)), outcome(lambda: both(path)[1])
    if isinstance(by_openslide, SlideError):
        assert str(slide) == str(by_openslide)
        return
    with slide, by_openslide:
        for _ in range(5):
            level = data.draw(st.integers(0, len(slide.level_dimensions) - 1))
            x, y = (data.draw(st.integers(-20, side + 10)) for side in (slide.width_px, slide.height_px))
            side, factor = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 1, 2, 3, 4]))
            tile = outcome(lambda: slide.read_tile(x, y, level, factor * side, side))  # noqa: B023
            expected = outcome(lambda: by_openslide.read_tile(x, y, level, factor * side, side))  # noqa: B023
            if isinstance(expected, np.ndarray):
                np.testing.assert_array_equal(tile, expected)
            elif level == 0 and x < slide.width_px and y < slide.height_px:
                assert str(tile) == str(expected)
            else:  # OpenSlide decodes tiles of which it shows nothing
                assert isinstance(tile, np.ndarray) or str(tile) == str(expected)
        overview, expected = (outcome(lambda: one.read_overview_with_gaps(2.0)) for one in (slide, by_openslide))  # noqa: B023
        if isinstance(expected, SlideError):
            assert isinstance(overview, SlideError)
        elif np.array_equal(overview.unreadable, expected.unreadable):
            np.testing.assert_array_equal(overview.pixels, expected.pixels)
        else:
            assert not (overview.unreadable & ~expected.unreadable).any()


def random_slide(folder, slide, data):
    kind, pages = slide
    path = folder / "random.tiff"
    tiles = [(at, at + size) for at, size in write_tiff(path, pages, kind)[0] if size]
    damage = data.draw(st.sampled_from(["none", "none", "torn", "anywhere", "tiles"]))
    content = bytearray(path.read_bytes())
    if damage == "torn":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(1, 4)) if damage in ("anywhere", "tiles") else 0):
        start, end = data.draw(st.sampled_from(tiles)) if damage == "tiles" and tiles else (0, len(content))
        content[data.draw(st.integers(start, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    proved._known.clear()  # times are coarse
    read_alike(path, data)


@cases(FEW)
def test_random_slides_are_read_as_by_openslide(folder, slide, data):
    random_slide(folder, slide, data)


@pytest.mark.slow
@cases(MANY)
def test_many_random_slides(folder, slide, data):
    random_slide(folder, slide, data)


@pytest.mark.parametrize(("read_px", "tile_px"), [(64, 64), (50, 50), (128, 64), (256, 64), (96, 64), (40, 64)])
def test_tiles_are_read_directly_with_openslides_pixels(path, read_directly, read_by_openslide, read_px, tile_px):
    write_tiff(path, TWO_LEVELS, Kind())
    slide, by_openslide = both(path)
    with slide, by_openslide:
        for level, x, y in ((0, 0, 0), (0, 128, 64), (0, 380, 250), (0, -10, -7), (1, 64, 64), (1, 390, 290)):
            slide.read_tile(0, 0, level, read_px, tile_px)  # the proof, where there is none yet
            read_directly.clear()
            read_by_openslide.clear()
            tile = slide.read_tile(x, y, level, read_px, tile_px)
            assert read_directly
            assert not read_by_openslide
            np.testing.assert_array_equal(tile, by_openslide.read_tile(x, y, level, read_px, tile_px))


def test_the_reader_can_be_chosen(path, read_directly):
    write_tiff(path, TWO_LEVELS, Kind())
    with both(path)[1] as slide:
        slide.read_tile(0, 0, 0, 64, 64)
        slide.read_overview_downsampled(2)
    cache = SlideCache(reader="openslide")
    pickle.loads(pickle.dumps(cache)).get(path, 0.5).read_tile(0, 0, 0, 64, 64)
    assert not read_directly
    with pytest.raises(ValueError, match="slide_reader must be one of auto, openslide, got 'direct'"):
        Slide(path, reader="direct")


def test_a_proof_costs_few_tiles_once_for_a_level(path, read_by_openslide):
    write_tiff(path, [Page((1000, 1000), absent=frozenset({70})), Page((500, 500)), Page((250, 250))], Kind())
    cache = SlideCache(max_open=1)
    cache.get(path, 0.5)
    assert not read_by_openslide  # a slide of which nothing is read
    for level in (0, 1, 1, 0):
        cache.get(path, 0.5).read_tile(0, 0, level, 64, 64)
        cache.close()
    levels = [level for _, level, _ in read_by_openslide]
    assert 5 <= levels.count(0) <= 9
    assert 2 <= levels.count(1) <= 5
    assert levels.count(2) == 0
    read_by_openslide.clear()
    os.utime(path)  # another file, by all that is known
    cache.get(path, 0.5).read_tile(0, 0, 0, 64, 64)
    assert len(read_by_openslide) == levels.count(0)
    cache.close()


def test_known_levels_are_bounded(path, monkeypatch):
    monkeypatch.setattr(proved, "MAX_KNOWN", 2)
    write_tiff(path, [Page((256, 256)), Page((128, 128)), Page((64, 64))], Kind())
    with Slide(path, mpp=0.5) as slide:
        for level in (0, 1, 2):
            slide.read_tile(0, 0, level, 32, 32)
    assert [level for _, level in proved._known] == [2]


def test_forked_processes_know_what_was_proved(path, read_by_openslide):
    write_tiff(path, TWO_LEVELS, Kind())
    with Slide(path, mpp=0.5) as slide:
        expected = slide.read_tile(32, 0, 0, 64, 64)
        read_by_openslide.clear()
        child = os.fork()
        if not child:  # the open slide comes along, and is opened anew
            same = np.array_equal(slide.read_tile(32, 0, 0, 64, 64), expected)
            slide.close()
            os._exit(0 if same and not read_by_openslide else 1)
        assert os.waitpid(child, 0)[1] == 0
        np.testing.assert_array_equal(slide.read_tile(32, 0, 0, 64, 64), expected)


def test_an_open_slide_can_be_pickled(path):
    write_tiff(path, TWO_LEVELS, Kind())
    with Slide(path, mpp=0.5, tiles=TileCache()) as slide:
        expected = slide.read_tile(32, 0, 0, 64, 64)
        with pickle.loads(pickle.dumps(slide)) as copy:
            np.testing.assert_array_equal(copy.read_tile(32, 0, 0, 64, 64), expected)


def test_closed_slides_leave_no_files_and_no_tiles(path):
    write_tiff(path, TWO_LEVELS, Kind())
    before = len(os.listdir("/proc/self/fd"))
    cache = SlideCache(max_open=2)
    for _ in range(3):
        cache.get(path, 0.5).read_tile(32, 0, 0, 64, 64)
        assert len(cache._tiles) >= 2
        cache.drop(path)
        assert len(cache._tiles) == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_a_free_file_openslide_reads(path, told, monkeypatch):
    write_tiff(path, TWO_LEVELS, Kind())

    def full(*_):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(proved, "DirectTiff", full)
        slide, by_openslide = both(path)
        np.testing.assert_array_equal(slide.read_tile(0, 0, 0, 64, 64), by_openslide.read_tile(0, 0, 0, 64, 64))
    assert len(told()) == 1
    assert not proved._known  # of this moment, not of the file


def test_one_line_says_why_openslide_reads(path, tmp_path, told):
    grey = {262: (3, [1])}
    write_tiff(path, [Page((100, 90), tags=grey)], Kind())
    shutil.copy(path, tmp_path / "other.tiff")
    for name in (path, tmp_path / "other.tiff", path):
        with outcome(lambda: Slide(name, mpp=0.5, slide_id="S-001")) as slide:  # noqa: B023
            for _ in range(3):
                outcome(lambda: slide.read_tile(0, 0, 0, 64, 64))
    assert told() == [
        "slide S-001 is read by OpenSlide and not directly, which would be faster: photometric interpretation must be "
        f"2 or 6, got 1 (directory 0) ({path}); the same of other slides is not told"
    ]


def test_a_level_with_other_pixels_is_read_by_openslide(path, told, monkeypatch):
    write_tiff(path, TWO_LEVELS, Kind())
    monkeypatch.setattr(
        proved, "prove_level", lambda *slide: "level 1: differs" if slide[2] == 1 else prove_level(*slide)
    )
    slide, by_openslide = both(path)
    for level in (1, 0, 1):
        np.testing.assert_array_equal(slide.read_tile(0, 0, level, 64, 64), by_openslide.read_tile(0, 0, level, 64, 64))
    assert len(told()) == 1
    assert "level 1: differs" in told()[0]


def test_a_proof_that_openslide_cannot_end_leaves_a_slide_that_is_read(path, told):
    """OpenSlide's handle is dead after an error; a tile that is whole is read all the same."""
    write_tiff(path, [Page((192, 192))], Kind())
    slide, by_openslide = both(path)
    expected = by_openslide.read_tile(64, 64, 0, 64, 64)
    slide._handle.handle.close()
    slide._handle.handle = dead = openslide.OpenSlide(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dead, "read_region", lambda *_: (_ for _ in ()).throw(openslide.OpenSlideError("broken")))
        patch.setattr("ds_wsi.slides.pixel_source.is_usable", lambda handle: handle is not dead)
        np.testing.assert_array_equal(slide.read_tile(64, 64, 0, 64, 64), expected)
    assert "OpenSlide must read what is read directly, got broken" in told()[0]
    assert slide._handle.handle is not dead


def test_a_file_that_cannot_be_opened_again_is_told_and_read_when_it_can(path, told):
    write_tiff(path, [Page((192, 192))], Kind())
    slide, by_openslide = both(path)
    handle = slide._handle.handle
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handle, "read_region", lambda *_: (_ for _ in ()).throw(openslide.OpenSlideError("broken")))
        patch.setattr("ds_wsi.slides.pixel_source.is_usable", lambda _: False)
        patch.setattr("ds_wsi.slides.pixel_source.open_handle", lambda *_: (_ for _ in ()).throw(SlideError("gone")))
        for _ in range(2):
            with pytest.raises(SlideError, match="gone"):
                slide.read_tile(64, 64, 0, 64, 64)
    np.testing.assert_array_equal(slide.read_tile(64, 64, 0, 64, 64), by_openslide.read_tile(64, 64, 0, 64, 64))


def test_a_broken_tile_is_openslides_error_and_its_neighbours_are_read(path):
    places = write_tiff(path, [Page((192, 192))], Kind())
    content = bytearray(path.read_bytes())
    offset, size = places[0][1]
    content[offset + size // 2 : offset + size - 2] = b"\xff" * (size - 2 - size // 2)
    path.write_bytes(content)
    slide, by_openslide = both(path)
    for x, y in ((0, 0), (64, 0), (128, 64), (60, 0), (64, 64)):
        tile, expected = (outcome(lambda: one.read_tile(x, y, 0, 64, 64)) for one in (slide, by_openslide))  # noqa: B023
        if (y, x) in ((0, 64), (0, 60)):
            assert isinstance(tile, TileReadError)
            assert str(tile) == str(expected)
            assert "slide slide" in str(tile)
        else:
            np.testing.assert_array_equal(tile, expected)


def test_a_file_that_is_cut_while_it_is_open_is_an_error_of_its_tiles(path):
    places = write_tiff(path, [Page((192, 192))], Kind(directories_first=True))
    slide = Slide(path, mpp=0.5)
    slide.read_tile(100, 100, 0, 64, 64)  # kept
    os.truncate(path, places[0][5][0] + 10)
    for _ in range(2):
        with pytest.raises(TileReadError, match=r"tile at \(100, 100\) of slide slide must be readable, got"):
            slide.read_tile(100, 100, 0, 64, 64)


def test_a_file_that_is_written_over_is_read_anew_or_refused(path, tmp_path):
    write_tiff(path, TWO_LEVELS, Kind())
    slide = Slide(path, mpp=0.5)
    before = slide.read_tile(100, 100, 0, 64, 64)
    write_tiff(tmp_path / "other.tiff", TWO_LEVELS, Kind(quality=30))
    shutil.copyfile(tmp_path / "other.tiff", path)
    after = slide.read_tile(100, 100, 0, 64, 64)
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after, both(path)[1].read_tile(100, 100, 0, 64, 64))
    write_tiff(tmp_path / "other.tiff", [Page((401, 300)), Page((200, 150))], Kind())
    shutil.copyfile(tmp_path / "other.tiff", path)
    with pytest.raises(TileReadError, match=r"must stay as it was when it was opened, with levels of \(\(400, 300\)"):
        slide.read_tile(100, 100, 0, 64, 64)


def test_a_file_that_is_replaced_by_name_stays_the_open_one(path, tmp_path):
    write_tiff(path, TWO_LEVELS, Kind())
    slide = Slide(path, mpp=0.5)
    before = slide.read_tile(100, 100, 0, 64, 64)
    write_tiff(tmp_path / "other.tiff", TWO_LEVELS, Kind(quality=30))
    os.replace(tmp_path / "other.tiff", path)
    np.testing.assert_array_equal(slide.read_tile(100, 100, 0, 64, 64), before)
    slide.close()
    assert not np.array_equal(slide.read_tile(100, 100, 0, 64, 64), before)


def test_real_slides_are_read_alike(shared_data, told, read_directly):
    for name, direct in (("CMU-1-Small-Region.svs", True), ("TCGA-CR-7395-01A-01-TS1.svs", False)):
        read_directly.clear()
        slide, by_openslide = both(shared_data / "slides" / name)
        with slide, by_openslide:
            for x, y, read_px in ((0, 0, 256), (1000, 700, 512), (2100, 2900, 256), (300, 900, 700)):
                tile, expected = (one.read_tile(x, y, 0, read_px, 256) for one in (slide, by_openslide))
                np.testing.assert_array_equal(tile, expected)
            np.testing.assert_array_equal(*(one.read_overview_downsampled(9.3)[0] for one in (slide, by_openslide)))
        assert bool(read_directly) == direct
    assert len(told()) == 1
    assert "compression must be 7, got 33005" in told()[0]


def test_broken_files_are_answered_alike(shared_data):
    for path in sorted((shared_data / "broken").iterdir()):
        slide, by_openslide = (outcome(lambda: Slide(path, 0.5, reader=name)) for name in ("auto", "openslide"))  # noqa: B023
        if isinstance(by_openslide, SlideError):
            assert str(slide) == str(by_openslide)
            continue
        for level in range(len(slide.level_dimensions)):
            tile, expected = (outcome(lambda: one.read_tile(0, 0, level, 16, 16)) for one in (slide, by_openslide))  # noqa: B023
            np.testing.assert_array_equal(tile, expected)


def test_an_aperio_files_absent_tiles_are_drawn_by_openslide(path):
    pages = [Page((256, 256), absent=frozenset({3})), Page((128, 128), absent=frozenset({2}))]
    write_tiff(path, pages, Kind(description=APERIO, subsampling="444"))
    slide, by_openslide = both(path)
    for level, x, y in ((0, 192, 0), (1, 128, 0), (1, 0, 128), (1, 128, 128)):
        tile, expected = (one.read_tile(x, y, level, 64, 64) for one in (slide, by_openslide))
        np.testing.assert_array_equal(tile, expected)
