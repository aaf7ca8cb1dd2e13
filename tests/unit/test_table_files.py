"""Tables that name files and data sets, and what is said of a table's labels and mistakes."""

import json
import re
from pathlib import Path

import pytest
from table_examples import labels_of, parsed, problems_of, write

from ds_wsi.bags.delimited import read_delimited
from ds_wsi.bags.manifest import ManifestError, parse_manifest, read_manifest
from ds_wsi.bags.problems import SHOWN, condensed
from ds_wsi.bags.summary import class_warnings, cohort_table
from ds_wsi.bags.tables.paths import path_problem
from ds_wsi.cli import main


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
