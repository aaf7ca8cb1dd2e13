"""Random tiled JPEG TIFFs for tests of reading."""

import os

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiled_tiff import RGB, YCBCR, Kind, Page

FEW, MANY = 60, int(os.environ.get("DS_WSI_DIRECT_CASES", "500"))
APERIO = b"Aperio Image Library v1\r\n64x64 |AppMag = 20|MPP = 0.5"
# What a tile may say of its colours, which OpenSlide does not believe: JFIF's marker, Adobe's of RGB and of YCbCr.
JFIF = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
ADOBE = [b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0" + bytes([transform]) for transform in (0, 1)]

kinds = st.builds(
    Kind,
    order=st.sampled_from("<>"),
    big=st.booleans(),
    photometric=st.sampled_from([RGB, YCBCR]),
    subsampling=st.sampled_from(["444", "422", "420", "440", "411"]),
    tables_apart=st.booleans(),
    progressive=st.booleans(),
    restart_rows=st.integers(0, 2),
    marker=st.sampled_from([b"", b"", JFIF, *ADOBE, b"\xff\xfe\x00\x06word"]),
    quality=st.integers(5, 95),
    short_counts=st.booleans(),
    description=st.sampled_from([b"", b"written by hand", APERIO]),
    directories_first=st.booleans(),
)


@st.composite
def slides(draw):
    """A kind of file, and the pages of its levels."""
    kind = draw(kinds)
    if kind.progressive:
        kind.tables_apart = False  # each tile has tables of its own
    # Half of the files have levels of whole downsamples, as of two; of scanners' others they are rounded down.
    step = draw(st.sampled_from([1, 12]))
    width, height = (draw(st.integers(1, 180 // step)) * step for _ in "wh")
    sides = st.sampled_from([16, 32, 48, 64])
    pages = []
    for _ in range(draw(st.integers(1, 3))):
        tile = draw(sides), draw(sides)
        n_tiles = -(-width // tile[0]) * -(-height // tile[1])
        absent = draw(st.frozensets(st.integers(0, n_tiles - 1), max_size=3))
        pages.append(Page((width, height), tile, absent))
        by = draw(st.sampled_from([2, 3, 4]))
        width, height = max(1, width // by), max(1, height // by)
    return kind, pages


def cases(number):
    """Random slides and what else is drawn; not made smaller where one fails, because that takes minutes."""
    options = {"deadline": None, "phases": [Phase.explicit, Phase.generate], "derandomize": number == FEW}

    def decorate(test):
        return settings(max_examples=number, **options)(given(slide=slides(), data=st.data())(test))

    return decorate
