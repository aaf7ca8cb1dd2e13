from collections import Counter
from functools import partial

import numpy as np
import openslide
import pytest

from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.manifest import read_manifest
from ds_wsi.slides import demo
from ds_wsi.slides.demo import Centre, DemoPolicy, SparsePolicy, StainsPolicy, make_demo
from ds_wsi.slides.demo_drawing import draw_slide
from ds_wsi.slides.policy import TilingPolicy

SMALL = DemoPolicy(train=2, validation=2, test=2, min_side_px=352, max_side_px=416)


@pytest.fixture(scope="module")
def default_cohort(tmp_path_factory):
    return load_cohort(make_demo(tmp_path_factory.mktemp("default")), TilingPolicy(tile_size_px=64))


def test_slides_are_pyramids_that_openslide_reads_with_their_mpp(demo_manifest):
    mpps = set()
    for slide in read_manifest(demo_manifest).slides:
        with openslide.OpenSlide(str(slide.path)) as opened:
            assert opened.level_count >= 2
            assert opened.level_downsamples == pytest.approx([2**level for level in range(opened.level_count)])
            mpp = float(opened.properties["openslide.mpp-x"])
            # One physical size at any resolution: 384 px of 0.5 um, the multiple of 64 nearest to 352.
            assert opened.dimensions[0] * mpp == pytest.approx(384 * 0.5, rel=1e-4)
            mpps.add(round(mpp, 6))
    assert mpps == {0.25, 0.5}


def test_levels_show_the_same_slide(demo_manifest):
    with openslide.OpenSlide(str(read_manifest(demo_manifest).slides[0].path)) as slide:
        pictures = [slide.read_region((0, 0), level, size) for level, size in enumerate(slide.level_dimensions)]
        small = [np.asarray(picture.convert("RGB").resize((44, 44)), dtype=float) for picture in pictures]
    for level in small[1:]:
        assert np.abs(level - small[0]).mean() < 4


def test_the_default_cohort_is_what_the_main_job_needs(default_cohort):
    slides, lengths = default_cohort.manifest.slides, np.array(default_cohort.lengths)
    assert len(slides) >= 24
    assert Counter(slide.label for slide in slides) == {0: 50, 1: 50}
    assert lengths.max() >= 5 * lengths.min()
    # A class is not told by the length of its bags.
    by_class = [lengths[[slide.label == label for slide in slides]] for label in (0, 1)]
    assert abs(by_class[0].mean() - by_class[1].mean()) < 0.1 * lengths.mean()
    patients = Counter(slide.patient_id for slide in slides)
    assert set(patients.values()) == {2}


def test_colour_does_not_tell_the_classes_apart(default_cohort):
    means = {0: [], 1: []}
    for slide in default_cohort.manifest.slides:
        with openslide.OpenSlide(str(slide.path)) as opened:
            means[slide.label].append(np.asarray(opened.get_thumbnail((64, 64)), dtype=float).mean((0, 1)))
    normal, tumor = (np.array(means[label]) for label in (0, 1))
    spread = np.sqrt((normal.var(0) + tumor.var(0)) / 2)
    assert (np.abs(normal.mean(0) - tumor.mean(0)) < 0.5 * spread).all()


def test_the_same_seed_draws_the_same_bytes(tmp_path):
    first, second = (make_demo(tmp_path / name, SMALL).parent for name in "ab")
    other = make_demo(tmp_path / "c", DemoPolicy(**{**vars(SMALL), "seed": 1})).parent
    for path in sorted((first / "slides").iterdir()):
        assert path.read_bytes() == (second / "slides" / path.name).read_bytes()
        assert path.read_bytes() != (other / "slides" / path.name).read_bytes()


