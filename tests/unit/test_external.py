import pytest

from ds_wsi.bags.datasets import read_custom, read_tcga
from ds_wsi.bags.manifest import ManifestError
from ds_wsi.bags.prepare import write_external
from ds_wsi.bags.relabel import map_labels, order_classes, with_positive
from miniatures import CUSTOM, TCGA, camelyon16, custom, table, tcga, touch


def found(manifest):
    return {slide.slide_id: manifest.classes[slide.label] for slide in manifest.slides}


def problems_of(read, *arguments, **options):
    with pytest.raises(ManifestError) as caught:
        read(*arguments, **options)
    return [problem.split(". HINT")[0] for problem in caught.value.problems]


def test_a_label_of_a_patient_is_that_of_all_its_slides(tmp_path):
    """TCGA-PRAD: ISUP grades are known by patient."""
    rows = [("TCGA-83-5908", "10"), ("TCGA-21-1082", "2"), ("TCGA-21-9999", "2")]
    labels = table(tmp_path / "isup.csv", ("case_id", "isup"), rows[:2])
    manifest = read_tcga(tcga(tmp_path), labels, label_column="isup")
    assert manifest.classes == ("2", "10")
    assert found(manifest) == {TCGA[0][3]: "10", TCGA[1][3]: "10", TCGA[2][3]: "2"}
    one = read_tcga(tmp_path, labels, label_column="isup", one_per_patient=True)
    assert [slide.slide_id for slide in one.slides] == [TCGA[0][3], TCGA[2][3]]
    table(tmp_path / "isup.csv", ("case_id", "isup"), rows)
    assert problems_of(read_tcga, tmp_path, labels, label_column="isup") == [
        "image must be a file, got none at the folder (slide TCGA-21-9999, isup.csv, row 4)"
    ]


def test_any_csv_by_its_headings(tmp_path):
    rows = [
        (f"{name}.svs", label, patient, "val" if patient == "P3" else "train", "0.25", "x")
        for name, label, patient in CUSTOM
    ]
    labels = table(custom(tmp_path) / "l.csv", ("img", "y", "who", "part", "um", "other"), rows)
    columns = {"slide_column": "img", "label_column": "y", "patient_column": "who"}
    manifest = read_custom(tmp_path, labels, **columns, split_column="part", mpp_column="um")
    assert manifest.classes == ("mutant", "wt")
    assert found(manifest) == {name: label for name, label, _ in CUSTOM}
    assert [slide.patient_id for slide in manifest.slides] == [row[2] for row in CUSTOM]
    assert [slide.split for slide in manifest.slides] == ["train"] * 6 + ["validation"] * 2
    assert {slide.mpp for slide in manifest.slides} == {0.25}
    table(labels, ("img", "y"), [("scan_1", "wt"), ("case_1", "mutant")])
    touch(tmp_path, "leica/scan_1.SCN")  # another of OpenSlide's formats, in capitals
    assert [
        slide.path.name for slide in read_custom(tmp_path, labels, **columns | {"patient_column": None}).slides
    ] == [
        "scan_1.SCN",
        "case_1.svs",
    ]
    table(labels, ("img", "y", "who", "part", "um", "other"), rows)
    plain = read_custom(tmp_path, labels, slide_column="img", label_column="y")
    assert {(slide.split, slide.mpp) for slide in plain.slides} == {(None, None)}
    assert [slide.patient_id for slide in plain.slides] == [row[0] for row in CUSTOM]


