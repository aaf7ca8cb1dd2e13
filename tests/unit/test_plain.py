import contextlib
import struct

import numpy as np
import pytest
import tifffile
from dicom_slide import write_dicom
from PIL import Image
from slide_files import ramp

from ds_wsi.slides import plain
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.slides.slide import Slide, SlideError, TileReadError
from ds_wsi.slides.tiling import tile_slide

IMAGE = ramp(150, 70)
TRUE_MPP = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}


def tiff(path, image, **options):
    options = {"photometric": "rgb", "metadata": None, "software": False, **options}
    tifffile.imwrite(path, image, **options)
    return path


def pillow(path, image, **options):
    Image.fromarray(image).save(path, **options)
    return path


def bmp32(path, image):
    """32 bits, top down: not what Pillow writes."""
    height, width, _ = image.shape
    pixels = np.dstack([image[..., ::-1], np.zeros(image.shape[:2], np.uint8)]).tobytes()
    head = struct.pack("<2sIHHI", b"BM", 54 + len(pixels), 0, 0, 54)
    head += struct.pack("<IiiHHIIiiII", 40, width, -height, 1, 32, 0, len(pixels), 0, 0, 0, 0)
    path.write_bytes(head + pixels)
    return path


WAYS = {
    "a.png": pillow,
    "a.bmp": pillow,
    "a32.bmp": bmp32,
    "a.webp": lambda path, image: pillow(path, image, lossless=True),
    "one_strip.tif": tiff,
    "strips.tif": lambda path, image: tiff(path, image, rowsperstrip=16),
    "deflate.tif": lambda path, image: tiff(path, image, rowsperstrip=16, compression="zlib", predictor=True),
    "lzw.tif": lambda path, image: tiff(path, image, rowsperstrip=7, compression="lzw"),
    "big_endian.tif": lambda path, image: tiff(path, image, byteorder=">"),
    "planar.tif": lambda path, image: tiff(path, np.moveaxis(image, 2, 0), planarconfig="separate"),
    "alpha.tif": lambda path, image: tiff(
        path, np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]), extrasamples=["unassalpha"]
    ),
    "alpha.png": lambda path, image: pillow(path, np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])),
}


@pytest.mark.parametrize("name", WAYS)
def test_pixels_are_those_of_the_file(tmp_path, name):
    path = WAYS[name](tmp_path / name, IMAGE)
    with Slide(path, mpp=0.5) as slide:
        assert (slide.width_px, slide.height_px, slide.level_downsamples) == (150, 70, (1.0,))
        np.testing.assert_array_equal(slide.read_tile(64, 5, 0, 64, 64), IMAGE[5:69, 64:128])
        edge = slide.read_tile(100, 30, 0, 64, 64)  # over two edges: the background
        np.testing.assert_array_equal(edge[:40, :50], IMAGE[30:, 100:])
        assert (edge[40:] == 255).all()
        assert (edge[:, 50:] == 255).all()
        overview, _ = slide.read_overview_downsampled(2)
        np.testing.assert_allclose(overview[3, 7], IMAGE[6:8, 14:16].reshape(4, 3).mean(0), atol=0.51)
        slide.close()
        np.testing.assert_array_equal(slide.read_tile(0, 0, 0, 16, 16), IMAGE[:16, :16])


def test_grey_palette_and_jpeg_become_colours(tmp_path):
    grey = IMAGE[..., 0]
    for path in (pillow(tmp_path / "g.png", grey), tiff(tmp_path / "g.tif", grey, photometric="minisblack")):
        with Slide(path, mpp=0.5) as slide:
            np.testing.assert_array_equal(slide.read_tile(8, 8, 0, 32, 32), np.dstack([grey[8:40, 8:40]] * 3))
    indices = (grey // 64).astype(np.uint8)
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)], np.uint8)
    for name in ("p.png", "p.bmp"):
        image = Image.fromarray(indices, "P")
        image.putpalette(colours.ravel().tolist())
        image.save(tmp_path / name)
        with Slide(tmp_path / name, mpp=0.5) as slide:
            np.testing.assert_array_equal(slide.read_tile(8, 8, 0, 32, 32), colours[indices[8:40, 8:40]])
    smooth = np.asarray(Image.fromarray(IMAGE).resize((16, 8)).resize((150, 70)))
    with Slide(pillow(tmp_path / "a.jpg", smooth, quality=98, subsampling=0), mpp=0.5) as slide:
        assert np.abs(slide.read_tile(8, 8, 0, 32, 32).astype(int) - smooth[8:40, 8:40]).mean() < 3


