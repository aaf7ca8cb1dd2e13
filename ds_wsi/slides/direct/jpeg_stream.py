"""A TIFF's JPEG tiles as files of their own, and their decoding.

[Note: a tile's stream] The stream of a tile may leave out its tables, which the TIFF then has once per directory, and
says of its colours what decoders read differently: the TIFF's photometric tag decides. What is made of it here has the
tables, Adobe's marker with the colours of that tag, and no other APP or COM segment, so that every decoder agrees.
"""

import numpy as np
import simplejpeg

from ds_wsi.slides.direct.errors import NotDirectError

START, END = b"\xff\xd8", b"\xff\xd9"
RGB, YCBCR = 2, 6  # photometric interpretations
DQT, DHT, DRI, SOS, COM = 0xDB, 0xC4, 0xDD, 0xDA, 0xFE
FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, with Huffman's code
APPS = range(0xE0, 0xF0)
JFIF_APP, ADOBE_APP = 0xE0, 0xEE
SCALES = (1, 2, 4, 8)


def stream_head(photometric: int, tables: bytes | None) -> bytes:
    """What goes before a tile's own segments: the start, the colours and the tables.

    Args:
        photometric: RGB or YCBCR.
        tables: the TIFF's JPEGTables, where it has them.

    Raises:
        NotDirectError: the tables are not whole, or hold more than tables.
    """
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(4) + bytes([1 if photometric == YCBCR else 0])
    head = [START, adobe]
    if tables is not None:
        position = _after_start(tables)
        while tables[position : position + 2] != END:
            marker, end = _segment(tables, position)
            if marker in (DQT, DHT):
                head.append(tables[position:end])
            elif marker not in (COM, DRI, *APPS):  # which each tile's start forgets
                raise NotDirectError(f"JPEG tables must hold tables alone, got marker {marker:#x}")
            elif marker == JFIF_APP:
                _is_jfif(tables[position + 4 : end])
            position = end
    return b"".join(head)


def tile_jpeg(head: bytes, stream: bytes, width_px: int, height_px: int) -> bytes:
    """The JPEG file of a tile; see `before_scan`, which checks what stands before its scan, and alone is checked."""
    n_bytes, made = before_scan(head, stream, width_px, height_px)
    return made + stream[n_bytes:]


def before_scan(head: bytes, stream: bytes, width_px: int, height_px: int) -> tuple[int, bytes]:
    """What stands before a tile's entropy-coded pixels, as it is in its JPEG file; see [Note: a tile's stream].

    Args:
        head: made by `stream_head`.
        stream: the tile's bytes in the TIFF.
        width_px, height_px: the tile's size.

    Returns:
        The bytes of the stream before the pixels, by number, and what the file has in their place: of a stream that
        begins with the same bytes it is the same.

    Raises:
        NotDirectError: the stream is broken, of another size, or no JPEG of three components of 8 bits.
    """
    position = _after_start(stream)
    kept = [head]
    has_frame, has_jfif, colours = False, False, 0
    while True:
        marker, end = _segment(stream, position)
        if marker == SOS:
            break
        if marker in FRAMES:
            _require_frame(stream[position + 4 : end], width_px, height_px)
            has_frame = True
        if marker in (DQT, DHT, DRI, *FRAMES):
            kept.append(stream[position:end])
        elif marker != COM and marker not in APPS:
            raise NotDirectError(f"JPEG must be baseline or progressive, got marker {marker:#x}")
        if marker == JFIF_APP:
            has_jfif |= _is_jfif(stream[position + 4 : end])
        elif marker == ADOBE_APP and stream[position + 4 : position + 9] == b"Adobe" and end - position >= 16:
            colours = stream[position + 15]
        position = end
    if not has_jfif and colours not in (0, 1):
        raise NotDirectError(f"JPEG must have Adobe's colours 0 or 1, got {colours}, which libjpeg warns of")
    if not has_frame:
        raise NotDirectError("JPEG must have a frame before its scan, got none")
    kept.append(stream[position:end])
    return end, b"".join(kept)


def decode(jpeg: bytes, width_px: int, height_px: int, scale: int = 1, out: np.ndarray | None = None) -> np.ndarray:
    """Decode a tile's JPEG file, at full resolution with the pixels of OpenSlide's decoder.

    Of the decoders at hand this one alone takes a warning of the library, such as a code that cannot be, as an error,
    which OpenSlide does too; others go on with wrong pixels.

    Args:
        jpeg: made by `tile_jpeg`.
        width_px, height_px: the tile's size, which it has.
        scale: 1, or 2, 4 or 8, which divides the size: the tile is shrunk so many times in the frequencies of its
            blocks. libjpeg makes of each plane the mean of so many pixels a side; it is not what averaging the decoded
            tile gives, because planes are rounded, and colours at half resolution enlarged, after it and not before.
        out: uint8 of the returned size, to write to, contiguous.

    Returns:
        uint8 [height_px / scale, width_px / scale, 3].

    Raises:
        NotDirectError: the file is broken.
    """
    assert scale in SCALES, scale
    wanted_px = {"min_height": height_px // scale, "min_width": width_px // scale} if scale > 1 else {}
    try:
        pixels = simplejpeg.decode_jpeg(jpeg, "RGB", buffer=out, strict=True, **wanted_px)
    except ValueError as error:
        raise NotDirectError(f"JPEG must be whole, got: {error}") from error
    shape = (height_px // scale, width_px // scale, 3)
    if pixels.shape != shape:
        raise NotDirectError(f"JPEG must decode to {list(shape)}, got {list(pixels.shape)}")
    return np.asarray(pixels) if out is None else out


def _after_start(stream: bytes) -> int:
    if stream[:2] != START:
        raise NotDirectError("JPEG must begin with its marker, got other bytes")
    return 2


def _segment(stream: bytes, position: int) -> tuple[int, int]:
    """The marker at a place, and where its segment ends."""
    head = stream[position : position + 4]
    if len(head) < 4 or head[0] != 0xFF:
        raise NotDirectError("JPEG must have a segment after another, got other bytes")
    end = position + 2 + int.from_bytes(head[2:], "big")
    if end < position + 4 or end > len(stream):
        raise NotDirectError("JPEG must have whole segments, got a torn one")
    return head[1], end


def _is_jfif(data: bytes) -> bool:
    """Whether an APP0 segment is JFIF's; of another revision than 1 libjpeg warns, which is an error for OpenSlide."""
    if len(data) < 14 or data[:5] != b"JFIF\0":
        return False
    if data[5] != 1:
        raise NotDirectError(f"JPEG must be of JFIF's revision 1, got {data[5]}")
    return True


def _require_frame(frame: bytes, width_px: int, height_px: int) -> None:
    if len(frame) < 6 or (frame[0], frame[5]) != (8, 3):
        raise NotDirectError("JPEG must have three components of 8 bits, got others")
    size = int.from_bytes(frame[3:5], "big"), int.from_bytes(frame[1:3], "big")
    if size != (width_px, height_px):
        raise NotDirectError(f"JPEG must be of the tile's {width_px} x {height_px} px, got {size[0]} x {size[1]}")
