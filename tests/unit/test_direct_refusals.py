"""Files that the direct reader refuses, each in one line."""

import pytest
from direct_cases import proved
from tiled_tiff import LONG, LONG8, SHORT, UNDEFINED, Kind, Page, encode, tiles_of, write_tiff

from ds_wsi.slides.direct import jpeg_stream
from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.reader import DirectTiff
from ds_wsi.slides.direct.tiff_layout import Directory, Entry, SlideFile


@pytest.fixture
def path(tmp_path):
    return tmp_path / "slide.tiff"


REFUSED = {
    "compression": ({259: (SHORT, [5])}, "compression must be 7, got 5"),
    "grey": ({262: (SHORT, [1])}, "photometric interpretation must be 2 or 6, got 1"),
    "four samples": ({277: (SHORT, [4])}, "samples per pixel must be 3, got 4"),
    "planes": ({284: (SHORT, [2])}, "planar configuration must be 1, got 2"),
    "bits": ({258: (SHORT, [8, 8, 12])}, "samples must have 8 bits, got [8, 8, 12]"),
    "bits reversed": ({266: (SHORT, [2])}, "fill order must be 1, got 2"),
    "volume": ({32997: (LONG, [3])}, "image depth must be 1, got 3"),
    "strips": ({322: None, 323: None}, "must be in tiles, got strips"),
    "large tiles": ({322: (LONG, [2**20])}, "tiles must have 1 to 16777216 px, got 1048576 x 64"),
    "no tiles": ({323: (LONG, [0])}, "tiles must have 1 to 16777216 px"),
    "few places": ({324: (LONG, [8])}, "must have the places of 4 tiles, got 1 and 4"),
    "no places": ({324: None}, "directory 0 must have tag 324, got none"),
    "a place of bytes": ({325: (UNDEFINED, b"1234")}, "tag 325 must hold integers, got TIFF type 7"),
    "two widths": ({256: (LONG, [100, 100])}, "tag 256 must hold one value, got 2"),
    "no tables": ({347: (UNDEFINED, b"nothing.")}, "JPEG must begin with its marker"),
    "torn tables": ({347: (UNDEFINED, b"\xff\xd8\xff\xdb\x00\x43\x00")}, "JPEG must have whole segments"),
    "an image of tables": ({347: (UNDEFINED, b"\xff\xd8\xff\xc0\x00\x03\x00\xff\xd9")}, "got marker 0xc0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused_in_one_line(path, name):
    tags, words = REFUSED[name]
    write_tiff(path, [Page((100, 90), tags=tags)], Kind())
    with pytest.raises(NotDirectError) as caught:
        DirectTiff(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "file must hold bytes 0 to 8, got 0 bytes"),
        (b"GIF89a, and no TIFF", "file must be a TIFF, got another format"),
        (b"II\x2a\0\0\0\0\0", "TIFF must have a directory, got none"),
        (b"II\x2b\0\x04\0\0\0\x10\0\0\0\0\0\0\0", "BigTIFF must have places of 8 bytes"),
        (b"II\x2a\0\x08\0\0\0\0\0\0\0\0\0", "must have 1 to 4096 entries, got 0"),
        (b"II\x2a\0\x08\0\0\0\x09\0", "file must hold bytes"),
        (b"II\x2a\0\x08\0\0\0\x01\0" + bytes(12) + b"\x08\0\0\0", "got a circle or more of them"),
        (b"II\x2a\0\x08\0\0\0\x02\0" + 2 * (b"\x01\0\x03\0\x01\0\0\0" + bytes(4)) + bytes(4), "got tag 1 twice"),
    ],
)
def test_a_file_that_is_no_whole_tiff_is_refused(path, content, words):
    path.write_bytes(content)
    with pytest.raises(NotDirectError, match=words):
        DirectTiff(path)


def test_numbers_are_unsigned_and_no_larger_than_a_file(path):
    path.write_bytes(b"\xff" * 16)
    directory = Directory(SlideFile(path), 0, {324: Entry(LONG, 2, 0), 325: Entry(LONG8, 1, 0)}, "<")
    assert directory.integers(324).tolist() == [2**32 - 1] * 2
    with pytest.raises(NotDirectError, match="tag 325 must hold places in the file, got 18446744073709551615"):
        directory.integers(325)


def test_what_else_stands_among_the_tables_is_forgotten_with_each_tile(path):
    kind = Kind(tables_apart=True, subsampling="444")
    page = Page((128, 64))
    tables, _ = encode(next(tiles_of(page)), kind)
    # The interval of restarts, which the tiles do not have; a word; and colours.
    others = b"\xff\xdd\x00\x04\x00\x02" + b"\xff\xfe\x00\x06word" + b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(5)
    page.tags[347] = (UNDEFINED, tables[:-2] + others + tables[-2:])
    write_tiff(path, [page], kind)
    assert proved(path) is None


JFIF = b"\xff\xe0\x00\x10JFIF\0%c\x02" + bytes(7)
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(4) + b"%c"


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        (JFIF % 1, ""),
        (JFIF % 0, "JPEG must be of JFIF's revision 1, got 0"),
        (ADOBE % 1, ""),
        (ADOBE % 2, "JPEG must have Adobe's colours 0 or 1, got 2"),
        (ADOBE % 2 + JFIF % 1, ""),  # libjpeg asks Adobe's only where there is none of JFIF's
    ],
)
def test_headers_that_libjpeg_warns_of_are_refused(segments, words):
    """OpenSlide takes the warning as an error; what is decoded here has none of these segments."""
    _, stream = encode(next(tiles_of(Page((64, 64)))), Kind(tables_apart=True, subsampling="444"))
    stream = stream[:2] + segments + _without_apps(stream[2:])
    if not words:
        assert jpeg_stream.tile_jpeg(b"", stream, 64, 64)
        return
    with pytest.raises(NotDirectError, match=words):
        jpeg_stream.tile_jpeg(b"", stream, 64, 64)


def test_tables_of_another_revision_are_refused():
    with pytest.raises(NotDirectError, match="revision 1, got 2"):
        jpeg_stream.stream_head(jpeg_stream.YCBCR, b"\xff\xd8" + JFIF % 2 + b"\xff\xd9")


def _without_apps(segments):
    while segments[1] in jpeg_stream.APPS:
        segments = segments[2 + int.from_bytes(segments[2:4], "big") :]
    return segments


def test_a_folder_and_a_missing_file_are_errors_of_the_system(path):
    for unreadable in (path.parent, path):
        with pytest.raises(OSError, match="directory"):
            DirectTiff(unreadable)
