import csv
import json

import pytest

from ds_wsi.bags.manifest import ManifestError, parse_manifest, read_manifest

ROWS = [
    {"slide_id": "007", "path": "a.svs", "label": "tumor", "patient_id": "p1", "split": "train", "mpp": "0.25"},
    {"slide_id": "008", "path": "sub/b.svs", "label": "normal", "patient_id": "p2", "split": "val", "mpp": ""},
    {"slide_id": "9e1", "path": "c.svs", "label": "normal", "patient_id": "p3", "split": "test", "mpp": ""},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.svs", "sub/b.svs", "c.svs"):
        (tmp_path / name).touch()
    return tmp_path


def write_csv(path, rows, delimiter=",", encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write(folder, kind, rows=ROWS):
    path = folder / f"cohort.{kind.split('-')[0]}"
    if kind in ("csv", "tsv"):
        return write_csv(path, rows, "\t" if kind == "tsv" else ",")
    if kind == "csv-bom":
        return write_csv(path, rows, encoding="utf-8-sig")
    import datasets

    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def edited(*changes):
    """ROWS with (row, field, value) changes."""
    rows = [dict(row) for row in ROWS]
    for number, field, value in changes:
        rows[number][field] = value
    return rows


@pytest.mark.parametrize("kind", ["csv", "csv-bom", "tsv", "jsonl", "parquet", "saved"])
def test_every_kind_of_file_gives_the_same_cohort(folder, kind, tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    manifest = read_manifest(write(folder, kind))
    assert [slide.slide_id for slide in manifest.slides] == ["007", "008", "9e1"]
    assert [slide.path for slide in manifest.slides] == [folder / row["path"] for row in ROWS]
    assert [slide.split for slide in manifest.slides] == ["train", "validation", "test"]
    assert [slide.patient_id for slide in manifest.slides] == ["p1", "p2", "p3"]
    assert [slide.mpp for slide in manifest.slides] == [0.25, None, None]
    assert manifest.classes == ("normal", "tumor")
    assert [slide.label for slide in manifest.slides] == [1, 0, 0]
    assert manifest.in_split("validation") == manifest.slides[1:2]


def test_typed_columns_serve_as_well(folder, tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    rows = [
        {"slide_id": f"s{label}", "path": path, "label": label, "mpp": mpp, "patient_id": None}
        for label, path, mpp in ((10, "a.svs", 0.5), (2, "c.svs", None))
    ]
    path = folder / "typed.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    manifest = read_manifest(path)
    assert manifest.classes == ("2", "10")
    assert [slide.mpp for slide in manifest.slides] == [0.5, None]
    assert [slide.patient_id for slide in manifest.slides] == ["s10", "s2"]


def test_optional_columns_can_be_absent_and_a_slide_is_then_its_own_patient(folder):
    rows = [{key: row[key] for key in ("slide_id", "path", "label")} for row in ROWS]
    manifest = read_manifest(write(folder, "csv", rows))
    assert {slide.split for slide in manifest.slides} == {None}
    assert [slide.patient_id for slide in manifest.slides] == ["007", "008", "9e1"]


def test_absolute_paths_are_kept(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "x.svs"
    elsewhere.touch()
    manifest = read_manifest(write(folder, "csv", edited((0, "path", str(elsewhere)))))
    assert manifest.slides[0].path == elsewhere


def test_spaces_around_values_and_columns_are_dropped(folder):
    (folder / "m.csv").write_text("slide_id , path, label\n s1 ,a.svs , x\ns2, c.svs,y \n")
    manifest = read_manifest(folder / "m.csv")
    assert [slide.slide_id for slide in manifest.slides] == ["s1", "s2"]
    assert manifest.classes == ("x", "y")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(("10", "9", "2"), ("2", "9", "10")), (("1", "0", "-1"), ("-1", "0", "1")), (("b", "10", "9"), ("10", "9", "b"))],
)
def test_classes_are_sorted_numbers_by_value(folder, labels, classes):
    rows = edited(*((number, "label", label) for number, label in enumerate(labels)))
    assert read_manifest(write(folder, "csv", rows)).classes == classes


def test_given_classes_are_the_order_of_the_logits(folder):
    manifest = read_manifest(write(folder, "csv"), classes=("tumor", "normal", "other"))
    assert manifest.classes == ("tumor", "normal", "other")
    assert [slide.label for slide in manifest.slides] == [0, 1, 1]


@pytest.mark.parametrize("alias", ["val", "valid", "validation"])
def test_validation_has_aliases(folder, alias):
    assert read_manifest(write(folder, "csv", edited((1, "split", alias)))).slides[1].split == "validation"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ((1, "slide_id", "007"), "slide_id must be unique, got '007' in rows 2 and 3"),
        ((1, "slide_id", ""), "slide_id must be non-empty and fit for a file name, got '' (row 3)"),
        ((1, "slide_id", "../x"), "slide_id must be non-empty and fit for a file name, got '../x' (row 3)"),
        (
            (2, "path", "no.svs"),
            "path must be a file, got 'no.svs', which is none under {folder} (slide 9e1, row 4)",
        ),
        ((2, "path", ""), "path must be a file, got '', which is none under {folder} (slide 9e1, row 4)"),
        ((2, "path", "sub"), "path must be a file, got 'sub', which is none under {folder} (slide 9e1, row 4)"),
        ((2, "label", ""), "label must be one of normal, tumor, got '' (slide 9e1, row 4)"),
        ((2, "split", "dve"), "split must be one of train, validation, test, got 'dve' (slide 9e1, row 4)"),
        ((2, "split", ""), "split must be given for every slide or for none, got 1 without (9e1)"),
        ((0, "mpp", "0,25"), "mpp must be a number of um/px, got '0,25' (slide 007, row 2)"),
        ((0, "label", "normal"), "label must take at least two values, got normal"),
        ((2, "patient_id", "p1"), "patient p1 must be in one split, got train (007) and test (9e1)"),
    ],
)
def test_each_problem_alone(folder, change, problem):
    _, problems = parse_manifest(write(folder, "csv", edited(change)))
    assert [text.split(". HINT: ")[0] for text in problems] == [problem.format(folder=folder)]
    assert all(text.endswith(".") and text.split(". HINT: ")[1] for text in problems)


def test_a_label_that_is_no_class_is_named(folder):
    with pytest.raises(ManifestError, match=r"label must be one of normal, benign, got 'tumor' \(slide 007, row 2\)"):
        read_manifest(write(folder, "csv"), classes=("normal", "benign"))


def test_all_problems_are_listed_together_and_numbered(folder):
    rows = edited(
        (0, "mpp", "x"), (1, "slide_id", "007"), (1, "path", "none"), (2, "split", "dve"), (1, "patient_id", "p1")
    )
    with pytest.raises(ManifestError, match=r"manifest .*cohort\.csv has 5 problems:") as caught:
        read_manifest(write(folder, "csv", rows))
    assert len(caught.value.problems) == 5
    for number, words in enumerate(("mpp must", "path must", "split must", "slide_id must", "patient p1 must"), 1):
        assert f"  {number}. {words}" in str(caught.value)


def test_what_is_no_manifest_is_named(folder):
    with pytest.raises(ManifestError, match=r"file must exist, got none\. HINT: check --manifest"):
        read_manifest(folder / "none.csv")
    with pytest.raises(ManifestError, match=r"must be \.csv, \.tsv, .*got '\.svs'"):
        read_manifest(folder / "a.svs")
    (folder / "empty.csv").write_text("slide_id,path,label\n")
    with pytest.raises(ManifestError, match="at least one slide"):
        read_manifest(folder / "empty.csv")
    (folder / "columns.csv").write_text("id,path\n1,a.svs\n")
    with pytest.raises(ManifestError, match="slide_id, label missing, got id, path"):
        read_manifest(folder / "columns.csv")


def test_a_spreadsheets_csv_is_read_or_named(folder):
    """Excel's CSV: semicolons, a mark of order, CRLF, a row that is cut short; what it may not be is told."""
    expected = read_manifest(write(folder, "csv"))
    path = folder / "cohort.csv"
    path.write_bytes(
        b"\xef\xbb\xbf" + path.read_bytes().replace(b",", b";").replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    )
    assert read_manifest(path) == expected
    path.write_bytes("slide_id,path,label\na,a.svs,gr\xfcn\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"must be text in UTF-8, got byte 0xfc at position \d+ \(.*cohort.csv\). HINT"
    ):
        read_manifest(path)
    path.write_text('slide_id,path,label\na,a.svs,"x, y"\nb,b.svs,x, low\n')
    with pytest.raises(ValueError, match=r"as many values as there are headings, 3, got more in 1 \(.*, row 3\). HINT"):
        read_manifest(path)