def test_a_cohort_is_drawn_once_and_an_interrupted_one_completed(tmp_path):
    manifest = make_demo(tmp_path, SMALL)
    files = sorted((tmp_path / "slides").iterdir())
    content = [path.read_bytes() for path in files]
    times = [path.stat().st_mtime_ns for path in files]
    assert make_demo(tmp_path, SMALL) == manifest
    assert [path.stat().st_mtime_ns for path in files] == times
    manifest.unlink()
    files[3].unlink()
    make_demo(tmp_path, SMALL)
    assert [path.read_bytes() for path in files] == content
    with pytest.raises(ValueError, match=r"must hold the demo of this policy.*HINT"):
        make_demo(tmp_path, DemoPolicy(**{**vars(SMALL), "seed": 1}))


@pytest.mark.parametrize("wrong", [{"train": 1}, {"min_side_px": 100}, {"min_side_px": 900}])
def test_a_cohort_that_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DemoPolicy(**wrong)


@pytest.fixture(scope="module")
def stains(tmp_path_factory):
    policy = StainsPolicy(train=12, validation=4, test=8, max_side_px=416)
    return load_cohort(make_demo(tmp_path_factory.mktemp("stains"), policy), TilingPolicy(tile_size_px=64))


def test_centres_differ_more_than_the_slides_of_one(stains):
    """Stain tells the centre, not the class, and those of the test slides are seen nowhere else."""
    means = {}
    for row, slide in enumerate(stains.manifest.slides):
        with openslide.OpenSlide(str(slide.path)) as opened:
            picture = np.asarray(opened.get_thumbnail((64, 64)), dtype=float)[..., :3]
        tissue = picture[picture.min(-1) < 200]
        pair = row // 2 % 6 if row < 16 else 6 + (row - 16) // 2 % 4
        means.setdefault(pair, []).append(tissue.mean(0))
    within = np.mean([np.std(colours, axis=0) for colours in means.values() if len(colours) > 1], axis=0)
    between = np.std([np.mean(colours, axis=0) for colours in means.values()], axis=0)
    assert (between > 1.5 * within).all()
    assert len(means) == 10
    labels = [slide.label for slide in stains.manifest.slides]
    assert all(labels[row : row + 2] == [0, 1] for row in range(0, 24, 2)), "both classes of every centre"


def test_a_centre_is_drawn_by_its_number_and_scans_alike():
    image = np.full((8, 8, 3), (200, 120, 170), dtype=np.uint8)
    assert Centre.draw(0, 3) == Centre.draw(0, 3) != Centre.draw(0, 4)
    plain = Centre((1.0, 1.0, 1.0), 1.0, (1.0, 1.0, 1.0), 0.0)
    assert np.abs(plain.scan(image).astype(int) - image).max() <= 1
    dark = Centre((1.5, 1.5, 1.5), 1.0, (1.0, 1.0, 1.0), 0.0)
    assert (dark.scan(image) < image).all()
    with pytest.raises(ValueError, match="centres must be at least 1, got 0"):
        StainsPolicy(centres=0)


def test_half_of_the_sparse_tumours_of_each_centre_have_few_rings():
    policy = SparsePolicy()
    shares = [demo._rings(index, policy) for index in range(152)]
    assert {share for share in shares[:120:2]} == {1.0, policy.few_rings}
    of_centre = {}
    for index, share in enumerate(shares):
        of_centre.setdefault(demo._centre(index, policy), set()).add(share)
    assert len(of_centre) == 10
    assert all(rings == {1.0, policy.few_rings} for rings in of_centre.values())
    assert {demo._rings(index, StainsPolicy()) for index in range(152)} == {1.0}


def test_fewer_rings_leave_ink_and_change_nuclei():
    """Rings carry the ink of solid nuclei: their share changes the picture, not its mean."""
    draw = partial(draw_slide, side_px=384, foci=3, contrast=1.0)
    drawn = {
        rings: draw(tumor=True, rng=np.random.default_rng(3), rings=rings).astype(float) for rings in (0.0, 0.06, 1.0)
    }
    normal = draw(tumor=False, rng=np.random.default_rng(3), rings=1.0)
    assert abs(drawn[0.06].mean() - drawn[1.0].mean()) < 1.0
    assert (drawn[1.0] != drawn[0.0]).any(-1).mean() > 0.1
    assert (drawn[0.0] == normal).all(), "a tumour without a ring is no tumour"
