"""Tables as people, spreadsheets and other projects write them: formats, headings, words, labels and numbers."""

import pytest
from table_examples import example, labels_of, parsed, problems_of, write

from ds_wsi.bags.manifest import ManifestError, parse_manifest, read_manifest
from ds_wsi.bags.tables.headings import COLUMNS, meant
from ds_wsi.bags.tables.labels import sorted_labels
from ds_wsi.bags.tables.names import is_slide_id, slide_names
from ds_wsi.bags.tables.values import MISSING_WORDS, number_of, split_of


class TestFormats:
    def test_ours(self, tmp_path, caplog):
        with caplog.at_level("INFO", "ds_wsi"):
            manifest = parsed(example("cohort.csv", tmp_path))
        assert [slide.split for slide in manifest.slides] == ["train", "validation", "test"]
        assert [slide.mpp for slide in manifest.slides] == [None, 0.25, None]
        assert caplog.text == ""

    def test_clams_case_is_the_patient(self, tmp_path, caplog):
        with caplog.at_level("INFO", "ds_wsi"):
            manifest = parsed(example("clam.csv", tmp_path))
        assert [slide.patient_id for slide in manifest.slides] == ["patient_0", "patient_0", "patient_1"]
        assert "read as CLAM's table: case_id is the patient" in caplog.text

    def test_beside_patient_id_clams_case_is_another_column(self, tmp_path, caplog):
        path = write(tmp_path, ("slide_id", "label", "case_id", "patient_id"), *[(n, n % 2, "c", n) for n in range(4)])
        with caplog.at_level("INFO", "ds_wsi"):
            assert [slide.patient_id for slide in parsed(path).slides] == ["0", "1", "2", "3"]
        assert "columns that are not used: case_id" in caplog.text

    def test_trident_names_files_and_needs_no_labels(self, tmp_path, caplog):
        path = example("trident.csv", tmp_path)
        for name in ("a/slide_1.svs", "b/slide_2.tiff"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).touch()
        with caplog.at_level("INFO", "ds_wsi"):
            manifest, problems = parse_manifest(path, labels="unused")
        assert problems == []
        assert [(slide.slide_id, slide.path.name, slide.mpp) for slide in manifest.slides] == [
            ("slide_1", "slide_1.svs", 0.25),
            ("slide_2", "slide_2.tiff", 0.5),
        ]
        assert "TRIDENT's list" in caplog.text
        with pytest.raises(ManifestError, match=r"columns slide_id, path, label; label missing.*HINT: add the column"):
            read_manifest(path)

    def test_files_of_one_name_are_told_apart_by_their_folders(self, tmp_path):
        path = write(tmp_path, ("wsi",), ("P1/1.svs",), ("P2/1.svs",), ("P2/2.svs",))
        assert [slide.slide_id for slide in parsed(path, labels="unused").slides] == ["P1_1", "P2_1", "2"]

    def test_slideflows_datasets_are_splits_where_they_say_so(self, tmp_path, caplog):
        path = example("slideflow.csv", tmp_path)
        with caplog.at_level("INFO", "ds_wsi"):
            manifest = parsed(path)
        assert [slide.patient_id for slide in manifest.slides] == ["patient1", "patient1", "patient2", "patient3"]
        assert [slide.split for slide in manifest.slides] == ["train", "train", "train", "test"]
        assert labels_of(manifest) == ["negative", "negative", "positive", "positive"]
        assert "slideflow's annotations" in caplog.text
        path.write_text(path.read_text().replace("eval", "TCGA"))
        with caplog.at_level("INFO", "ds_wsi"):
            assert {slide.split for slide in parsed(path).slides} == {None}
        assert "columns that are not used: dataset" in caplog.text
        by_patient = write(tmp_path, ("patient", "category"), ("p1", "a"), ("p2", "b"))
        assert [(slide.slide_id, slide.patient_id) for slide in parsed(by_patient).slides] == [
            ("p1", "p1"),
            ("p2", "p2"),
        ]

    @pytest.mark.parametrize("order", [("stamp_clini.csv", "stamp_slide.csv"), ("stamp_slide.csv", "stamp_clini.csv")])
    def test_stamps_two_tables_are_joined_by_patient(self, tmp_path, order, caplog):
        for name in order:
            example(name, tmp_path)
        with caplog.at_level("INFO", "ds_wsi"):
            manifest = parsed(",".join(str(tmp_path / name) for name in order))
        assert [slide.slide_id[8:] for slide in manifest.slides] == [
            "0001-01Z-00-DX1",
            "0001-01Z-00-DX2",
            "0002-01Z-00-DX1",
        ]
        assert [slide.patient_id[-1] for slide in manifest.slides] == ["1", "1", "2"]
        assert labels_of(manifest) == ["MSIH", "MSIH", "nonMSIH"]
        assert "isMSIH is the label" in caplog.text

    def test_stamps_slide_table_alone_has_no_labels(self, tmp_path):
        path = example("stamp_slide.csv", tmp_path)
        assert labels_of(parsed(path, labels="unused")) == ["", "", ""]
        with pytest.raises(ManifestError, match="label missing"):
            parse_manifest(path, need_slides=False)

    def test_a_slide_whose_patient_has_no_row_has_no_label(self, tmp_path):
        clini, slides = example("stamp_clini.csv", tmp_path), example("stamp_slide.csv", tmp_path)
        slides.write_text(slides.read_text() + "TCGA-AA-0009,x.h5\n")
        assert "got '' (slide x, row 5)" in problems_of(f"{clini},{slides}")[0]

    def test_one_of_stamps_tables_alone_is_told_to_need_the_other(self, tmp_path):
        with pytest.raises(ManifestError, match=r"clini table needs its slide table: clini\.csv,slide\.csv"):
            parse_manifest(example("stamp_clini.csv", tmp_path), need_slides=False)

    def test_stamps_tables_that_contradict_are_refused(self, tmp_path):
        clini, slides = example("stamp_clini.csv", tmp_path), example("stamp_slide.csv", tmp_path)
        text = clini.read_text()
        clini.write_text(text + "TCGA-AA-0001,nonMSIH\n")
        with pytest.raises(ManifestError, match=r"PATIENT must be unique in it, got again 'TCGA-AA-0001' \(row 4\)"):
            parse_manifest(f"{clini},{slides}", need_slides=False)
        clini.write_text(text.replace("isMSIH", "FILENAME"))
        with pytest.raises(ManifestError, match="two tables must be STAMP's"):
            parse_manifest(f"{clini},{slides}", need_slides=False)


