"""Tables as people, spreadsheets and other projects write them; docs/tables.md's examples are read from the page."""

import json
import re
from pathlib import Path

import pytest

from ds_wsi.bags.delimited import read_delimited
from ds_wsi.bags.manifest import ManifestError, parse_manifest, read_manifest
from ds_wsi.bags.problems import SHOWN, condensed
from ds_wsi.bags.summary import class_warnings, cohort_table
from ds_wsi.bags.tables.headings import COLUMNS, meant
from ds_wsi.bags.tables.labels import sorted_labels
from ds_wsi.bags.tables.names import is_slide_id, slide_names
from ds_wsi.bags.tables.paths import path_problem
from ds_wsi.bags.tables.values import MISSING_WORDS, number_of, split_of
from ds_wsi.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "tables.md"


def example(name, folder):
    """The page's example of this name, as a file."""
    found = re.search(rf"<!-- {re.escape(name)} -->\n```csv\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (folder / name).write_text(found[1])
    return folder / name


def write(folder, *lines, name="m.csv", sep=","):
    path = folder / name
    path.write_text("\n".join(sep.join(map(str, line)) for line in lines) + "\n", encoding="utf-8")
    return path


def parsed(path, **options):
    """A table of features: no files of slides are needed."""
    manifest, problems = parse_manifest(path, options.pop("classes", None), need_slides=False, **options)
    assert problems == []
    return manifest


def problems_of(path, classes=None, **options):
    return parse_manifest(path, classes, need_slides=options.pop("need_slides", False), **options)[1]


def labels_of(manifest):
    return [manifest.label_name(slide) for slide in manifest.slides]


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


class TestPaths:
    def told(self, folder, text):
        rows = [("a", text, "x"), ("b", "b.svs", "y")]
        (folder / "b.svs").touch()
        (problem,) = problems_of(write(folder, ("slide_id", "path", "label"), *rows), need_slides=True)
        return problem

    def test_relative_to_the_present_folder(self, tmp_path, monkeypatch):
        (tmp_path / "slides").mkdir()
        (tmp_path / "csv").mkdir()
        (tmp_path / "slides" / "a.svs").touch()
        monkeypatch.chdir(tmp_path)
        told = self.told(tmp_path / "csv", "slides/a.svs")
        start = f"relative paths start at the manifest's folder, {tmp_path / 'csv'}"
        assert told.endswith(f"HINT: {start}; in the present folder it exists: write ../slides/a.svs.")
        assert self.told(tmp_path / "csv", "slides/none.svs").endswith(f"HINT: {start}.")
        assert self.told(tmp_path / "csv", "").endswith(f"HINT: {start}.")

    def test_of_windows(self, tmp_path):
        (tmp_path / "slides").mkdir()
        (tmp_path / "slides" / "a.svs").touch()
        assert self.told(tmp_path, "slides\\a.svs").endswith("HINT: write slides/a.svs.")
        assert "a path of Windows" in self.told(tmp_path, "C:\\slides\\a.svs")
        assert "a path of Windows" in self.told(tmp_path, "C:/slides/a.svs")

    def test_elsewhere(self, tmp_path):
        (tmp_path / "A.svs").touch()
        (tmp_path / "folder").mkdir()
        assert "fetch the slides first" in self.told(tmp_path, "s3://bucket/a.svs")
        assert f"HINT: write {Path.home()}/a.svs." in self.told(tmp_path, "~/a.svs")
        assert "it is a folder without DICOM" in self.told(tmp_path, "folder")
        (tmp_path / "folder" / "1").write_bytes(bytes(128) + b"DICM")
        assert path_problem("folder", tmp_path, "row 2") is None  # whether it is a slide tells its opening
        assert "there is A.svs, of which case counts" in self.told(tmp_path, "a.svs")


class TestFiles:
    def test_what_spreadsheets_leave_is_read_right(self, tmp_path):
        path = tmp_path / "m.csv"
        body = "sep=;\r\nslide_id;label;mpp;;\r\n a ;x;0,25;;\r\n;;;;\r\n\r\nb;y;0,5;;\r\n;;;;\r\n"
        path.write_bytes(b"\xef\xbb\xbf" + body.encode())
        manifest = parsed(path)
        assert [(slide.slide_id, slide.mpp) for slide in manifest.slides] == [("a", 0.25), ("b", 0.5)]
        path.write_text("slide_id;label;mpp\na;x;0,25\n;;\nb;y;one\n")
        assert "got 'one' (slide b, row 4)" in problems_of(path)[0]

    def test_a_column_without_a_heading_is_pandas_index(self, tmp_path, caplog):
        path = write(tmp_path, ("", "slide_id", "label"), (0, "a", "x"), (1, "b", "y"))
        with caplog.at_level("INFO", "ds_wsi"):
            assert len(parsed(path).slides) == 2
        assert caplog.text == ""
        with pytest.raises(ValueError, match=r"got none \(columns 1, 3\)"):
            read_delimited(write(tmp_path, ("", "slide_id", ""), (0, "a", "x")))

    @pytest.mark.parametrize("suffix", [".xlsx", ".xls", ".ods"])
    def test_sheets_are_refused_with_the_remedy(self, tmp_path, suffix):
        (tmp_path / f"m{suffix}").write_bytes(b"PK\x03\x04")
        with pytest.raises(ManifestError, match="HINT: save the sheet as CSV UTF-8"):
            read_manifest(tmp_path / f"m{suffix}")

    @pytest.mark.parametrize("kind", ["list", "lines", "lines in .json", "columns", "pandas"])
    def test_json_in_its_forms(self, tmp_path, kind):
        rows = [{"slide_id": "007", "label": 1.0, "mpp": None}, {"slide_id": "1e5", "label": 0.0, "mpp": 0.5}]
        by_column = {name: [row[name] for row in rows] for name in rows[0]}
        text = {
            "list": json.dumps(rows),
            "columns": json.dumps(by_column),
            "pandas": json.dumps({name: dict(enumerate(values)) for name, values in by_column.items()}),
        }.get(kind, "\n".join(map(json.dumps, rows)))
        path = tmp_path / ("m.jsonl" if kind == "lines" else "m.json")
        path.write_text(text)
        manifest = parsed(path)
        assert [(slide.slide_id, slide.mpp) for slide in manifest.slides] == [("007", None), ("1e5", 0.5)]
        assert labels_of(manifest) == ["1", "0"]

    @pytest.mark.parametrize("text", ["[1, 2]", "{", '"x"', '[{"slide_id": 1}, 2]'])
    def test_json_that_is_no_table_is_refused(self, tmp_path, text):
        (tmp_path / "m.json").write_text(text)
        with pytest.raises(ManifestError, match="HINT"):
            read_manifest(tmp_path / "m.json")

    def test_pandas_parquet(self, tmp_path):
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(
            {
                "slide_id": ["a", "b", "c"],
                "label": pandas.Categorical(["x", "y", "x"]),
                "patient_id": [1.0, 1.0, float("nan")],
                "mpp": [0.25, float("nan"), 1.0],
            },
            index=[5, 6, 7],
        )
        frame["thumbnail"] = [b"x", b"y", b"z"]
        frame["coords"] = [[1, 2]] * 3
        frame.to_parquet(tmp_path / "m.parquet")
        manifest = parsed(tmp_path / "m.parquet")
        assert [slide.patient_id for slide in manifest.slides] == ["1", "1", "c"]
        assert [slide.mpp for slide in manifest.slides] == [0.25, None, 1.0]
        assert labels_of(manifest) == ["x", "y", "x"]
        frame.assign(label=[0.0, 1.0, float("nan")]).to_parquet(tmp_path / "m.parquet")
        assert "label must be one of 0, 1, got '' (slide c, row 3)" in problems_of(tmp_path / "m.parquet")[0]

    def test_a_torn_parquet_is_named(self, tmp_path):
        (tmp_path / "m.parquet").write_bytes(b"PAR1")
        with pytest.raises(ManifestError, match=r"whole \.parquet file"):
            read_manifest(tmp_path / "m.parquet")


class TestDatasets:
    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path_factory, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))

    def saved(self, labels, names=("tumor", "normal"), **more):
        import datasets

        rows = {"slide_id": [f"s{n}" for n in range(len(labels))], "label": labels, **more}
        return datasets.Dataset.from_dict(rows).cast_column("label", datasets.ClassLabel(names=list(names)))

    @pytest.mark.parametrize("kind", ["folder", "parquet", "arrow"])
    def test_the_names_of_a_class_label_are_the_classes_in_its_order(self, tmp_path, kind):
        dataset = self.saved([1, 0, 1]).select([2, 1, 0])
        if kind == "folder":
            dataset.save_to_disk(str(tmp_path / "m"))
            path = tmp_path / "m"
        elif kind == "parquet":
            dataset.to_parquet(str(path := tmp_path / "m.parquet"))
        else:
            dataset.flatten_indices().save_to_disk(str(tmp_path / "m"))
            path = next((tmp_path / "m").glob("*.arrow"))
        manifest = parsed(path)
        assert manifest.classes == ("tumor", "normal")
        assert labels_of(manifest) == ["normal", "tumor", "normal"]
        assert [slide.slide_id for slide in manifest.slides] == ["s2", "s1", "s0"]
        # In a model's order, by name.
        assert [slide.label for slide in parsed(path, classes=("normal", "tumor")).slides] == [0, 1, 0]

    def test_no_label_of_a_class_label_is_none(self, tmp_path):
        self.saved([1, 0, -1]).save_to_disk(str(tmp_path / "m"))
        assert "got '' (slide s2, row 3)" in problems_of(tmp_path / "m")[0]

    def test_the_splits_of_a_dataset_dict_are_the_column_split(self, tmp_path, caplog):
        import datasets

        parts = {"train": self.saved([1, 0]), "validation": self.saved([1]), "test": self.saved([0])}
        renamed = {
            name: part.map(lambda row, name=name: {"slide_id": name + row["slide_id"]}) for name, part in parts.items()
        }
        datasets.DatasetDict(renamed).save_to_disk(str(tmp_path / "m"))
        manifest = parsed(tmp_path / "m")
        assert [(slide.slide_id, slide.split) for slide in manifest.slides] == [
            ("trains0", "train"),
            ("trains1", "train"),
            ("validations0", "validation"),
            ("tests0", "test"),
        ]
        datasets.DatasetDict({"train": self.saved([1, 0])}).save_to_disk(str(tmp_path / "one"))
        with caplog.at_level("INFO", "ds_wsi"):
            assert {slide.split for slide in parsed(tmp_path / "one").slides} == {None}
        assert "its only split, train, is taken as the whole cohort" in caplog.text

    def test_a_dataset_dict_that_contradicts_itself_is_refused(self, tmp_path):
        import datasets

        parts = {"train": self.saved([1], split=["test"]), "test": self.saved([0], split=["test"])}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "m"))
        with pytest.raises(ManifestError, match=r"must be the dataset's own, train, got 'test'"):
            read_manifest(tmp_path / "m")
        parts = {"train": self.saved([1]), "test": self.saved([0], names=("normal", "tumor"))}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "n"))
        with pytest.raises(ManifestError, match="same columns and classes, got others in test"):
            read_manifest(tmp_path / "n")

    def test_a_folder_that_is_no_dataset_is_named(self, tmp_path):
        (tmp_path / "x.svs").touch()
        with pytest.raises(ManifestError, match=r"save_to_disk\), got x\.svs\. HINT"):
            read_manifest(tmp_path)