def test_transparent_pixels_are_background(tmp_path):
    alpha = np.zeros(IMAGE.shape[:2], np.uint8)
    alpha[:, :75] = 255
    with Slide(pillow(tmp_path / "a.png", np.dstack([IMAGE, alpha])), mpp=0.5) as slide:
        tile = slide.read_tile(60, 0, 0, 32, 32)
    np.testing.assert_array_equal(tile[:, :15], IMAGE[:32, 60:75])
    assert (tile[:, 15:] == 255).all()


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: tiff(path, IMAGE.astype(np.uint16) * 257), r"8 bits per channel, got 16 .*HINT: convert it to 8"),
        (
            lambda path: pillow(path, IMAGE[..., 0].astype(np.uint16) * 257, format="PNG"),
            r"of 8 bits per channel, got 16",
        ),
        (
            lambda path: Image.fromarray(IMAGE).convert("CMYK").save(path, "JPEG"),
            r"got inks \(CMYK\).*convert it to RGB",
        ),
        (lambda path: Image.fromarray(IMAGE).convert("1").save(path, "PNG"), r"got one bit"),
        (lambda path: pillow(path, IMAGE[..., 0].astype(np.float32), format="TIFF"), r"8 bits per channel, got 32"),
        (lambda path: tiff(path, np.stack([IMAGE, IMAGE])), r"one image of its size, got 2 of 150 x 70 px"),
        (
            lambda path: Image.fromarray(IMAGE).save(
                path, "WEBP", save_all=True, append_images=[Image.fromarray(IMAGE[::-1])]
            ),
            r"must be one, got 2 frames",
        ),
        (lambda path: Image.fromarray(IMAGE).save(path, "GIF"), r"plain image or in a format of OpenSlide's, got none"),
    ],
)
def test_what_is_no_colour_image_of_8_bits_is_refused_by_name(tmp_path, write, words):
    path = tmp_path / "odd.img"
    write(path)
    with pytest.raises(SlideError, match=words) as caught:
        Slide(path, mpp=0.5, slide_id="odd")
    assert f"(slide odd, {path})" in str(caught.value)
    assert "HINT" in str(caught.value)


def test_a_png_of_16_bits_and_colours_is_refused(tmp_path):
    """Pillow drops the lower 8 bits of these without a word."""
    import imagecodecs

    (tmp_path / "deep.png").write_bytes(imagecodecs.png_encode(IMAGE.astype(np.uint16) * 3))
    with pytest.raises(SlideError, match=r"8 bits per channel, got 16 .*HINT"):
        Slide(tmp_path / "deep.png")


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "one_strip.tif", "deflate.tif", "a.jpg"])
def test_files_that_are_cut_short_fail_by_name(tmp_path, name):
    path = WAYS.get(name, pillow)(tmp_path / name, np.random.default_rng(0).integers(0, 255, (70, 150, 3), np.uint8))
    data = path.read_bytes()
    keep = len(data) // 2
    if name.endswith(".tif"):  # the head is at the front, what is missing lies in the middle
        with tifffile.TiffFile(path) as file:
            keep = file.pages[0].dataoffsets[-1] + 5
    path.write_bytes(data[:keep])
    words = r"slide a|slide one_strip|slide deflate"
    with pytest.raises(SlideError, match=words) as caught, Slide(path, mpp=0.5) as slide:
        slide.read_tile(64, 6, 0, 64, 64)
    assert isinstance(caught.value, TileReadError) or "HINT" in str(caught.value)


@pytest.mark.parametrize("name", [*WAYS, "a.jpg", "tiled.tif", "a.gif"])
def test_a_torn_or_damaged_file_is_a_slide_error_or_read(tmp_path, name):
    """Never a crash with another error, wherever the file is cut or its bytes are wrong."""
    ways = {**WAYS, "a.jpg": pillow, "a.gif": pillow, "tiled.tif": lambda path, image: tiff(path, image, tile=(64, 64))}
    data = ways[name](tmp_path / name, np.random.default_rng(0).integers(0, 255, (70, 150, 3), np.uint8)).read_bytes()
    rng = np.random.default_rng(1)
    damaged = [data[:length] for length in sorted({0, 1, 7, 8, 30, 60, 128, *rng.integers(0, len(data), 12).tolist()})]
    for start in (0, 8, *rng.integers(0, min(len(data), 400), 25).tolist()):
        flipped = bytearray(data)
        flipped[start : start + 4] = rng.bytes(4)
        damaged.append(bytes(flipped))
    for content in damaged:
        (tmp_path / name).write_bytes(content)
        with contextlib.suppress(SlideError), Slide(tmp_path / name, mpp=0.5) as slide:
            if slide.width_px * slide.height_px < 10**7:
                slide.read_tile(0, 0, 0, 32, 32)
                slide.read_overview_downsampled(4)


