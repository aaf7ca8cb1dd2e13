import csv
import os
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import tifffile
from dicom_slide import write_dicom
from PIL import Image

from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.manifest import SPLITS, ManifestError
from ds_wsi.bags.slide_policy import SKIPPED_FILE, SkippedSlide, SlidePolicy, write_skipped
from ds_wsi.slides.coords import export_trident, import_trident, read_grid, write_grid
from ds_wsi.slides.fingerprint import slide_fingerprint
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.slides.pyramid import write_pyramid
from ds_wsi.slides.slide import Slide
from ds_wsi.slides.tiling import tile_slide

POLICY = TilingPolicy(tile_size_px=64)


def picture(side=256, tissue=True):
    image = np.full((side, side, 3), 243, dtype=np.uint8)
    if tissue:
        noise = np.random.default_rng(side).integers(-8, 8, (side - 32, side - 32, 1))
        image[32:, 32:] = np.array([200, 110, 160]) + noise
    return image


def write_plain(path, image):
    """A TIFF that tells no resolution."""
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, tile=(64, 64), photometric="rgb", metadata=None, software=False)


def write_manifest(folder, rows, columns=("slide_id", "path", "label", "patient_id", "split", "mpp")):
    path = folder / "manifest.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    write_pyramid(folder / "good.tiff", picture(), mpp=0.5)
    write_pyramid(folder / "other.tiff", picture(320), mpp=0.5)
    write_pyramid(folder / "dpi72.tiff", picture(), mpp=352.78)
    write_pyramid(folder / "tiny.tiff", picture(48), mpp=0.5)
    write_pyramid(folder / "blank.tiff", picture(tissue=False), mpp=0.5)
    write_plain(folder / "plain.tiff", picture())
    (folder / "text.svs").write_text("no slide")
    return folder


def row(slides, slide_id, name, label, **more):
    return {"slide_id": slide_id, "path": str(slides / name), "label": label, **more}


def two(slides, name="good.tiff", **more):
    return [row(slides, "one", name, "a", **more), row(slides, "two", "other.tiff", "b")]


def load(folder, rows, policy=POLICY, **options):
    return load_cohort(write_manifest(folder, rows), policy, need_splits=False, **options)


def test_the_demo_cohort(demo_manifest):
    cohort = load_cohort(demo_manifest, POLICY, workers=2)
    assert [len(cohort.rows(split)) for split in SPLITS] == [4, 2, 2]
    assert [slide.slide_id for slide in cohort.manifest.slides] == [grid.slide_id for grid in cohort.grids]
    assert cohort.lengths == tuple(len(grid.coords) for grid in cohort.grids)
    assert min(cohort.lengths) >= 1


def test_every_problem_of_the_table_is_listed_before_a_slide_is_opened(slides, tmp_path, monkeypatch):
    monkeypatch.setattr("ds_wsi.bags.cohort.Slide", None)
    rows = [
        row(slides, "twice", "good.tiff", "a", split="train", patient_id="p"),
        row(slides, "twice", "good.tiff", "b", split="test", patient_id="p"),
        row(slides, "lost", "none.tiff", "a", split="train"),
        row(slides, "label", "good.tiff", "c", split="train"),
        row(slides, "split", "good.tiff", "a", split="tset"),
        row(slides, "mpp", "good.tiff", "a", split="train", mpp="x"),
        row(slides, "text", "text.svs", "a", split="train"),
    ]
    with pytest.raises(ManifestError) as caught:
        load_cohort(write_manifest(tmp_path, rows), POLICY, classes=("a", "b"), tiles_dir=tmp_path / "t", workers=2)
    text = str(caught.value)
    for expected in (
        "slide_id must be unique, got 'twice' in rows 2 and 3",
        "patient p must be in one split, got train (twice) and test (twice)",
        "(slide lost, row 4)",
        "label must be one of a, b, got 'c' (slide label, row 5)",
        "got 'tset' (slide split, row 6). HINT: did you mean test?",
        "mpp must be a number of um/px, got 'x' (slide mpp, row 7)",
    ):
        assert expected in text, expected
    assert len(caught.value.problems) == 6, text
    assert not (tmp_path / "t").exists()