class TestLabelsWhereTheyAreUsed:
    rows = (("a", "x", "train", "P"), ("b", "NA", "fold 1", "P"))

    def test_unused(self, tmp_path):
        path = write(tmp_path, ("slide_id", "label", "split", "patient_id"), *self.rows)
        assert labels_of(parsed(path, labels="unused")) == ["x", ""]
        assert len(problems_of(path, labels="optional")) == 2

    @pytest.mark.parametrize("headings", [("slide_id",), ("slide_id", "label")])
    def test_optional(self, tmp_path, headings):
        path = write(tmp_path, headings, *[(name, "")[: len(headings)] for name in "abc"])
        assert [slide.label for slide in parsed(path, labels="optional", classes=("x", "y")).slides] == [None] * 3

    def test_optional_labels_are_checked_where_they_are_there(self, tmp_path):
        path = write(tmp_path, ("slide_id", "label"), ("a", "x"), ("b", "z"), ("c", "NA"), ("d", ""))
        problems = problems_of(path, ("x", "y"), labels="optional")
        assert [problem.partition(" (")[0] for problem in problems] == [
            "label must be one of x, y, got 'z'",
            "label must be one of x, y, got 'NA'",
        ]
        assert "--map_labels" in problems[0]
        assert "leave it empty where there is no label" in problems[1]

    def test_a_class_is_named_once(self, tmp_path):
        path = write(tmp_path, ("slide_id", "label"), ("a", "x"))
        with pytest.raises(ManifestError, match="classes must be named once, got x again"):
            parse_manifest(path, ("x", "x"), need_slides=False)