def test_every_problem_of_a_csv_is_listed(tmp_path):
    touch(custom(tmp_path), "other/case_0.svs")
    rows = [
        ("case_0", "wt", "P0", "train", ""),
        ("scans/case_1.svs", "", "P0", "train", "fine"),
        ("case_2", "wt", "", "deb", "0.5"),
        ("case_99", "mutant", "P9", "test", ""),
    ]
    labels = table(tmp_path / "l.csv", ("slide_id", "label", "who", "part", "um"), rows)
    options = {"patient_column": "who", "split_column": "part", "mpp_column": "um"}
    assert problems_of(read_custom, tmp_path, labels, **options) == [
        f"slide must be one file, got {tmp_path}/other/case_0.svs, {tmp_path}/scans/case_0.svs "
        "(slide case_0, l.csv, row 2)",
        "label must be given, got none (slide case_1, l.csv, row 3)",
        "mpp must be a number of um/px, got 'fine' (l.csv, row 3)",
        "who must name the patient, got nothing (l.csv, row 4)",
        "part must be one of train, validation, test, got 'deb' (l.csv, row 4)",
        "image must be a file, got none of that name in the folder (slide case_99, l.csv, row 5)",
    ]
    table(
        tmp_path / "l.csv", ("slide_id", "label", "who", "part", "um"), [("scans/case_0.svs", "wt", "P0", "train", "")]
    )
    assert "labels must take at least two values" in problems_of(read_custom, tmp_path, labels, **options)[0]
    assert problems_of(read_custom, tmp_path, labels, slide_column="image", label_column="y") == [
        "labels must have a column 'image', got slide_id, label, who, part, um (l.csv)",
        "labels must have a column 'y', got slide_id, label, who, part, um (l.csv)",
    ]
    assert "folder of the slides must be there" in problems_of(read_custom, tmp_path / "none")[0]


def test_classes_of_an_external_set_are_mapped_explicitly_or_refused(tmp_path):
    cohort = read_custom(custom(tmp_path), tmp_path / "mutations.csv", slide_column="image", label_column="egfr")
    mapped = map_labels(cohort, ("negative", "positive"), {"wt": "negative", "mutant": "positive"})
    assert mapped.classes == ("negative", "positive")
    assert found(mapped) == {name: {"wt": "negative", "mutant": "positive"}[label] for name, label, _ in CUSTOM}
    # A class that is called the same needs no entry; one that the cohort lacks is fine.
    assert found(map_labels(cohort, ("wt", "other", "mutant"))) == found(cohort)
    with pytest.raises(ValueError, match=r"got mutant, wt: the cohort's are mutant, wt .*, the model's 0, 1. HINT"):
        map_labels(cohort, ("0", "1"))
    with pytest.raises(ValueError, match=r"got mutant: .* --map_labels mutant=\.\.\."):
        map_labels(cohort, ("0", "1"), {"wt": "0"})
    for wrong in ({"wild": "0"}, {"wt": "2"}):
        with pytest.raises(
            ValueError, match=r"--map_labels must map the cohort's classes to the model's, got '(wild|2)'"
        ):
            map_labels(cohort, ("0", "1"), wrong)


def test_an_external_manifest_has_the_models_classes(tmp_path):
    camelyon16(tmp_path)
    write_external(tmp_path / "out.csv", "camelyon16", tmp_path, {}, ("normal", "tumor"))
    text = (tmp_path / "out.csv").read_text()
    assert text.count(",normal,") == 3
    assert text.count(",tumor,") == 3
    with pytest.raises(ValueError, match=r"options of camelyon16 must be of .*, got drop"):
        write_external(tmp_path / "out.csv", "camelyon16", tmp_path, {"drop": "x"}, ("normal", "tumor"))


def test_the_order_of_the_classes_can_be_given(tmp_path):
    cohort = read_custom(custom(tmp_path), tmp_path / "mutations.csv", slide_column="image", label_column="egfr")
    turned = order_classes(cohort, ("wt", "mutant"))
    assert turned.classes == ("wt", "mutant")
    assert found(turned) == found(cohort)
    assert order_classes(cohort, None) is cohort
    with pytest.raises(ValueError, match=r"--classes must be the cohort's .*, mutant, wt, got a, b"):
        order_classes(cohort, ("a", "b"))