def test_every_problem_of_the_slides_is_listed_together(slides, tmp_path):
    rows = [
        row(slides, "good", "good.tiff", "b"),
        row(slides, "text", "text.svs", "a"),
        row(slides, "plain", "plain.tiff", "a"),
        row(slides, "dpi72", "dpi72.tiff", "a"),
        row(slides, "tiny", "tiny.tiff", "a"),
        row(slides, "blank", "blank.tiff", "a"),
    ]
    with pytest.raises(ManifestError) as caught:
        load(tmp_path, rows, tiles_dir=tmp_path / "t", workers=2)
    text = str(caught.value)
    for expected in (
        f"format of OpenSlide's, got none of them (slide text, {slides / 'text.svs'})",
        f"got no mpp (slide plain, {slides / 'plain.tiff'})",
        "got 352.78 from",
        "--slide_mpp",
        f"must hold a tile of 64 px at level 0, got 48 x 48 px (slide tiny, {slides / 'tiny.tiff'})",
        f"tiles (slide blank, {slides / 'blank.tiff'})",
    ):
        assert expected in text, expected
    assert len(caught.value.problems) == 5, text


def test_one_class_only_is_refused(slides, tmp_path):
    with pytest.raises(ManifestError, match="label must take at least two values, got a"):
        load(tmp_path, [row(slides, "one", "good.tiff", "a"), row(slides, "two", "other.tiff", "a")])


@pytest.mark.parametrize("workers", [1, 4])
def test_slides_of_one_name_or_of_no_files_name_write_no_grid(slides, tmp_path, workers):
    rows = [row(slides, "same", "good.tiff", "ab"[number % 2]) for number in range(8)]
    rows += [row(slides, "../out", "good.tiff", "a"), row(slides, "own", "other.tiff", "a")]
    with pytest.raises(ManifestError) as caught:
        load(tmp_path, rows, tiles_dir=tmp_path / "tiles", workers=workers)
    assert len(caught.value.problems) == 8  # seven repeats and one name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.csv"]


def test_slide_mpp_is_for_slides_that_tell_none_and_changes_no_other(slides, tmp_path):
    rows = [
        row(slides, "plain", "plain.tiff", "a"),
        row(slides, "dpi72", "dpi72.tiff", "a"),
        row(slides, "good", "good.tiff", "b"),
        row(slides, "given", "plain.tiff", "b", mpp="0.5"),
    ]
    cohort = load(tmp_path, rows, slide_mpp=0.25)
    assert [slide.mpp for slide in cohort.manifest.slides] == [0.25, 0.25, None, 0.5]
    assert [grid.slide_mpp for grid in cohort.grids] == pytest.approx([0.25, 0.25, 0.5, 0.5], rel=1e-3)
    assert [grid.tile_size_level0_px for grid in cohort.grids] == pytest.approx([128, 128, 64, 64])
    with pytest.raises(ManifestError) as caught:
        load(tmp_path, rows)
    assert len(caught.value.problems) == 2


def test_an_implausible_slide_mpp_is_refused(slides, tmp_path):
    with pytest.raises(ManifestError, match="got 352 from --slide_mpp"):
        load(tmp_path, two(slides, "plain.tiff"), slide_mpp=352.0)


BAD = {
    "lost": ("none.tiff", "slide must be a file, got none"),
    "text": ("text.svs", "got none of them"),
    "plain": ("plain.tiff", "got no mpp"),
    "tiny": ("tiny.tiff", "must hold a tile"),
    "blank": ("blank.tiff", "tissue, got at most"),
}


def with_bad(slides):
    return [
        *two(slides),
        *(row(slides, name, file, "ab"[n % 2]) for n, (file, _) in enumerate(BAD.values()) for name in [list(BAD)[n]]),
    ]


