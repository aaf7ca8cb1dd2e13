import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ds_wsi.slides.policy import TISSUE_VERSION, TilingPolicy
from ds_wsi.slides.slide import Slide
from ds_wsi.slides.tiling import plan_coords, tile_slide
from ds_wsi.slides.tissue import grey_mask, otsu_threshold, pen_mask, saturation_mask, tile_fractions, tissue_mask

WHITE, BLACK, GREY, PINK = (245, 245, 245), (0, 0, 0), (128, 128, 128), (200, 100, 160)


def pixels(*colours):
    return np.array([colours], dtype=np.uint8)


def test_otsu_separates_two_classes():
    values = np.array([10] * 60 + [12] * 40 + [200] * 30, dtype=np.uint8)
    threshold = otsu_threshold(values.reshape(10, 13))
    assert 12 <= threshold < 200
    assert (values > threshold).sum() == 30


@given(st.lists(st.integers(0, 255), min_size=2, max_size=60).filter(lambda values: len(set(values)) > 1))
@settings(max_examples=60, deadline=None)
def test_otsu_is_the_best_of_all_thresholds(values):
    values = np.array(values, dtype=np.uint8)

    def variance(threshold):
        low, high = values[values <= threshold], values[values > threshold]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else -1.0

    best = max(variance(threshold) for threshold in range(256))
    assert variance(otsu_threshold(values)) == pytest.approx(best)


def test_otsu_of_one_value_leaves_nothing_above():
    values = np.full((4, 4), 9, dtype=np.uint8)
    assert not (values > otsu_threshold(values)).any()


def test_grey_keeps_neither_glass_nor_black():
    assert grey_mask(pixels(WHITE, BLACK, GREY, PINK)).tolist() == [[False, False, True, True]]
    ends = pixels((2, 2, 2), (3, 3, 3), (230, 230, 230), (231, 231, 231))
    assert grey_mask(ends).tolist() == [[False, True, True, False]]
    assert grey_mask(ends, (0, 2)).tolist() == [[True, False, False, False]]


def test_saturation_keeps_colour():
    image = pixels(WHITE, GREY, PINK, PINK)
    assert saturation_mask(image).tolist() == [[False, False, True, True]]
    assert saturation_mask(image, 127).tolist() == [[False, False, False, False]]  # 255 (200 - 100) / 200, rounded down
    assert saturation_mask(image, 126).tolist() == [[False, False, True, True]]


def test_tissue_is_both_unless_the_policy_says_otherwise():
    vivid_light = (255, 255, 120)  # coloured, but lighter than tissue is
    image = pixels(WHITE, GREY, PINK, vivid_light)
    assert tissue_mask(image, "otsu", 8.0).tolist() == [[False, False, True, False]]
    assert tissue_mask(image, "grey", 8.0).tolist() == [[False, True, True, False]]
    assert tissue_mask(image, "none", 8.0).tolist() == [[True] * 4]
    assert tissue_mask(image, "otsu", 8.0, (0, 255)).tolist() == [[False, False, True, True]]


def test_fractions_of_whole_and_cut_pixels():
    mask = np.zeros((4, 6), dtype=bool)
    mask[1:3, 2:5] = True
    corners = np.array([(2, 1), (0, 0), (1.5, 0.5), (4.5, 2.25), (4.75, 3), (0, 0)], dtype=np.float64)
    expected = [1, 0, 1.5 * 1.5 / 4, 0.5 * 0.75 / 4, 0, 0]
    np.testing.assert_allclose(tile_fractions(mask, corners, 2.0), expected, rtol=0, atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.lists(st.tuples(*[st.integers(0, 50)] * 2), min_size=1))
@settings(max_examples=60, deadline=None)
def test_fractions_equal_counting_on_a_finer_mask(seed, side, corners):
    mask = np.random.default_rng(seed).random((9, 11)) < 0.5
    fine = np.zeros((90, 90), dtype=bool)
    fine[:36, :44] = mask.repeat(4, axis=0).repeat(4, axis=1)
    counted = [fine[y : y + side, x : x + side].mean() for x, y in corners]
    fractions = tile_fractions(mask, np.array(corners) / 4, side / 4)
    np.testing.assert_allclose(fractions, counted, rtol=0, atol=1e-12)


SIDE = 1024
TISSUE = np.zeros((SIDE, SIDE), bool)
TISSUE[256:768, 256:768] = True
STAINS = {
    "pink": (190, 110, 170),
    "pale": (226, 206, 220),
    "blue": (150, 140, 190),
    "brown": (180, 150, 120),
    "grey blue": (190, 195, 215),
    "trichrome": (90, 110, 190),
}
GLASS = {
    "white": (244, 244, 244),
    "warm": (225, 218, 200),
    "dim": (200, 200, 200),
    "bright yellow": (248, 240, 222),
    "bluish": (205, 212, 225),
}
PENS = {"blue": (40, 60, 180), "green": (40, 140, 70), "black": (20, 20, 25), "light blue": (120, 160, 220)}