class TestHeadings:
    @pytest.mark.parametrize(
        ("heading", "column"),
        [
            *(
                (name, "patient_id")
                for name in ("patient", "Patient_ID", "PATIENT ID", "case", "patientid", "patinet_id")
            ),
            *((name, "split") for name in ("Split", "fold", "fold_0", "splt", "set", "partition")),
            *((name, "mpp") for name in ("MPP", "resolution", "mpp_x", "microns_per_pixel")),
        ],
    )
    def test_another_spelling_of_a_known_column_is_refused_with_the_right_one(self, tmp_path, heading, column):
        path = write(tmp_path, ("slide_id", "label", heading), *[(n, n % 2, 1) for n in range(4)])
        (problem,) = problems_of(path)
        assert problem.startswith(f"column {column} must be written so, got {heading!r}. HINT: rename it to {column}")

    @pytest.mark.parametrize(
        ("heading", "column"),
        [
            ("Label", "label"),
            ("class", "label"),
            ("slide", "slide_id"),
            ("Slide ID", "slide_id"),
            ("filename", "slide_id"),
        ],
    )
    def test_a_required_column_under_another_name_is_named(self, tmp_path, heading, column):
        columns = {"slide_id": "slide_id", "label": "label"} | {column: heading}
        path = write(tmp_path, tuple(columns.values()), *[(n, n % 2) for n in range(4)])
        with pytest.raises(ManifestError, match=rf"{column} missing.*HINT: rename '{heading}' to {column}"):
            parse_manifest(path, need_slides=False)

    @pytest.mark.parametrize("heading", ["s0", "slide_id|label"])
    def test_a_file_without_headings_is_told_so(self, tmp_path, heading):
        with pytest.raises(ManifestError, match="HINT: the first row must hold the headings, divided by commas"):
            parse_manifest(write(tmp_path, (heading, "x"), ("s1", "y")), need_slides=False)

    @pytest.mark.parametrize("heading", ["Label", "label.1", "label_x", "LABEL"])
    def test_a_column_beside_another_spelling_of_it_is_refused(self, tmp_path, heading):
        path = write(tmp_path, ("slide_id", "label", heading), *[(n, n % 2, 1) for n in range(4)])
        (problem,) = problems_of(path)
        assert problem.startswith(f"column label must be given once, got {heading!r} beside it. HINT: delete")

    def test_others_are_named_on_one_line_of_the_log(self, tmp_path, caplog):
        others = ("age", "sex", "stain", "slide_width", "patient_age", "mpp_x", "mpp_y")
        path = write(tmp_path, ("slide_id", "label", "mpp", *others), *[(n, n % 2, 1, *others) for n in range(4)])
        with caplog.at_level("INFO", "ds_wsi"):
            parsed(path)
        assert f"columns that are not used: {', '.join(others)}" in caplog.text

    def test_what_is_not_used_may_be_called_anything(self, tmp_path):
        path = write(tmp_path, ("slide_id", "Label", "fold"), ("a", "", 0), ("b", "NA", 1))
        assert len(parsed(path, labels="unused").slides) == 2

    def test_known_columns_mean_nothing_else(self):
        assert [meant(name) for name in COLUMNS] == [None] * len(COLUMNS)

    def test_a_heading_given_twice_is_refused_by_column(self, tmp_path):
        path = write(tmp_path, ("slide_id", "label", "x", "label"), ("a", 1, 2, 3))
        with pytest.raises(ValueError, match=r"each heading must be given once, got label \(columns 2, 4\).*HINT"):
            parse_manifest(path)
        path = tmp_path / "m.json"
        path.write_text('[{"slide_id": "a", "label": "x", "label": "y"}]')
        with pytest.raises(ManifestError, match="given once, got label twice"):
            parse_manifest(path)