def test_bad_slides_are_left_out_where_that_is_asked_for_and_listed(slides, tmp_path, caplog):
    with pytest.raises(ManifestError) as caught:
        load(tmp_path, with_bad(slides))  # of the table alone: slides are not opened before it is right
    assert len(caught.value.problems) == 1
    cohort = load(tmp_path, with_bad(slides), slides=SlidePolicy(skip_bad_slides=True))
    assert [slide.slide_id for slide in cohort.manifest.slides] == ["one", "two"]
    assert [grid.slide_id for grid in cohort.grids] == ["one", "two"]
    assert [slide.slide_id for slide in cohort.skipped] == list(BAD)
    for slide, (file, words) in zip(cohort.skipped, BAD.values()):
        assert words in slide.reason
        assert slide.path == str(slides / file)
        assert f"{slide.slide_id}: {slide.reason}" in caplog.text
    assert "5 of 7 slides left out" in caplog.text
    write_skipped(tmp_path, cohort.skipped)
    with (tmp_path / SKIPPED_FILE).open(newline="") as file:
        assert [entry["slide_id"] for entry in csv.DictReader(file)] == list(BAD)
    write_skipped(tmp_path, ())
    assert not (tmp_path / SKIPPED_FILE).exists()


def test_other_processes_leave_out_what_the_main_one_did_and_nothing_else(slides, tmp_path, caplog):
    main = load(tmp_path, with_bad(slides), slides=SlidePolicy(skip_bad_slides=True))
    caplog.clear()
    other = load(tmp_path, with_bad(slides), slides=SlidePolicy(skip_bad_slides=True, skipped=main.skipped))
    assert other.manifest == main.manifest
    assert other.skipped == main.skipped
    assert "left out" not in caplog.text  # the main process has told it
    # A slide that is good here was bad there: it is left out all the same.
    told = (*main.skipped, SkippedSlide("two", "", "of that machine"))
    assert [
        slide.slide_id
        for slide in load(
            tmp_path, with_bad(slides), slides=SlidePolicy(skip_bad_slides=True, skipped=told)
        ).manifest.slides
    ] == ["one"]
    # One that is bad here alone is an error: this process cannot train on what the others train on.
    with pytest.raises(ManifestError, match="slide blank"):
        load(tmp_path, with_bad(slides), slides=SlidePolicy(skip_bad_slides=True, skipped=main.skipped[:-1]))


def test_a_cohort_of_bad_slides_alone_is_refused(slides, tmp_path):
    rows = [row(slides, "text", "text.svs", "a"), row(slides, "plain", "plain.tiff", "b")]
    with pytest.raises(ManifestError) as caught:
        load(tmp_path, rows, slides=SlidePolicy(skip_bad_slides=True))
    assert len(caught.value.problems) == 2


def test_masks_from_outside_make_their_own_grids(slides, tmp_path, caplog):
    masks, tiles = tmp_path / "masks", tmp_path / "tiles"
    masks.mkdir()
    with pytest.raises(ManifestError, match=r"--tissue_masks must hold the mask of a slide.*got 0 other files.*HINT"):
        load(tmp_path, two(slides), slides=SlidePolicy(masks))
    mask = np.zeros((4, 4), np.uint8)
    mask[0, :2] = 255
    Image.fromarray(mask).save(masks / "one.png")
    rule = load(tmp_path, two(slides), tiles_dir=tiles)
    caplog.set_level("INFO", "ds_wsi")
    masked = load(tmp_path, two(slides), tiles_dir=tiles, slides=SlidePolicy(masks))
    assert masked.grids[0].coords.tolist() == [[0, 0], [64, 0]]
    np.testing.assert_array_equal(masked.grids[1].coords, rule.grids[1].coords)
    assert "1 of 2 slides by their masks, the others by --tissue" in caplog.text
    kept = (tiles / "one.safetensors").stat().st_mtime_ns
    load(tmp_path, two(slides), tiles_dir=tiles, slides=SlidePolicy(masks))
    assert (tiles / "one.safetensors").stat().st_mtime_ns == kept
    mask[3, 3] = 255
    Image.fromarray(mask).save(masks / "one.png")  # corrected
    corrected = load(tmp_path, two(slides), tiles_dir=tiles, slides=SlidePolicy(masks))
    assert corrected.grids[0].coords.tolist() == [[0, 0], [64, 0], [192, 192]]
    again = load(tmp_path, two(slides), tiles_dir=tiles)
    np.testing.assert_array_equal(again.grids[0].coords, rule.grids[0].coords)


