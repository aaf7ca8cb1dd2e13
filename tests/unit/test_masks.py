import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import label
from slide_files import write_slide
from test_tiling import draw

from ds_wsi.slides.masks import MaskFile, _fill, find_mask, read_mask, write_mask
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.slides.slide import Slide, SlideError
from ds_wsi.slides.tiling import find_tissue, tile_slide

POLICY = TilingPolicy(tile_size_px=64, mpp=0.5, overview_mpp=2.0)


def fake(width, height, bounds=None):
    return SimpleNamespace(slide_id="s", width_px=width, height_px=height, bounds=bounds or (0, 0, width, height))


def box(x0, y0, x1, y1):
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def feature(*rings, kind="annotation", name=None, geometry="Polygon"):
    properties = {} if kind is None else {"objectType": kind}
    if name is not None:
        properties["classification"] = name if isinstance(name, str) else {"name": name[0], "color": [1, 2, 3]}
    coordinates = list(rings) if geometry == "Polygon" else [list(part) for part in rings]
    return {"type": "Feature", "geometry": {"type": geometry, "coordinates": coordinates}, "properties": properties}


def write(path, *features):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return MaskFile(path)


def pixels(*boxes, shape=(12, 16)):
    mask = np.zeros(shape, dtype=bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 0.8), st.floats(1.0, 40.0), st.tuples(*[st.integers(1, 14)] * 2))
@settings(max_examples=80, deadline=None)
def test_what_is_written_is_read_pixel_for_pixel(tmp_path_factory, seed, density, downsample, shape):
    mask = np.random.default_rng(seed).random(shape) < density
    mask[0, 0] = True
    slide = fake(int(np.floor(shape[1] * downsample)), int(np.floor(shape[0] * downsample)))
    if (-(-slide.width_px // downsample), -(-slide.height_px // downsample)) != shape[::-1]:
        return
    path = tmp_path_factory.mktemp("masks") / "s.geojson"
    write_mask(path, mask, downsample, slide)
    np.testing.assert_array_equal(read_mask(MaskFile(path), slide, downsample), mask)
    features = json.loads(path.read_text())["features"]
    assert len(features) == label(mask)[1]  # an annotation for each piece


def test_written_features_are_as_qupath_wants_them(tmp_path):
    mask = pixels((1, 1, 9, 9))
    mask[3:5, 3:5] = False
    write_mask(tmp_path / "s.geojson", mask, 16.0, fake(256, 192))
    collection = json.loads((tmp_path / "s.geojson").read_text())
    assert collection["type"] == "FeatureCollection"
    (one,) = collection["features"]
    outer, hole = one["geometry"]["coordinates"]
    assert one["geometry"]["type"] == "Polygon"
    assert {tuple(corner) for corner in outer} == {(16, 16), (144, 16), (144, 144), (16, 144)}
    assert {tuple(corner) for corner in hole} == {(48, 48), (80, 48), (80, 80), (48, 80)}
    assert outer[0] == outer[-1]
    properties = one["properties"]
    assert properties["objectType"] == "annotation"
    assert set(properties["classification"]) == {"name", "color"}  # QuPath refuses the file with one of them alone
    assert len(one["id"]) == 36


def test_holes_pieces_and_classes(tmp_path):
    slide = fake(160, 120)
    collection = (
        feature(box(10, 10, 80, 80), box(30, 30, 50, 50)),
        feature([box(100, 0, 120, 20)], [box(140, 0, 160, 20)], geometry="MultiPolygon"),
        feature(box(60, 60, 70, 70), name=("Ignore*",)),
        feature(box(0, 100, 160, 120), kind="tile"),
        feature(box(0, 100, 10, 110), kind=None, name="Tumor"),
    )
    expected = pixels((1, 1, 8, 8), (10, 0, 12, 2), (14, 0, 16, 2), (0, 10, 1, 11))
    expected[3:5, 3:5] = expected[6, 6] = False
    np.testing.assert_array_equal(read_mask(write(tmp_path / "s.geojson", *collection), slide, 10.0), expected)
    (tmp_path / "list.geojson").write_text(json.dumps(list(collection)))  # as QuPath wrote it before 0.3
    np.testing.assert_array_equal(read_mask(MaskFile(tmp_path / "list.geojson"), slide, 10.0), expected)
    (tmp_path / "one.geojson").write_text(json.dumps(feature(box(0, 0, 160, 120))["geometry"]))
    assert read_mask(MaskFile(tmp_path / "one.geojson"), slide, 10.0).all()


@given(st.lists(st.tuples(st.floats(-5, 25), st.floats(-5, 25)), min_size=3, max_size=9))
@settings(max_examples=100, deadline=None)
def test_a_polygon_fills_the_pixels_whose_centres_are_inside(corners):
    ring = np.array(corners)
    mask = np.zeros((20, 20), dtype=bool)
    _fill(mask, [ring], True)
    ahead = np.roll(ring, -1, axis=0)
    for row in range(20):
        for column in range(20):
            x, y = column + 0.5, row + 0.5
            crossed = (ring[:, 1] <= y) != (ahead[:, 1] <= y)
            with np.errstate(divide="ignore", invalid="ignore"):
                at = ring[:, 0] + (y - ring[:, 1]) / (ahead[:, 1] - ring[:, 1]) * (ahead[:, 0] - ring[:, 0])
            if (np.abs(at[crossed] - x) < 1e-9).any():
                continue  # on the edge itself
            assert mask[row, column] == bool((crossed & (at < x)).sum() % 2)


@pytest.mark.parametrize("scale", [1, 4, 10])
@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "I;16"])
def test_a_png_of_any_scale_and_kind(tmp_path, scale, mode):
    mask = pixels((2, 3, 7, 9)).repeat(10 // scale, 0).repeat(10 // scale, 1)
    values = mask.astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 256)
    elif mode in ("RGB", "RGBA"):
        colour = np.zeros((*mask.shape, len(mode)), dtype=np.uint8)
        colour[mask, 1] = 200
        if mode == "RGBA":
            colour[..., 3] = 255
        image = Image.fromarray(colour)
    elif mode == "1":
        image = Image.fromarray(mask)
    else:
        image = Image.fromarray(values * (1 if mode == "P" else 255), mode)
        if mode == "P":
            image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / "s.png")
    mask_read = read_mask(MaskFile(tmp_path / "s.png"), fake(160, 120), 10.0)
    np.testing.assert_array_equal(mask_read, pixels((2, 3, 7, 9)))