class TestMissingWords:
    @pytest.mark.parametrize("word", ["NA", "nan", "NaN", "None", "N/A", "null", "empty", "-", "?", "<NA>", "unknown"])
    def test_a_word_for_none_is_no_label_unless_classes_say_so(self, tmp_path, word):
        path = write(tmp_path, ("slide_id", "label"), ("a", "x"), ("b", "y"), ("c", word))
        (problem,) = problems_of(path)
        assert problem.startswith(f"label must be one of x, y, got {word!r} (slide c, row 4). HINT: fill it in")
        assert labels_of(parsed(path, classes=("x", "y", word))) == ["x", "y", word]

    @pytest.mark.parametrize("column", ["patient_id", "split", "mpp"])
    def test_nor_a_patient_a_split_or_a_resolution(self, tmp_path, column):
        value = {"patient_id": "P", "split": "train", "mpp": "0.5"}[column]
        rows = [("a", "x", value), ("b", "y", "NA")]
        (problem,) = problems_of(write(tmp_path, ("slide_id", "label", column), *rows))
        assert problem.startswith(f"{column} must")
        assert "got 'NA' (slide b, row 3). HINT: leave it empty" in problem

    def test_an_empty_patient_is_the_slide_itself_and_counted(self, tmp_path, caplog):
        path = write(tmp_path, ("slide_id", "label", "patient_id"), ("a", "x", "P"), ("b", "y", ""), ("c", "y", ""))
        with caplog.at_level("INFO", "ds_wsi"):
            assert [slide.patient_id for slide in parsed(path).slides] == ["P", "b", "c"]
        assert "2 slides without a patient_id are patients of their own" in caplog.text

    def test_labels_are_no_words_for_none(self):
        assert not MISSING_WORDS & {"normal", "negative", "no", "false", "0", "benign", "other"}