def test_shares_are_told_and_extremes_are_warned_of_in_one_line_a_kind(tmp_path, caplog):
    caplog.set_level("INFO", "ds_wsi")
    for number in range(7):
        noise = np.random.default_rng(number).integers(-20, 20, (256, 256, 1))
        write_pyramid(tmp_path / f"{number}.tiff", (np.array([200, 110, 160]) + noise).astype(np.uint8), mpp=0.5)
    rows = [row(tmp_path, f"s{number}", f"{number}.tiff", "ab"[number % 2]) for number in range(7)]
    load(tmp_path, rows)
    (line,) = [message for message in caplog.messages if "nearly everywhere" in message]
    assert line.startswith("7 slides (s0, s1, s2, s3, s4, ...) are tissue nearly everywhere")
    assert "tissue: 100% of the scanned area (100% to 100% a slide); 112 of 112 tiles kept (100%)" in caplog.messages
    caplog.clear()
    load(tmp_path, rows, replace(POLICY, tissue="none"))
    assert not [message for message in caplog.messages if "tissue" in message]


def test_a_folder_of_dicom_is_a_slide_of_the_manifest(slides, tmp_path):
    write_dicom(tmp_path / "series" / "0.dcm", picture(), 0.5)
    cohort = load(tmp_path, [row(tmp_path, "one", "series", "a"), row(slides, "two", "other.tiff", "b")])
    assert len(cohort.grids[0]) == 9
    (tmp_path / "none").mkdir()
    with pytest.raises(ManifestError, match=r"\(slide one, row 2\). HINT: it is a folder without DICOM"):
        load(tmp_path, [row(tmp_path, "one", "none", "a"), row(slides, "two", "other.tiff", "b")])


def test_the_manifests_mpp_overrides_the_files(slides, tmp_path):
    cohort = load(tmp_path, two(slides, mpp="0.25"), slide_mpp=1.0)
    assert [grid.slide_mpp for grid in cohort.grids] == pytest.approx([0.25, 0.5], rel=1e-3)


def test_grids_are_kept_and_read_again_until_policy_or_mpp_change(slides, tmp_path):
    tiles = tmp_path / "tiles"
    first = load(tmp_path, two(slides), tiles_dir=tiles)
    files = {path.name: path.stat().st_mtime_ns for path in tiles.iterdir()}
    assert set(files) == {"one.safetensors", "two.safetensors"}
    second = load(tmp_path, two(slides), tiles_dir=tiles)
    assert {path.name: path.stat().st_mtime_ns for path in tiles.iterdir()} == files
    for before, after in zip(first.grids, second.grids):
        np.testing.assert_array_equal(before.coords, after.coords)
        for field in fields(before):
            if field.name != "coords":
                assert getattr(before, field.name) == getattr(after, field.name), field.name
    small = load(tmp_path, two(slides), TilingPolicy(tile_size_px=32), tiles_dir=tiles)
    assert {path.stat().st_mtime_ns for path in tiles.iterdir()}.isdisjoint(files.values())
    assert small.lengths[0] > 2 * first.lengths[0]
    assert read_grid(tiles / "one.safetensors").tile_size_px == 32
    load(tmp_path, two(slides, mpp="0.25"), TilingPolicy(tile_size_px=32), tiles_dir=tiles)
    assert read_grid(tiles / "one.safetensors").slide_mpp == 0.25


def test_a_grid_of_another_slide_file_is_tiled_anew(slides, tmp_path):
    load(tmp_path, two(slides), tiles_dir=tmp_path / "tiles")
    swapped = [row(slides, "one", "other.tiff", "a"), row(slides, "two", "good.tiff", "b")]
    cohort = load(tmp_path, swapped, tiles_dir=tmp_path / "tiles")
    assert [grid.slide_width_px for grid in cohort.grids] == [320, 256]


def test_a_torn_grid_is_a_problem_that_names_it(slides, tmp_path):
    load(tmp_path, two(slides), tiles_dir=tmp_path / "tiles")
    path = tmp_path / "tiles" / "one.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ManifestError, match=r"must be a whole safetensors file.*one\.safetensors.*HINT: delete it"):
        load(tmp_path, two(slides), tiles_dir=tmp_path / "tiles")


