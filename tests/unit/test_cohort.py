"""A manifest becomes a cohort: what is refused, left out, warned of and split."""

import csv
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from cohort_files import POLICY, copy_to, load, messages, picture, row, two, write_manifest, write_slides
from dicom_slide import write_dicom
from PIL import Image

from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.manifest import SPLITS, ManifestError
from ds_wsi.bags.slide_policy import SKIPPED_FILE, SkippedSlide, SlidePolicy, write_skipped
from ds_wsi.slides.pyramid import write_pyramid


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return write_slides(tmp_path_factory.mktemp("slides"))


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