def flat(colour, shape=(SIDE, SIDE), seed=1):
    return np.clip(np.random.default_rng(seed).normal(colour, 1.5, (*shape, 3)), 0, 255).astype(np.uint8)


def stained(colour, shape, seed=2):
    """Noise and dark nuclei, as a stain has them."""
    rng = np.random.default_rng(seed)
    image = np.array(colour, float) + rng.normal(0, 12, (*shape, 1)) + rng.normal(0, 5, (*shape, 3))
    for y, x in rng.integers(0, shape, (shape[0] * shape[1] // 900, 2)):
        image[max(0, y - 3) : y + 4, max(0, x - 3) : x + 4] = (90, 60, 140)
    return np.clip(image, 0, 255).astype(np.uint8)


def overview(image, mpp=8.0):
    """The overview of an image of 0.5 um/px."""
    return np.asarray(Image.fromarray(image).reduce(int(mpp / 0.5)))


def found(image, rule="auto", mpp=8.0):
    """The shares of the tissue and of the rest that are taken for tissue."""
    mask = tissue_mask(overview(image, mpp), rule, mpp)
    truth = np.asarray(Image.fromarray(TISSUE.astype(np.uint8)).reduce(int(mpp / 0.5))) > 0
    return mask[truth].mean(), mask[~truth].mean()


@pytest.mark.parametrize("mpp", [8.0, 2.0])
@pytest.mark.parametrize("stain", STAINS)
def test_auto_keeps_a_picture_that_is_all_tissue(stain, mpp):
    image = stained(STAINS[stain], (SIDE, SIDE))
    assert tissue_mask(overview(image, mpp), "auto", mpp).mean() > 0.95
    two = np.concatenate([image[:512], stained((170, 80, 160), (512, SIDE))])
    assert tissue_mask(overview(two, mpp), "auto", mpp).mean() > 0.95
    # What it replaces: Otsu's threshold halves such a picture, or worse.
    assert tissue_mask(overview(image, mpp), "otsu", mpp).mean() < 0.85


@pytest.mark.parametrize("mpp", [8.0, 2.0])
@pytest.mark.parametrize(
    ("stain", "glass"),
    [
        (stain, glass)
        for stain in STAINS
        for glass in GLASS
        if glass in ("white", "bright yellow") or stain not in ("pale", "grey blue")  # tissue is darker than its glass
    ],
)
def test_auto_finds_tissue_on_any_glass(stain, glass, mpp):
    image = flat(GLASS[glass])
    image[256:768, 256:768] = stained(STAINS[stain], (512, 512))
    inside, outside = found(image, mpp=mpp)
    assert inside > 0.95
    assert outside < 0.01


@pytest.mark.parametrize("pen", PENS)
def test_auto_leaves_out_pen_and_keeps_tissue_beside_it(pen):
    image = flat(GLASS["white"])
    image[256:768, 256:768] = stained(STAINS["pink"], (512, 512))
    image[48:112, 48:960] = flat(PENS[pen], (64, 912))
    inside, outside = found(image)
    assert inside > 0.95
    assert outside < 0.03


def test_a_pens_colour_that_covers_much_is_the_stains():
    image = flat(GLASS["white"])
    image[256:768, 256:768] = stained((60, 90, 190), (512, 512))  # the blue of a trichrome stain
    assert pen_mask(overview(image)).sum() > 0.2 * (TISSUE.sum() / 256)
    assert found(image)[0] > 0.95


def test_strong_pen_does_not_hide_small_pale_tissue():
    """It pulls Otsu's threshold above the saturation of the tissue."""
    image = flat(GLASS["white"])
    image[48:208, 48:960] = flat(PENS["blue"], (160, 912))
    image[256:768, 256:768] = stained((226, 206, 220), (512, 512))
    assert found(image, "otsu")[0] < 0.5
    assert found(image)[0] > 0.95


@pytest.mark.parametrize("glass", GLASS)
def test_auto_finds_nothing_on_empty_glass(glass):
    assert tissue_mask(overview(flat(GLASS[glass])), "auto", 8.0).mean() < 0.01


def test_black_padding_is_no_tissue_and_grey_pictures_go_by_their_grey_values():
    image = flat(GLASS["white"])
    image[256:768, 256:768] = stained(STAINS["pink"], (512, 512))
    image[:, :128] = flat((4, 3, 6), (SIDE, 128))
    assert found(image)[1] < 0.01
    grey = np.repeat(np.asarray(Image.fromarray(image).convert("L"))[..., None], 3, axis=2)
    inside, outside = found(grey)
    assert inside > 0.95
    assert outside < 0.01


def test_specks_go_and_pinholes_are_filled_but_small_tissue_alone_stays():
    image = flat(GLASS["white"])
    image[256:768, 256:768] = STAINS["pink"]
    image[400:416, 400:416] = 244  # 8 um
    image[64:80, 64:80] = STAINS["pink"]
    mask = tissue_mask(overview(image), "auto", 8.0)
    assert mask[16:48, 16:48].all()
    assert mask.sum() == 32 * 32
    alone = flat(GLASS["white"])
    alone[64:80, 64:80] = alone[512:528, 800:816] = STAINS["pink"]
    assert tissue_mask(overview(alone), "auto", 8.0).sum() == 2


def test_the_mask_is_the_same_each_time_and_its_version_is_pinned():
    """A change of the rule is a new TISSUE_VERSION, and another checksum here."""
    rng = np.random.default_rng(5)
    image = flat(GLASS["warm"], seed=5)
    image[100:700, 200:900] = np.clip(rng.normal((190, 120, 170), 30, (600, 700, 3)), 0, 255).astype(np.uint8)
    masks = [tissue_mask(overview(image), "auto", 8.0) for _ in range(2)]
    assert (masks[0] == masks[1]).all()
    assert TISSUE_VERSION == 1
    assert int(masks[0].sum()) == 1691


# Shares of the scanned area, and tiles of 256 px at 0.5 um/px, at the default overview of 8 um/px. Otsu alone lost what
# is less saturated than the mean of the tissue: CMU-1 kept 26 tiles, of 28 whose grey values at level 0 say tissue;
# "auto" keeps 30, for at 8 um/px a tile's edge is averaged. The other slide is nearly the same under every rule.
@pytest.mark.parametrize(
    ("name", "mpp", "tiles", "shares"),
    [
        (
            "CMU-1-Small-Region.svs",
            None,
            {"grey": 33, "otsu": 26, "auto": 30},
            {"grey": 0.382, "otsu": 0.313, "auto": 0.370},
        ),
        (
            "TCGA-CR-7395-01A-01-TS1.svs",
            0.5,
            {"grey": 146, "otsu": 142, "auto": 145},
            {"grey": 0.631, "otsu": 0.598, "auto": 0.631},
        ),
    ],
)
def test_golden_shares_of_real_slides_by_rule(shared_data, name, mpp, tiles, shares):
    with Slide(shared_data / "slides" / name, mpp) as slide:
        for rule in ("grey", "otsu", "auto"):
            grid = tile_slide(slide, TilingPolicy(tissue=rule))
            assert len(grid) == tiles[rule], rule
            assert grid.tissue.share == pytest.approx(shares[rule], abs=5e-4), rule
        assert len(tile_slide(slide, TilingPolicy(tissue="none"))) == grid.tissue.n_whole


def test_a_real_region_that_is_all_tissue_is_kept(shared_data):
    """1024 px of CMU-1 with the least glass: Otsu alone kept 31 of 64 tiles of 128 px."""
    with Slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        pixels, _ = slide.read_overview_downsampled(1)
    crop = overview(pixels[1920 : 1920 + 1024, 704 : 704 + 1024])
    assert tissue_mask(crop, "auto", 8.0).mean() > 0.95
    assert tissue_mask(crop, "otsu", 8.0).mean() < 0.7


@pytest.mark.parametrize(
    ("name", "tiles", "grey", "otsu", "threshold", "fixed"),
    [
        ("CMU-1-Small-Region.svs", 88, 28, 23, 63, 38),
        ("TCGA-CR-7395-01A-01-TS1.svs", 221, 143, 139, 72, 158),
    ],
)
def test_golden_counts_of_real_slides(shared_data, name, tiles, grey, otsu, threshold, fixed):
    with Slide(shared_data / "slides" / name) as slide:
        rgb, downsample = slide.read_overview_downsampled(1)
        coords = plan_coords(slide.bounds, 256.0)
    assert downsample == 1
    assert len(coords) == tiles
    saturation = np.asarray(Image.fromarray(rgb).convert("HSV"))[..., 1]
    assert (tile_fractions(grey_mask(rgb), coords, 256.0) >= 0.6).sum() == grey
    assert otsu_threshold(saturation) == threshold
    assert (tile_fractions(saturation_mask(rgb), coords, 256.0) >= 0.6).sum() == otsu
    assert (tile_fractions(saturation_mask(rgb, 20), coords, 256.0) >= 0.35).sum() == fixed