def test_an_imported_grid_is_taken_as_it_is_or_refused(slides, tmp_path):
    tiles = tmp_path / "tiles"
    with Slide(slides / "good.tiff", slide_id="one") as slide:
        own = tile_slide(slide, POLICY)
        export_trident(replace(own, coords=own.coords[:2]), tmp_path / "one.h5")
        write_grid(import_trident(tmp_path / "one.h5", slide), tiles / "one.safetensors")
    before = (tiles / "one.safetensors").read_bytes()
    # another tissue threshold is no reason to refuse it
    cohort = load(tmp_path, two(slides), replace(POLICY, min_tissue_fraction=0.2), tiles_dir=tiles)
    np.testing.assert_array_equal(cohort.grids[0].coords, own.coords[:2])
    for policy, ours in ((TilingPolicy(tile_size_px=32), "32 px at 0.5"), (replace(POLICY, mpp=1.0), "64 px at 1 ")):
        with pytest.raises(ManifestError, match="imported from trident") as caught:
            load(tmp_path, two(slides), policy, tiles_dir=tiles)
        assert ours in str(caught.value)
        assert "got 64 px at 0.5" in str(caught.value)
    assert (tiles / "one.safetensors").read_bytes() == before


def test_splits_are_drawn_where_they_are_needed(slides, tmp_path):
    for number in range(10):
        write_pyramid(tmp_path / f"{number}.tiff", picture(256 + number), mpp=0.5)
    rows = [row(tmp_path, f"s{number}", f"{number}.tiff", "ab"[number % 2]) for number in range(10)]
    path = write_manifest(tmp_path, rows)
    assert {slide.split for slide in load_cohort(path, POLICY, need_splits=False).manifest.slides} == {None}
    cohort = load_cohort(path, POLICY, seed=3)
    assert sorted(cohort.rows("train") + cohort.rows("validation") + cohort.rows("test")) == list(range(10))
    assert all(cohort.rows(split) for split in SPLITS)
    again = load_cohort(path, POLICY, seed=3)
    assert again.manifest == cohort.manifest


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def copy_to(path, source, touch=False):
    path.unlink(missing_ok=True)
    path.write_bytes(source.read_bytes())
    if touch:
        os.utime(path, (1, 1))
    return path


def one_slide(folder, path):
    return [{"slide_id": "one", "path": str(path), "label": "a"}, row(folder, "two", "other.tiff", "b")]


@pytest.mark.parametrize("keeps_size_and_time", [False, True])
def test_a_grid_is_known_by_its_slides_content_not_by_name_size_or_time(slides, tmp_path, caplog, keeps_size_and_time):
    tiles, path = tmp_path / "tiles", copy_to(tmp_path / "slide.tiff", slides / "good.tiff", touch=True)
    load(tmp_path, one_slide(slides, path), tiles_dir=tiles)
    before = read_grid(tiles / "one.safetensors")
    written = (tiles / "one.safetensors").stat().st_mtime_ns
    # the same bytes as another file, at another time, under another name, by a link: the grid is kept
    for same in (copy_to(tmp_path / "copy.tiff", path), copy_to(tmp_path / "slide.tiff", slides / "good.tiff")):
        load(tmp_path, one_slide(slides, same), tiles_dir=tiles)
    (tmp_path / "link.tiff").symlink_to(path)
    load(tmp_path, one_slide(slides, tmp_path / "link.tiff"), tiles_dir=tiles)
    assert (tiles / "one.safetensors").stat().st_mtime_ns == written
    assert messages(caplog) == []
    # another picture of the same size in px, written without compression: perhaps of the same bytes and time
    other = picture()
    other[32:128] = 243
    write_pyramid(tmp_path / "new.tiff", other, mpp=0.5)
    n_bytes = (slides / "good.tiff").stat().st_size
    if keeps_size_and_time:
        content = (tmp_path / "new.tiff").read_bytes()
        (tmp_path / "new.tiff").write_bytes(content + b"\0" * (n_bytes - len(content)))
        assert (tmp_path / "new.tiff").stat().st_size == n_bytes
    copy_to(path, tmp_path / "new.tiff", touch=True)
    load(tmp_path, one_slide(slides, path), tiles_dir=tiles)
    assert read_grid(tiles / "one.safetensors").coords.tolist() != before.coords.tolist()
    (message,) = messages(caplog)
    assert "1 of 2 grids were of another policy, mask or slide file" in message