def test_files_of_one_name_are_slides_of_their_folders(tmp_path, caplog):
    """A folder per patient, and in each 1.svs and 2.svs; a name that is there once stays."""
    for name in ("P0/1.svs", "P0/2.svs", "P1/1.svs", "P1/2.svs", "P1/3.svs"):
        touch(tmp_path, name)
    rows = [("P0/1.svs", "x"), ("P0\\2.svs", "y"), ("P1/1", "x"), ("P1/2.svs", "y"), ("3", "x")]
    table(tmp_path / "labels.csv", ("slide_id", "label"), rows)
    with caplog.at_level("INFO", "ds_wsi"):
        manifest = read_custom(tmp_path)
    assert [(slide.slide_id, str(slide.path.relative_to(tmp_path))) for slide in manifest.slides] == [
        ("P0_1", "P0/1.svs"),
        ("P0_2", "P0/2.svs"),
        ("P1_1", "P1/1.svs"),
        ("P1_2", "P1/2.svs"),
        ("3", "P1/3.svs"),
    ]
    assert "2 names of files repeat: these slides are named by path" in caplog.text
    touch(tmp_path, "P0/1_1.svs", "P0_1/1.svs")
    table(tmp_path / "labels.csv", ("slide_id", "label"), [("1", "x"), ("P1/2.svs", "y")])
    assert problems_of(read_custom, tmp_path)[0].startswith("slide must be one file, got")


def test_columns_that_look_like_others_are_told(tmp_path, caplog):
    labels = table(
        custom(tmp_path) / "l.csv",
        ("slide_id", "label", "case", "Split", "age"),
        [("case_0", "x", 1, 2, 3), ("case_1", "y", 1, 2, 3)],
    )
    with caplog.at_level("INFO", "ds_wsi"):
        read_custom(tmp_path, labels)
    assert "columns that are not used: case, Split, age" in caplog.text
    assert "column 'case' looks like the patient. HINT: --patient_column 'case'" in caplog.text
    assert "column 'Split' looks like the split. HINT: --split_column 'Split'" in caplog.text
    caplog.clear()
    read_custom(tmp_path, labels, patient_column="case")
    assert "looks like the patient" not in caplog.text


def test_words_for_none_and_spellings_are_refused_in_label_files_too(tmp_path):
    rows = [("case_0", "x", "P"), ("case_1", "NA", "?"), ("case_2", "y", "Q"), ("case_3", "Y", "R")]
    labels = table(custom(tmp_path) / "l.csv", ("slide_id", "label", "who"), rows)
    assert problems_of(read_custom, tmp_path, labels, patient_column="who") == [
        "label must be spelled one way for a class, got 'Y' in 1, 'y' in 1 rows",
        "label must be given, got 'NA' (slide case_1, l.csv, row 3)",
        "who must name the patient, got '?' (l.csv, row 3)",
    ]


def test_a_file_that_is_not_there_is_told_with_the_nearest(tmp_path):
    labels = table(custom(tmp_path) / "l.csv", ("slide_id", "label"), [("case_00", "x"), ("case_1", "y")])
    with pytest.raises(
        ManifestError, match=r"slide case_00, l.csv, row 2\). HINT: nearest are case_0, .*--slide_column"
    ):
        read_custom(tmp_path, labels)


def test_numbers_of_a_spreadsheet_with_decimal_commas(tmp_path):
    labels = table(
        custom(tmp_path) / "l.csv", ("slide_id", "label", "um"), [("case_0", "x", "0,25"), ("case_1", "y", "")], ";"
    )
    assert [slide.mpp for slide in read_custom(tmp_path, labels, mpp_column="um").slides] == [0.25, None]


def test_the_positive_class_becomes_the_second_of_two(tmp_path):
    cohort = read_custom(custom(tmp_path), tmp_path / "mutations.csv", slide_column="image", label_column="egfr")
    assert cohort.classes == ("mutant", "wt")
    assert with_positive(cohort, None) is cohort
    assert with_positive(cohort, "wt") == cohort
    turned = with_positive(cohort, "mutant")
    assert turned.classes == ("wt", "mutant")
    assert found(turned) == found(cohort)
    assert [slide.label for slide in turned.slides] == [1 - slide.label for slide in cohort.slides]
    with pytest.raises(ValueError, match=r"must be one of two classes, got other of mutant, wt .*HINT"):
        with_positive(cohort, "other")
    with pytest.raises(ValueError, match=r"must be one of two classes, got wt of mutant, wt, x"):
        with_positive(map_labels(cohort, ("mutant", "wt", "x")), "wt")