class TestMessages:
    def test_many_problems_of_a_kind_are_one_line_with_count_and_examples(self, tmp_path):
        rows = [(f"s{n}", f"slides/{n}.svs", "z" if n < 20 else "xy"[n % 2]) for n in range(1000)]
        with pytest.raises(ManifestError) as caught:
            read_manifest(write(tmp_path, ("slide_id", "path", "label"), *rows), ("x", "y"))
        first, *lines = str(caught.value).splitlines()
        assert first == f"manifest {tmp_path / 'm.csv'} has 1,020 problems:"
        assert len(caught.value.problems) == 1020
        assert len(lines) == 2
        assert lines[0].startswith(
            "  1. 20 times: label must be one of x, y, got 'z' (slide s0, row 2; slide s1, row 3; "
        )
        assert "and 15 more). HINT: correct the row" in lines[0]
        assert lines[1].startswith("  2. 1,000 times: path must be a file, got 'slides/0.svs'")
        assert "and 995 more. HINT: relative paths start" in lines[1]

    def test_what_names_the_slide_first_is_one_kind_too(self):
        problems = [f"slide s{n} must have one file of features, got none (folder)" for n in range(14)]
        (line,) = condensed(problems)
        assert line.startswith("14 times: slide s0 must have one file of features, got none (folder); slide s1 must")
        assert line.endswith("; and 9 more")

    def test_each_of_a_few_values_is_a_kind_with_its_own_remedy(self, tmp_path):
        rows = [(f"s{n}", ("Normal", "TUMOR")[n % 2]) for n in range(20)]
        lines = condensed(problems_of(write(tmp_path, ("slide_id", "label"), *rows), ("normal", "tumor")))
        assert len(lines) == 2
        assert lines[0].startswith("10 times: label must be one of normal, tumor, got 'Normal' (slide s0, row 2; ")
        assert [line[-22:] for line in lines] == [
            "5 more). HINT: write 'normal'."[-22:],
            "5 more). HINT: write 'tumor'."[-22:],
        ]

    def test_few_problems_are_whole_lines_in_their_order(self):
        problems = [f"a must be {n}, got x (row {n}). HINT: y." for n in range(SHOWN)] + ["b must be c"]
        assert condensed(problems) == problems

    def test_the_block_and_the_warnings(self, tmp_path):
        rows = [
            ("a", "x", "train", "P"),
            ("b", "y", "train", "P"),
            ("c", "x", "validation", "Q"),
            ("d", "z", "test", "R"),
        ]
        manifest = parsed(write(tmp_path, ("slide_id", "label", "split", "patient_id"), *rows))
        assert cohort_table(manifest, (3, 5, 20, 1)).splitlines() == [
            "                    train  validation    test      all",
            "  slides                2           1       1        4",
            "  patients              1           1       1        3",
            "  label x               1           1       0        2",
            "  label y               1           0       0        1",
            "  label z               0           0       1        1",
            "  tiles                 8          20       1       29",
            "  tiles per slide  3 to 5    20 to 20  1 to 1  1 to 20",
        ]
        assert class_warnings(manifest) == [
            "class x has no slide in the test split, which leaves its metrics undefined",
            "class y has no slide in the test split, which leaves its metrics undefined",
            "class z occurs in test alone: nothing is learned of it. HINT: another split, or take its rows out",
        ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--encoder", "resnet19"), "encoder must be a timm model's name, .* got 'resnet19'. HINT: did you mean"),
        (
            ("--encoder", "resnet10t", "--encoder_weights", "none.safetensors"),
            r"encoder weights must be a file, got none",
        ),
        (("--encoder", "local-dir:none"), "none"),
    ],
)
def test_an_encoder_that_cannot_be_had_is_told_before_a_table_is_read(tmp_path, capsys, more, message):
    given = ["train", "--manifest", tmp_path / "none.csv", "--output_dir", tmp_path / "out", *more]
    assert main([str(word) for word in given]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert "none.csv" not in said