def test_a_grid_of_an_earlier_version_is_taken_with_one_line(slides, tmp_path, caplog):
    tiles = tmp_path / "tiles"
    cohort = load(tmp_path, two(slides))
    for grid in cohort.grids:
        write_grid(grid, tiles / f"{grid.slide_id}.safetensors")  # without its slide's fingerprint, as they were
    before = {path.name: path.read_bytes() for path in tiles.iterdir()}
    load(tmp_path, two(slides), tiles_dir=tiles)
    assert {path.name: path.read_bytes() for path in tiles.iterdir()} == before
    (message,) = messages(caplog)
    assert "2 of 2 grids are of an earlier version" in message


@pytest.mark.parametrize("with_fingerprint", [False, True])
def test_an_imported_grid_of_another_slide_is_refused(slides, tmp_path, with_fingerprint):
    tiles = tmp_path / "tiles"
    name = "good.tiff" if with_fingerprint else "other.tiff"  # of the other size in px
    with Slide(slides / name, slide_id="one") as slide:
        export_trident(tile_slide(slide, POLICY), tmp_path / "one.h5")
        found = slide_fingerprint(slides / "other.tiff") if with_fingerprint else None
        write_grid(import_trident(tmp_path / "one.h5", slide), tiles / "one.safetensors", found)
    before = (tiles / "one.safetensors").read_bytes()
    with pytest.raises(
        ManifestError, match=r"imported from trident must be of the slide's present file.*import it again"
    ):
        load(tmp_path, two(slides), tiles_dir=tiles)
    assert (tiles / "one.safetensors").read_bytes() == before


@pytest.mark.parametrize("how", ["path", "link", "hard link", "copy"])
@pytest.mark.parametrize("splits", [("train", "test"), ("train", "validation"), ("train", "train"), ("", "")])
def test_one_file_under_two_ids_is_named_and_refused_across_splits(slides, tmp_path, caplog, how, splits):
    path = copy_to(tmp_path / "a.tiff", slides / "good.tiff")
    if how != "path":
        {"link": os.symlink, "hard link": os.link, "copy": shutil.copy}[how](path, tmp_path / "b.tiff")
    second = tmp_path / ("a.tiff" if how == "path" else "b.tiff")
    rows = [{"slide_id": "one", "path": path, "label": "a"}, {"slide_id": "two", "path": second, "label": "b"}]
    rows += [{"slide_id": "three", "path": slides / "other.tiff", "label": "b"}]
    rows = [{**each, "split": split} for each, split in zip(rows, (*splits, splits[0]), strict=True)]
    if splits[0] != splits[1]:
        with pytest.raises(ManifestError, match=r"one \(train, a\.tiff\) and two .*HINT"):
            load(tmp_path, rows)
    else:
        load(tmp_path, rows)
        (message,) = messages(caplog)
        assert message.startswith("one file under several ids: one (")


def test_splits_that_are_drawn_apart_are_refused_and_one_patient_is_the_remedy(slides, tmp_path):
    for number in range(9):
        write_pyramid(tmp_path / f"{number}.tiff", picture(256 + number), mpp=0.5)
    rows = [row(tmp_path, f"s{number}", f"{number % 9}.tiff", "ab"[number % 2]) for number in range(18)]
    with pytest.raises(ManifestError, match="one patient_id"):
        load_cohort(write_manifest(tmp_path, rows), POLICY)
    patients = [{**each, "patient_id": f"p{number % 9}"} for number, each in enumerate(rows)]
    assert len(load_cohort(write_manifest(tmp_path, patients), POLICY).grids) == 18


def test_without_write_grids_nothing_is_written(slides, tmp_path):
    load(tmp_path, two(slides), tiles_dir=tmp_path / "tiles", write_grids=False)
    assert not (tmp_path / "tiles").exists()
    load(tmp_path, two(slides), tiles_dir=tmp_path / "tiles")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "tiles").iterdir()}
    small = load(tmp_path, two(slides), TilingPolicy(tile_size_px=32), tiles_dir=tmp_path / "tiles", write_grids=False)
    assert small.tile_grids[0].tile_size_px == 32
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "tiles").iterdir()} == before
