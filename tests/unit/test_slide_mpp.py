"""Where a slide's resolution comes from, and what is asked about or refused."""

import pytest
from slide_files import ramp, write_slide
from tiled_tiff import Kind, Page, write_tiff

from ds_wsi.slides.slide import Slide, SlideError


@pytest.fixture
def two_levels(tmp_path):
    """256 x 192 px at 0.25 um/px, and the same at half the size with another blue."""
    return write_slide(tmp_path / "two.tiff", ramp(256, 192), ramp(128, 96, blue=99), mpp=0.25)


PER_CM = {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "20000"}


@pytest.mark.parametrize(
    ("properties", "override", "mpp", "source"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, None, 0.25, "openslide.mpp-x and -y"),
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25", **PER_CM}, None, 0.25, "openslide.mpp-x and -y"),
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, 0.4, 0.4, "the override"),
        (PER_CM, None, 0.5, "the TIFF resolution tags"),
        ({"tiff.ResolutionUnit": "inch", "tiff.XResolution": "50800"}, None, 0.5, "the TIFF resolution tags"),
    ],
)
def test_mpp_comes_from_the_best_source(two_levels, properties, override, mpp, source):
    with Slide(two_levels, override) as slide:
        slide._properties = properties
        assert slide.mpp == pytest.approx(mpp)
        assert slide.mpp_source == source


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"tiff.ResolutionUnit": "inch"},
        {"tiff.XResolution": "50800"},
        {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "0"},
        {"openslide.mpp-x": "unknown", "openslide.mpp-y": "unknown"},
    ],
)
def test_mpp_is_not_guessed(two_levels, properties):
    with Slide(two_levels) as slide:
        slide._properties = properties
        with pytest.raises(SlideError, match=r"slide must tell its resolution.*`mpp` column, or with --slide_mpp"):
            slide.mpp  # noqa: B018


def test_resolution_tags_serve_where_openslide_names_no_mpp(tmp_path):
    # OpenSlide takes an Aperio slide's mpp from the description only, as with PANDA's files.
    path = write_slide(tmp_path / "a.svs", ramp(128, 96), mpp=0.48, description="Aperio Image Library v1")
    with Slide(path) as slide:
        assert slide.mpp == pytest.approx(0.48, rel=1e-3)
        assert slide.mpp_source == "the TIFF resolution tags"


@pytest.mark.parametrize("name", [b"Vergr\xf6\xdferung", b"\xff", b"\x80 AppMag"])
def test_names_that_are_no_utf8_are_left_out(tmp_path, name):
    """OpenSlide lists them with other letters, by which it then finds nothing."""
    path = tmp_path / "a.svs"
    description = b"Aperio Image Library v1\r\n64x64 |" + name + b" = 40|MPP = 0.5|Filename = Pr\xe4parat"
    write_tiff(path, [Page((100, 90))], Kind(description=description))
    with Slide(path) as slide:
        assert slide.mpp == 0.5
        assert slide.read_tile(0, 0, 0, 64, 64).shape == (64, 64, 3)


def test_slide_without_mpp_is_refused_with_the_option(tmp_path):
    path = write_slide(tmp_path / "a.tiff", ramp(128, 96))
    with (
        Slide(path) as slide,
        pytest.raises(SlideError, match=r"tell its resolution.*slide a,.*HINT.*`mpp`.*--slide_mpp"),
    ):
        slide.mpp  # noqa: B018
    with Slide(path, mpp=0.5) as slide:
        assert slide.mpp == 0.5


@pytest.mark.parametrize("mpp", [0.025, 0.05, 0.1, 2.2, 2.5, 5.0, 10.0])
def test_a_file_that_is_wrong_by_a_factor_of_ten_is_asked_about(tmp_path, mpp):
    path = write_slide(tmp_path / "a.tiff", ramp(128, 96), mpp=mpp)
    meant = mpp * 10 if mpp < 1 else mpp / 10
    words = rf"to be plausible, got {mpp:g} from .*is {meant:g} meant\? \(slide a,.*`mpp`.*--slide_mpp"
    with Slide(path) as slide, pytest.raises(SlideError, match=words):
        slide.mpp  # noqa: B018
    for given in ({"mpp": mpp}, {"fallback_mpp": mpp}):  # who knows better says so
        if mpp >= 0.05:
            with Slide(path, **given) as slide:
                assert slide.mpp == mpp


@pytest.mark.parametrize("mpp", [0.1213, 0.1725, 0.2199, 0.25, 0.2527, 0.4990, 0.5, 0.65, 1.0, 2.0])
def test_what_scanners_have_is_believed(tmp_path, mpp):
    with Slide(write_slide(tmp_path / "a.tiff", ramp(128, 96), mpp=mpp), fallback_mpp=0.3) as slide:
        assert slide.mpp == pytest.approx(mpp, rel=1e-3)
        assert not slide.uses_fallback_mpp


@pytest.mark.parametrize(("y", "good"), [("0.2505", True), ("0.26", True), ("0.27", False), ("0.5", False)])
def test_pixels_must_be_square(two_levels, y, good):
    mean = pytest.approx((0.25 + float(y)) / 2)
    told = {"openslide.mpp-x": "0.25", "openslide.mpp-y": y}
    tags = {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "40000", "tiff.YResolution": str(1e4 / float(y))}
    for properties in (told, tags):
        with Slide(two_levels) as slide, Slide(two_levels, fallback_mpp=0.3) as helped, Slide(two_levels, 0.4) as given:
            for one in (slide, helped, given):
                one._properties = properties
            assert given.mpp == 0.4
            assert helped.mpp == (mean if good else 0.3)
            if good:
                assert slide.mpp == mean
                continue
            with pytest.raises(SlideError, match=rf"square, within 5%, got 0.25 x {y} um from .*--slide_mpp"):
                slide.mpp  # noqa: B018


@pytest.mark.parametrize("mpp", [0.00499, 352.78, -0.5, float("nan")])
def test_implausible_override_is_refused(two_levels, mpp):
    with (
        Slide(two_levels, mpp=mpp) as slide,
        pytest.raises(SlideError, match=rf"mpp must be in .*, got {mpp:g} from the override \(slide two,.*--slide_mpp"),
    ):
        slide.mpp  # noqa: B018


def test_implausible_tags_are_refused_with_value_and_source(tmp_path):
    path = write_slide(tmp_path / "dpi.tiff", ramp(128, 96), mpp=25400 / 72)
    with (
        Slide(path) as slide,
        pytest.raises(SlideError, match=r"got 352\.77\d* from openslide.mpp-x and -y \(slide dpi,.*--slide_mpp"),
    ):
        slide.mpp  # noqa: B018


def test_real_slides_tell_their_mpp_or_are_refused(shared_data):
    with Slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        assert slide.mpp == 0.499
    path = shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs"
    with Slide(path) as slide, pytest.raises(SlideError, match=r"must tell its resolution"):
        slide.mpp  # noqa: B018
    with Slide(path, mpp=0.5) as slide:
        tile = slide.read_tile(2048, 1024, 1, 256, 256)  # JPEG 2000
        assert tile.std() > 5
