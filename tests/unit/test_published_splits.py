import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_wsi.bags.manifest import SPLITS, Manifest, ManifestError, SlideEntry, patient_problems
from ds_wsi.bags.prepare import split_dataset
from ds_wsi.bags.published import apply_split, find_folds
from ds_wsi.bags.splits import fold_splits, hold_out_validation, monte_carlo_splits


def cohort(patients=6, slides=2):
    entries = [SlideEntry(f"s{p}_{k}", Path("x.svs"), p % 2, f"p{p}") for p in range(patients) for k in range(slides)]
    return Manifest(tuple(entries), ("0", "1"), "cohort")


def clam(path, train, val, test):
    rows = [
        [n, *(names[n] if n < len(names) else "" for names in (train, val, test))]
        for n in range(max(map(len, (train, val, test))))
    ]
    return write(path, ["", "train", "val", "test"], rows)


def write(path, heading, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([heading, *rows])
    return path


def names(*patients):
    return [f"s{patient}_{k}" for patient in patients for k in (0, 1)]


def split_of(manifest):
    return {split: [slide.slide_id for slide in manifest.in_split(split)] for split in SPLITS}


WANTED = {"train": names(0, 1, 2, 3), "validation": names(4), "test": names(5)}


def test_clams_ragged_columns(tmp_path):
    path = clam(tmp_path / "splits_0.csv", [f"{name}.svs" for name in names(0, 1, 2, 3)], names(4), names(5))
    assert split_of(apply_split(cohort(), path)) == WANTED
    # As pandas and spreadsheets write the empty cells, the headings and the delimiter.
    text = path.read_text().replace(",train", ", train").replace(",,", ",nan,NaN")
    path.write_text(text.replace(",", ";"))
    assert "nan;NaN" in path.read_text()
    assert split_of(apply_split(cohort(), path)) == WANTED


def renamed(manifest, name):
    """The cohort of six patients with other names for its twelve slides, by number."""
    slides = [replace(slide, slide_id=name(number)) for number, slide in enumerate(manifest.slides, 1)]
    return replace(manifest, slides=tuple(slides))


@pytest.mark.parametrize("written", ["{}.0", "{}", "{},0", "0{}"])
def test_slides_with_numbers_for_names_are_found_in_clams_columns_of_floats(tmp_path, caplog, written):
    """Pandas writes a column of whole numbers that is shorter than the others as floats."""
    path = tmp_path / "splits_0.csv"
    parts = (range(1, 9), range(9, 11), range(11, 13))
    clam(path, *[[written.format(number) for number in part] for part in parts])
    with caplog.at_level("INFO", "ds_wsi"):
        manifest = apply_split(renamed(cohort(), str), path)
    slide_ids = {split: [slide.slide_id for slide in manifest.in_split(split)] for split in SPLITS}
    assert slide_ids == {split: list(map(str, part)) for split, part in zip(SPLITS, parts)}
    assert ("12 slides are read as numbers" in caplog.text) == (written != "{}")
    apply_split(renamed(cohort(), "{:03d}".format), path)


def test_a_number_that_several_slides_have_for_a_name_is_none_of_them(tmp_path):
    path = clam(tmp_path / "splits_0.csv", ["1.0"], [], ["2.0"])
    slides = renamed(cohort(1, 2), lambda number: ("1", "01")[number - 1])
    with pytest.raises(ManifestError, match=r"slide of the split must be in the cohort, got '1\.0'"):
        apply_split(slides, path)


def test_slides_that_are_named_by_their_path_are_found_by_it(tmp_path):
    path = clam(tmp_path / "splits_0.csv", [f"P{n}/1.svs" for n in range(1, 11)], [], ["data\\P11\\1", "P12/1.tif"])
    with pytest.raises(ManifestError, match=r"must be in the cohort, got '1'"):
        apply_split(renamed(cohort(), "P{}_1".format), path)
    path.write_text(path.read_text().replace("data\\", ""))
    assert len(apply_split(renamed(cohort(), "P{}_1".format), path).in_split("test")) == 2


def test_clams_boolean_table(tmp_path):
    rows = [
        [name, *(str(name in WANTED[split]).upper() for split in SPLITS)]  # a spreadsheet's; Python's are below
        for name in (slide.slide_id for slide in cohort().slides)
    ]
    path = write(tmp_path / "b.csv", ["", "train", "val", "test"], rows)
    for _ in range(2):
        assert split_of(apply_split(cohort(), path)) == WANTED
        path.write_text(path.read_text().replace("TRUE", "True").replace("FALSE", "False"))


def test_panthers_folder_of_tables(tmp_path):
    heading = ["FILENAME", "data_provider", "isup_grade", "num_tissue_patches", "image_fn", "strat_label", "PATIENT"]
    for file, split in (("train", "train"), ("val", "validation"), ("test_K", "test")):
        rows = [[name, "radboud", int(name[1]) % 2, -1, f"{name}_crop.h5", 0, f"q{name}"] for name in WANTED[split]]
        write(tmp_path / f"{file}.csv", heading, rows)
    manifest = apply_split(cohort(), tmp_path, test="test_K")
    assert split_of(manifest) == WANTED
    assert manifest.slides[0].patient_id == "qs0_0"
    with pytest.raises(ManifestError, match=r"labels must be a file, got none \(.*test\.csv\)"):
        apply_split(cohort(), tmp_path)


def test_panthers_folder_without_validation(tmp_path):
    write(tmp_path / "train.csv", ["case_id", "slide_id"], [[name[:2], name] for name in names(0, 1, 2, 3, 4)])
    write(tmp_path / "test.csv", ["case_id", "slide_id"], [[name[:2], name] for name in names(5)])
    assert len(apply_split(cohort(), tmp_path).in_split("validation")) == 0


def test_every_problem_of_a_split_is_listed(tmp_path):
    train = ["s0_0", "s1_0", "s1_1", "s2_0", "s2_1", "s9_0"]
    path = clam(tmp_path / "splits_0.csv", train, [*names(4), "s1_0"], ["s0_1"])
    with pytest.raises(ManifestError) as caught:
        apply_split(cohort(5), path)
    assert [problem.split(". HINT")[0] for problem in caught.value.problems] == [
        "slide of the split must be in the cohort, got 's9_0' (splits_0.csv, row 7)",
        "slide must be in the split once, got 's1_0' in train (splits_0.csv, row 3) and validation "
        "(splits_0.csv, row 4)",
        f"slide must be in the split, got 's3_0' in none of it ({path})",
        f"slide must be in the split, got 's3_1' in none of it ({path})",
        f"patient p0 must be in one split, got train (s0_0) and test (s0_1) ({path})",
        f"patient p1 must be in one split, got validation (s1_0) and train (s1_1) ({path})",
    ]


def test_another_label_than_the_cohorts_is_named(tmp_path):
    write(tmp_path / "train.csv", ["slide_id", "isup_grade"], [[name, 1] for name in names(0)])
    write(tmp_path / "test.csv", ["slide_id", "isup_grade"], [[name, 1] for name in names(1)])
    with pytest.raises(ManifestError, match=r"label must be the cohort's, 0, got 1 \(slide s0_0, train.csv, row 2\)"):
        apply_split(cohort(2), tmp_path)


def test_slides_that_a_split_leaves_out_are_dropped_when_asked_and_counted(tmp_path, caplog):
    path = clam(tmp_path / "splits_0.csv", names(0, 1), names(2), names(3))
    with caplog.at_level("INFO", "ds_wsi"):
        assert len(apply_split(cohort(), path, keep_listed=True).slides) == 8
    assert "4 slides that it does not name are left out" in caplog.text


def test_a_leaking_split_is_refused_by_patient_and_taken_by_slide_with_a_warning(tmp_path, caplog):
    path = clam(tmp_path / "splits_0.csv", ["s0_0", "s1_0", "s1_1"], [], ["s0_1"])
    with pytest.raises(ManifestError, match=r"patient p0 must be in one split.*HINT: --split_level slide"):
        apply_split(cohort(2), path)
    with caplog.at_level("WARNING", "ds_wsi"):
        manifest = apply_split(cohort(2), path, level="slide")
    assert "slides of 2 patients" in caplog.text
    assert not patient_problems(manifest.slides)
    with pytest.raises(ValueError, match="level must be one of patient, slide, got 'tile'"):
        apply_split(cohort(2), path, level="tile")


def test_folds_are_found_by_number(tmp_path):
    for fold in (10, *range(10)):
        clam(tmp_path / f"splits_{fold}.csv", names(0), [], names(1))
    (tmp_path / "splits_0_bool.csv").touch()
    (tmp_path / "summary.csv").touch()
    assert [path.name for path in find_folds(tmp_path)] == [f"splits_{fold}.csv" for fold in range(11)]
    for fold in range(3):
        (tmp_path / "panther" / f"TCGA_BLCA_k={fold}").mkdir(parents=True)
    assert [path.name[-3:] for path in find_folds(tmp_path / "panther")] == ["k=0", "k=1", "k=2"]
    (tmp_path / "splits_4.csv").unlink()
    with pytest.raises(ManifestError, match=r"without a gap, got 0, 1, 2, 3, 5"):
        find_folds(tmp_path)
    with pytest.raises(ManifestError, match="got none"):
        find_folds(tmp_path / "nowhere")
    (tmp_path / "panther" / "TCGA_LUAD_k=0").mkdir()
    with pytest.raises(ManifestError, match="a fold must be there once"):
        find_folds(tmp_path / "panther")


@given(labels=st.lists(st.integers(0, 2), min_size=12, max_size=40), folds=st.integers(2, 5), seed=st.integers(0, 99))
def test_each_patient_is_tested_in_exactly_one_fold(labels, folds, seed):
    entries = [SlideEntry(f"s{n}_{k}", Path("x"), label, f"p{n}") for n, label in enumerate(labels) for k in (0, 1)]
    manifest = Manifest(tuple(entries), ("0", "1", "2"))
    drawn = fold_splits(manifest, folds, validation_fraction=0, seed=seed)
    tested = Counter(slide.slide_id for fold in drawn for slide in fold.in_split("test"))
    assert tested == dict.fromkeys((slide.slide_id for slide in entries), 1)
    for fold in drawn:
        assert not patient_problems(fold.slides)
        for label, total in Counter(labels).items():
            inside = sum(slide.label == label for slide in fold.in_split("test")) / 2
            assert abs(inside - total / folds) < 1


def test_folds_hold_out_validation_from_the_patients_not_tested():
    drawn = fold_splits(cohort(40), 5, validation_fraction=0.25, seed=1)
    assert [len(fold.in_split(split)) for fold in drawn for split in SPLITS] == [48, 16, 16] * 5
    assert drawn == fold_splits(cohort(40), 5, validation_fraction=0.25, seed=1)
    assert drawn != fold_splits(cohort(40), 5, validation_fraction=0.25, seed=2)
    with pytest.raises(ValueError, match="folds must be at least 2"):
        fold_splits(cohort(), 1)
    with pytest.raises(ManifestError, match="at least one patient each"):
        fold_splits(cohort(3), 4)


def test_options_without_effect_on_the_way_of_splitting_are_refused(tmp_path, caplog):
    whole = clam(tmp_path / "splits_0.csv", names(0, 1, 2, 3), names(4), names(5))
    without = clam(tmp_path / "none.csv", names(0, 1, 2, 3, 4), [], names(5))
    for options, message in (
        ({"runs": 2, "validation_fraction": 0.2}, r"--validation_fraction must not be given with --monte_carlo_runs"),
        ({"split": whole, "validation_fraction": 0.2}, r"with a split that has validation, got 0.2 \(.*splits_0.csv\)"),
        ({"folds": 2, "keep_listed": True}, r"--keep_listed must be given with --split_file"),
        ({"runs": -1}, r"monte_carlo_runs must be at least 1, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            split_dataset(cohort(), **options)
    (held,) = split_dataset(cohort(), split=without, validation_fraction=0.4)
    assert [len(held.in_split(split)) for split in SPLITS] == [6, 4, 2]
    # Of the official split the validation slides too are drawn by slide where that is asked for.
    official = apply_split(cohort(), without)
    (by_slide,) = split_dataset(official, validation_fraction=0.3, level="slide")
    assert "split by slide" in caplog.text
    assert [len(by_slide.in_split(split)) for split in SPLITS] == [7, 3, 2]


def test_monte_carlo_draws_differ_and_repeat_by_seed(caplog):
    drawn = monte_carlo_splits(cohort(40), 4, seed=7)
    assert all([len(run.in_split(split)) for split in SPLITS] == [64, 8, 8] for run in drawn)
    assert len({run.slides for run in drawn}) == 4
    assert drawn[:2] == monte_carlo_splits(cohort(40), 2, seed=7)
    assert not any(patient_problems(run.slides) for run in drawn)
    without = monte_carlo_splits(cohort(40), 1, (0.75, 0, 0.25))[0]
    assert [len(without.in_split(split)) for split in SPLITS] == [60, 0, 20]
    assert not caplog.records
    by_slide = monte_carlo_splits(cohort(40), 1, level="slide")[0]
    assert "split by slide" in caplog.text
    assert len({slide.patient_id for slide in by_slide.slides}) == 80


def test_validation_is_held_out_of_training_alone():
    drawn = fold_splits(cohort(20), 2, validation_fraction=0)[0]
    held = hold_out_validation(drawn, 0.2, seed=3)
    assert [len(held.in_split(split)) for split in SPLITS] == [16, 4, 20]
    assert held.in_split("test") == drawn.in_split("test")
    assert hold_out_validation(drawn, 0) is drawn
    with pytest.raises(ManifestError, match="must be held out of a training split, got none among 12 slides"):
        hold_out_validation(cohort(), 0.2)
    with pytest.raises(ValueError, match=r"validation fraction must be in \[0, 1\), got 1"):
        hold_out_validation(drawn, 1)