def test_the_limit_against_bombs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "MAX_DECODED_PIXELS", 10_000)
    for name in ("a.png", "a.webp"):
        with pytest.raises(SlideError, match=r"at most 10,000 px, got 150 x 70 .*HINT: convert it to a tiled TIFF"):
            Slide(WAYS[name](tmp_path / name, IMAGE))
    one = tiff(tmp_path / "one.tif", IMAGE, compression="zlib", rowsperstrip=70)
    with pytest.raises(SlideError, match=r"at most 10,000 px, got 150 x 70 \(a strip of it"):
        Slide(one)
    for name in ("a.bmp", "strips.tif", "one_strip.tif", "deflate.tif"):  # read by rows: no limit
        with Slide(WAYS[name](tmp_path / name, IMAGE), mpp=0.5) as slide:
            slide.read_tile(0, 0, 0, 64, 64)


def test_strips_are_kept_within_their_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "STRIPS_BYTES", 2 * 16 * 150 * 3)
    decoded = []
    path = WAYS["deflate.tif"](tmp_path / "a.tif", IMAGE)
    monkeypatch.setattr(plain, "_three_or_four", lambda pixels: decoded.append(len(pixels)) or pixels)
    with Slide(path, mpp=0.5) as slide:
        for y in (0, 0, 16, 48, 0):
            slide.read_tile(0, y, 0, 16, 16)
    assert decoded == [16, 16, 16, 16]  # the first is kept until two others came


@pytest.mark.parametrize("dpi", [72, 96, 300])
def test_dots_an_inch_of_image_editors_are_no_resolution(tmp_path, dpi):
    pillow(tmp_path / "a.png", IMAGE, dpi=(dpi, dpi))
    tiff(tmp_path / "a.tif", IMAGE, resolution=(dpi, dpi), resolutionunit="INCH")
    for name in ("a.png", "a.tif"):
        with Slide(tmp_path / name) as slide, pytest.raises(SlideError, match=rf"got {25400 // dpi}\..*--slide_mpp"):
            slide.mpp  # noqa: B018
        with Slide(tmp_path / name, fallback_mpp=0.42) as slide:
            assert slide.mpp == 0.42
            assert slide.uses_fallback_mpp


def test_a_microscopes_resolution_is_taken_and_none_is_asked_for(tmp_path):
    with Slide(tiff(tmp_path / "a.tif", IMAGE, **TRUE_MPP)) as slide:
        assert slide.mpp == pytest.approx(0.5)
    with (
        Slide(pillow(tmp_path / "a.bmp", IMAGE)) as slide,
        pytest.raises(SlideError, match=r"got no mpp .*--slide_mpp"),
    ):
        slide.mpp  # noqa: B018


def test_a_plain_image_is_tiled_and_read_as_a_slide_is(tmp_path):
    image = np.full((256, 256, 3), 244, np.uint8)
    image[64:192, 64:192] = (200, 110, 160)
    grids = []
    for name in ("a.png", "strips.tif", "a.bmp"):
        with Slide(WAYS[name](tmp_path / name, image), mpp=0.5) as slide:
            grid = tile_slide(slide, TilingPolicy(tile_size_px=64))
            tile = slide.read_tile(*grid.coords[0], grid.level, grid.read_size_px, 64)
            assert (tile == (200, 110, 160)).all()
            grids.append(grid.coords.tolist())
    assert grids == [[[64, 64], [128, 64], [64, 128], [128, 128]]] * 3


def test_a_folder_of_dicom_is_read_by_one_of_its_files(tmp_path):
    image = np.asarray(Image.fromarray(ramp(150, 100)).resize((19, 13)).resize((150, 100)))
    file = write_dicom(tmp_path / "series" / "level0.dcm", image, 0.25)
    (tmp_path / "series" / "README").write_text("no DICOM")
    for path in (file, file.parent):
        with Slide(path, slide_id="d") as slide:
            assert (slide.width_px, slide.height_px) == (150, 100)
            assert slide.mpp == pytest.approx(0.25)
            assert np.abs(slide.read_tile(20, 30, 0, 64, 64).astype(int) - image[30:94, 20:84]).mean() < 4


def test_folders_that_are_no_slide_are_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SlideError, match=r"must hold the DICOM files of a slide, got none \(slide e, .*HINT"):
        Slide(tmp_path / "empty", slide_id="e")
    for number in range(2):
        write_dicom(tmp_path / "two" / f"{number}.dcm", IMAGE, 0.5, series=f"1.2.3.{number + 5}")
    with pytest.raises(SlideError, match=r"must hold one series, got 2 \(slide t, .*HINT: name a file.*0\.dcm"):
        Slide(tmp_path / "two", slide_id="t")