def test_places_from_the_scanned_areas_corner(tmp_path):
    slide = fake(160, 120, bounds=(40, 20, 100, 80))
    drawn = write(tmp_path / "s.geojson", feature(box(0, 0, 30, 10)))
    np.testing.assert_array_equal(read_mask(drawn._replace(in_bounds=True), slide, 10.0), pixels((4, 2, 7, 3)))
    np.testing.assert_array_equal(read_mask(drawn, slide, 10.0), pixels((0, 0, 3, 1)))
    assert drawn.name != drawn._replace(in_bounds=True).name
    write_mask(tmp_path / "out.geojson", pixels((4, 2, 7, 3)), 10.0, slide, in_bounds=True)
    mask_file = MaskFile(tmp_path / "out.geojson", True)
    np.testing.assert_array_equal(read_mask(mask_file, slide, 10.0), pixels((4, 2, 7, 3)))
    Image.fromarray(np.full((8, 10), 255, np.uint8)).save(tmp_path / "s.png")
    area = read_mask(MaskFile(tmp_path / "s.png", True), slide, 10.0)
    np.testing.assert_array_equal(area, pixels((4, 2, 14, 10)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no json", r"must be GeoJSON.*JSONDecodeError.*slide s, .*HINT: export it from QuPath"),
        ('{"type": "FeatureCollection"}', r"must be GeoJSON.*KeyError"),
        ("[]", r"must hold a region of tissue, got none"),
        (json.dumps({"features": [feature(box(0, 0, 9, 9), kind="tile")], "type": "FeatureCollection"}), "got none"),
        (json.dumps(feature([[0, 0], [1, 1]])), r"at least 3 corners"),
        (
            json.dumps(feature(box(500, 500, 600, 600))),
            r"must lie on its slide of 160 x 120 px, got .* \(500",
        ),
        (json.dumps(feature([[0, 0], [float("nan"), 1], [1, 1]])), "at least 3 corners"),
    ],
)
def test_what_is_no_mask_is_named(tmp_path, text, words):
    path = tmp_path / "s.geojson"
    path.write_text(text)
    with pytest.raises(SlideError, match=words):
        read_mask(MaskFile(path), fake(160, 120), 10.0)


def test_pngs_of_another_slide_empty_or_torn(tmp_path):
    path, slide = tmp_path / "s.png", fake(160, 120)
    Image.fromarray(np.full((12, 12), 255, np.uint8)).save(path)
    with pytest.raises(SlideError, match=r"shape of its slide, 160 x 120 px, at any scale, got 12 x 12 .*HINT"):
        read_mask(MaskFile(path), slide, 10.0)
    Image.fromarray(np.zeros((12, 16), np.uint8)).save(path)
    with pytest.raises(SlideError, match=r"must hold tissue, values other than 0"):
        read_mask(MaskFile(path), slide, 10.0)
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(SlideError, match=r"readable PNG"):
        read_mask(MaskFile(path), slide, 10.0)


def test_a_slide_has_one_mask(tmp_path):
    assert find_mask(tmp_path, "s") is None
    write(tmp_path / "s.geojson", feature(box(0, 0, 9, 9)))
    assert find_mask(tmp_path, "s") == tmp_path / "s.geojson"
    (tmp_path / "s.png").write_bytes(b"")
    with pytest.raises(SlideError, match=r"one mask, got s\.geojson and s\.png"):
        find_mask(tmp_path, "s")


def test_tiling_follows_the_mask_and_our_own_mask_gives_our_own_tiles(tmp_path):
    with Slide(write_slide(tmp_path / "s.tiff", draw(520, 390, (128, 64, 320, 192)), mpp=0.5)) as slide:
        grid = tile_slide(slide, POLICY)
        tissue = find_tissue(slide, POLICY)
        write_mask(tmp_path / "s.geojson", tissue.mask, tissue.downsample, slide)
        again = tile_slide(slide, POLICY, MaskFile(tmp_path / "s.geojson"))
        np.testing.assert_array_equal(again.coords, grid.coords)
        assert grid.tissue.mask == ""
        assert again.tissue.mask.startswith("s.geojson ")
        assert again.tissue.share == grid.tissue.share
        corrected = write(tmp_path / "t.geojson", feature(box(0, 0, 64, 64)), feature(box(384, 320, 448, 384)))
        moved = tile_slide(slide, POLICY, corrected)
        assert moved.coords.tolist() == [[0, 0], [384, 320]]
        assert moved.tissue.mask != again.tissue.mask
        # A mask is what is tissue, whatever the rule.
        np.testing.assert_array_equal(
            tile_slide(slide, TilingPolicy(64, tissue="none"), corrected).coords, moved.coords
        )