class TestSpellings:
    @pytest.mark.parametrize(
        "labels",
        [
            ("Tumor", "tumor"),
            ("1", "1.0"),
            ("01", "1"),
            ("1,0", "1"),
            ("high grade", "high-grade"),
            ("a\u200b", "a"),
            ("T 1", "t1"),
        ],
    )
    def test_two_spellings_of_a_class_are_refused_with_counts(self, tmp_path, labels):
        rows = [("a", labels[0]), ("b", labels[1]), ("c", labels[1]), ("d", "zzz")]
        path = write(tmp_path, ("slide_id", "label"), *rows, sep=";")
        (problem,) = problems_of(path)
        assert problem.startswith("label must be spelled one way for a class, got")
        assert f"{labels[1]!r} in 2" in problem
        assert f"HINT: write {labels[1]!r} everywhere, or give --classes" in problem
        assert len(parsed(path, classes=(*labels, "zzz")).slides) == 4

    @pytest.mark.parametrize("labels", [("T1-1", "T11"), ("3+4", "4+3"), ("1", "-1"), ("a", "b"), ("0-10", "010")])
    def test_other_labels_are_other_classes(self, tmp_path, labels):
        path = write(tmp_path, ("slide_id", "label"), ("a", labels[0]), ("b", labels[1]))
        assert sorted(parsed(path).classes) == sorted(labels)

    def test_a_label_that_is_a_given_class_in_another_spelling_is_told_so(self, tmp_path):
        path = write(tmp_path, ("slide_id", "label"), ("a", "tumor"), ("b", "Normal"))
        (problem,) = problems_of(path, ("normal", "tumor"))
        assert problem.endswith("got 'Normal' (slide b, row 3). HINT: write 'normal'.")

    def test_patients_that_may_be_one_are_warned_of(self, tmp_path, caplog):
        path = write(tmp_path, ("slide_id", "label", "patient_id"), ("a", "x", "P1"), ("b", "y", "p 1"))
        parsed(path)
        assert "patients that differ in spelling alone are taken as different ones: P1 and p 1" in caplog.text

    def test_minus_one_among_classes_is_warned_of(self, tmp_path, caplog):
        parsed(write(tmp_path, ("slide_id", "label"), ("a", "-1"), ("b", "0"), ("c", "1")))
        assert "label -1 is taken as a class, in 1 rows" in caplog.text

    def test_labels_that_are_numbers_are_sorted_by_value(self):
        assert sorted_labels(["10.0", "2.0", "0.5", ""]) == ("0.5", "2.0", "10.0")
        assert sorted_labels(["1,5", "0,25", "10"]) == ("0,25", "1,5", "10")
        assert sorted_labels(["1e1", "9"]) == ("9", "1e1")
        assert sorted_labels(["b", "10", "9"]) == ("10", "9", "b")

    def test_numbers(self):
        assert [number_of(text) for text in ("0.25", "1e-1", "+2", ".5", "-3")] == [0.25, 0.1, 2.0, 0.5, -3.0]
        assert [number_of(text) for text in ("0,25", "nan", "inf", "1_0", "0x1", "1e999", "", "0.25 um")] == [None] * 8
        assert number_of("0,25", decimal_comma=True) == 0.25
        assert number_of("1.000,5", decimal_comma=True) is None


class TestValues:
    @pytest.mark.parametrize(
        ("word", "split"),
        [
            *((word, "train") for word in ("train", "training", "Train", "TRAINING")),
            *((word, "validation") for word in ("val", "valid", "validation", "dev", "tune", "Val")),
            *((word, "test") for word in ("test", "testing", "TEST")),
        ],
    )
    def test_splits_in_their_words(self, word, split):
        assert split_of(word) == split

    @pytest.mark.parametrize(
        ("word", "hint"),
        [
            ("trian", "did you mean train?"),
            ("tests", "did you mean test?"),
            ("3", "a fold's number"),
            ("x", "write train"),
        ],
    )
    def test_other_words_are_refused_with_a_remedy(self, tmp_path, word, hint):
        (problem,) = problems_of(write(tmp_path, ("slide_id", "label", "split"), ("a", "x", word), ("b", "y", "test")))
        assert f"got {word!r} (slide a, row 2). HINT: {hint}" in problem

    @pytest.mark.parametrize("value", ["nan", "inf", "0", "-0.25", "0.25 um", "0,25"])
    def test_resolutions_that_are_none_are_refused_by_row(self, tmp_path, value):
        path = write(tmp_path, ("slide_id", "label", "mpp"), ("a", "x", f'"{value}"'), ("b", "y", "0.5"))
        (problem,) = problems_of(path)
        assert problem.startswith(f"mpp must be a number of um/px, got {value!r} (slide a, row 2). HINT: ")

    @pytest.mark.parametrize("name", ["a" * 201, "ä" * 101, "", "a/b", "a:b", "a\nb"])
    def test_names_that_no_file_can_have_are_refused(self, name):
        assert not is_slide_id(name)

    def test_names(self):
        assert is_slide_id("a" * 200)
        assert slide_names(["P1/1.svs", "P1\\2.svs", "./P2/1.svs"]) == ["P1_1", "2", "P2_1"]
