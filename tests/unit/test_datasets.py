import csv
from collections import Counter

import numpy as np
import pytest

from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.datasets import read_camelyon16, read_camelyon17, read_panda, read_tcga
from ds_wsi.bags.manifest import ManifestError, read_manifest, write_manifest
from ds_wsi.cli import main
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.slides.pyramid import write_pyramid
from miniatures import CAMELYON16, CAMELYON17, PANDA, TCGA, camelyon16, camelyon17, panda, table, tcga, touch


def found(manifest):
    return {slide.slide_id: manifest.classes[slide.label] for slide in manifest.slides}


def problems_of(read, *arguments, **options):
    with pytest.raises(ManifestError) as caught:
        read(*arguments, **options)
    assert all(". HINT: " in problem for problem in caught.value.problems if "must be in one split" not in problem)
    return [problem.split(". HINT")[0] for problem in caught.value.problems]


def test_panda_as_kaggle_distributes_it(tmp_path):
    manifest = read_panda(panda(tmp_path))
    assert manifest.classes == ("0", "1", "2", "3", "4", "5")
    assert found(manifest) == {row[0]: row[2] for row in PANDA}
    assert [slide.center for slide in manifest.slides] == [row[1] for row in PANDA]
    assert [slide.patient_id for slide in manifest.slides] == [row[0] for row in PANDA]
    image = tmp_path / "train_images" / f"{PANDA[2][0]}.tiff"
    assert manifest.slides[2].path == image
    image.rename(image.with_suffix(".TIFF"))
    assert read_panda(tmp_path).slides[2].path == image.with_suffix(".TIFF")


def test_panda_slides_have_the_mpp_of_their_resolution_tags(tmp_path):
    panda(tmp_path)
    rng = np.random.default_rng(0)
    for row in PANDA:
        tissue = np.dstack([rng.integers(low, low + 60, (256, 256), dtype=np.uint8) for low in (150, 60, 140)])
        write_pyramid(tmp_path / "train_images" / f"{row[0]}.tiff", tissue, mpp=0.486)
    write_manifest(read_panda(tmp_path), tmp_path / "cohort.csv")
    policy = TilingPolicy(tile_size_px=64, mpp=0.486, min_tissue_fraction=0)
    cohort = load_cohort(tmp_path / "cohort.csv", policy, need_splits=False)
    assert [grid.slide_mpp for grid in cohort.grids] == pytest.approx([0.486] * len(PANDA), rel=1e-4)


def test_panda_drops_the_noisy_and_says_so(tmp_path, caplog):
    noisy = table(tmp_path / "noisy.csv", ("image_id", "reason"), [(PANDA[0][0], "marker")])
    (tmp_path / "noisy.txt").write_text(f"{PANDA[1][0]}\n\n{PANDA[0][0]}.tiff\n")
    assert set(found(read_panda(panda(tmp_path), drop=noisy))) == {row[0] for row in PANDA[1:]}
    with caplog.at_level("INFO", "ds_wsi"):
        assert set(found(read_panda(tmp_path, drop=tmp_path / "noisy.txt"))) == {row[0] for row in PANDA[2:]}
    assert "2 slides dropped" in caplog.text


def test_panda_without_all_images_is_refused_or_counted(tmp_path, caplog):
    (panda(tmp_path) / "train_images" / f"{PANDA[1][0]}.tiff").unlink()
    assert problems_of(read_panda, tmp_path) == [
        f"image must be a file, got none at {tmp_path}/train_images/{PANDA[1][0]}.tiff (slide {PANDA[1][0]}, "
        "train.csv, row 3)"
    ]
    with caplog.at_level("INFO", "ds_wsi"):
        assert len(read_panda(tmp_path, missing_ok=True).slides) == 4
    assert "1 without an image left out" in caplog.text


def test_every_problem_of_panda_is_listed(tmp_path):
    rows = [list(row) for row in PANDA]
    rows[0][2] = "6"
    rows[1][1] = "Karolinska"
    rows[2][3] = "4+6"
    rows[3][0] = rows[2][0]
    rows.append(["../x", "radboud", "1", "3+3"])
    rows.append(["absent", "radboud", "1", "3+3"])
    noisy = table(tmp_path / "noisy.csv", ("image_id",), [("unknown",)])
    assert problems_of(read_panda, panda(tmp_path, rows), drop=noisy) == [
        "slide to drop must be in train.csv, got 'unknown' (noisy.csv, row 2)",
        "isup_grade must be one of 0, 1, 2, 3, 4, 5, got '6' (train.csv, row 2)",
        "data_provider must be one of karolinska, radboud, got 'Karolinska' (train.csv, row 3)",
        "gleason_score must be negative or two patterns such as 3+4, got '4+6' (train.csv, row 4)",
        f"slide's name must be in one row, got '{PANDA[2][0]}' in train.csv, row 4 and train.csv, row 5",
        "slide's name must be non-empty and fit for a file name, got '../x' (train.csv, row 7)",
        f"image must be a file, got none at {tmp_path}/train_images/absent.tiff (slide absent, train.csv, row 8)",
    ]


def test_camelyon16_has_its_official_split_and_the_label_is_not_the_name(tmp_path):
    manifest = read_camelyon16(camelyon16(tmp_path))
    assert manifest.classes == ("normal", "tumor")
    assert found(manifest) == {row[0][:-4]: row[1] for row in CAMELYON16}
    assert {slide.slide_id for slide in manifest.in_split("test")} == {"test_001", "test_003"}
    assert len(manifest.in_split("train")) == 4
    assert [slide.center for slide in manifest.slides] == [row[3] for row in CAMELYON16]
    stages = read_camelyon16(tmp_path, target="stage")
    assert stages.classes == ("negative", "itc", "micro", "macro")
    assert found(stages) == {row[0][:-4]: row[2] for row in CAMELYON16}


def test_camelyon16_in_one_folder_serves_as_well(tmp_path):
    table(tmp_path / "reference.csv", ("image", "type", "class", "center"), CAMELYON16)
    touch(tmp_path / "images", *(row[0] for row in CAMELYON16))
    assert len(read_camelyon16(tmp_path).slides) == 6


def test_corrections_override_labels_and_remove_slides(tmp_path, caplog):
    rows = [("normal_034.tif", "1"), ("tumor_012", "normal"), ("a/tumor_024.tif", "remove"), ("test_001", "tumor")]
    corrections = table(tmp_path / "plus.csv", ("image", "label"), rows)
    with caplog.at_level("INFO", "ds_wsi"):
        labels = found(read_camelyon16(camelyon16(tmp_path), corrections=corrections))
    assert labels == {
        "normal_001": "normal",
        "normal_034": "tumor",
        "tumor_012": "normal",
        "test_001": "tumor",
        "test_003": "normal",
    }
    assert "changes 2 labels and removes 1 slides" in caplog.text


def test_every_problem_of_camelyon16_is_listed(tmp_path):
    rows = [list(row) for row in CAMELYON16]
    rows[0][1] = "healthy"
    rows[1][2] = "micro"
    rows[2][3] = "5"
    rows[3][0] = "tumor_24.tif"
    table(tmp_path / "plus.csv", ("slide", "label"), [("normal_999", "1"), ("test_003", "2")])
    touch(camelyon16(tmp_path, rows), "training/tumor/tumor_24.tif")
    (tmp_path / "testing/images/test_001.tif").unlink()
    assert problems_of(read_camelyon16, tmp_path, corrections=tmp_path / "plus.csv") == [
        "corrected label must be one of normal, tumor, remove, got '2' (plus.csv, row 3)",
        "type must be one of normal, tumor, got 'healthy' (reference.csv, row 2)",
        "class of type normal must be one of negative, got 'micro' (reference.csv, row 3)",
        "center must be one of 0, 1, got '5' (reference.csv, row 4)",
        "image must be normal_, tumor_ or test_ with three digits and .tif, got 'tumor_24.tif' (reference.csv, row 5)",
        f"image must be a file, got none at {tmp_path}/testing/images/test_001.tif, {tmp_path}/images/test_001.tif "
        "(slide test_001, reference.csv, row 6)",
        "corrected slide must be in the label file, got 'normal_999' (plus.csv, row 2)",
    ]


def test_camelyon17_skips_the_patients_rows_and_keeps_patients_and_centers(tmp_path):
    manifest = read_camelyon17(camelyon17(tmp_path))
    assert manifest.classes == ("negative", "itc", "micro", "macro")
    assert found(manifest) == {name[:-4]: stage for name, stage in CAMELYON17 if name.endswith(".tif")}
    assert [slide.patient_id for slide in manifest.slides] == [
        "patient_004",
        "patient_004",
        "patient_020",
        "patient_099",
    ]
    assert [slide.center for slide in manifest.slides] == ["0", "0", "1", "4"]
    assert {slide.split for slide in manifest.slides} == {None}
    assert found(read_camelyon17(tmp_path, target="tumor"))["patient_020_node_1"] == "tumor"


def test_camelyon17_splits_by_center_or_by_corrections_with_the_test_patients(tmp_path):
    held_out = read_camelyon17(camelyon17(tmp_path), test_centers=("4",))
    assert [slide.split for slide in held_out.slides] == ["train", "train", "train", "test"]
    touch(tmp_path, "testing/patients/patient_101/patient_101_node_3.tif")
    rows = [("patient_101_node_3.tif", "macro"), ("patient_004_node_0.tif", "remove")]
    corrections = table(tmp_path / "plus.csv", ("slide", "stage"), rows)
    manifest = read_camelyon17(tmp_path, corrections=corrections)
    assert [(slide.slide_id, slide.split) for slide in manifest.slides] == [
        ("patient_004_node_4", "train"),
        ("patient_020_node_1", "train"),
        ("patient_099_node_2", "train"),
        ("patient_101_node_3", "test"),
    ]


def test_every_problem_of_camelyon17_is_listed(tmp_path):
    rows = [list(row) for row in CAMELYON17]
    rows[0][1] = "pN3"
    rows[1][1] = "Negative "
    rows[2][0] = "patient_4_node_4.tif"
    touch(camelyon17(tmp_path, rows), "images/patient_4_node_4.tif")
    table(tmp_path / "plus.csv", ("slide", "label"), [("patient_099_node_2", "2"), ("patient_050_node_0", "itc")])
    assert problems_of(read_camelyon17, tmp_path, corrections=tmp_path / "plus.csv", test_centers=("5",)) == [
        "test center must be one of 0, 1, 2, 3, 4, got '5' (test_centers)",
        "corrected label must be one of negative, itc, micro, macro, remove, got '2' (plus.csv, row 2)",
        "patient's stage must be one of pN0, pN0(i+), pN1mi, pN1, pN2, got 'pN3' (stage_labels.csv, row 2)",
        "stage must be one of negative, itc, micro, macro, got 'Negative' (stage_labels.csv, row 3)",
        "patient must be patient_NNN.zip or patient_NNN_node_N.tif, got 'patient_4_node_4.tif' "
        "(stage_labels.csv, row 4)",
        "corrected slide must be in the label file, got 'patient_050_node_0' (plus.csv, row 3)",
    ]


def test_tcga_from_a_table_takes_the_patient_from_the_barcode(tmp_path):
    manifest = read_tcga(tcga(tmp_path), tmp_path / "labels.csv")
    assert manifest.classes == ("adenocarcinoma", "squamous")
    assert found(manifest) == {row[3]: row[1] for row in TCGA}
    assert [slide.patient_id for slide in manifest.slides] == ["TCGA-83-5908", "TCGA-83-5908", "TCGA-21-1082"]
    assert [slide.center for slide in manifest.slides] == ["Site-28", "Site-28", "Site-3"]
    one = read_tcga(tmp_path, tmp_path / "labels.csv", one_per_patient=True)
    assert [slide.slide_id for slide in one.slides] == [TCGA[0][3], TCGA[2][3]]
    with_column = read_tcga(tmp_path, tmp_path / "labels.csv", label_column="site")
    assert with_column.classes == ("Site-28", "Site-3")


def test_tcga_from_folders_that_name_the_class(tmp_path):
    for row, folder in zip(TCGA, ("LUAD", "LUAD", "LUSC")):
        touch(tmp_path / folder, f"{row[3]}.svs")
    manifest = read_tcga(tmp_path)
    assert manifest.classes == ("LUAD", "LUSC")
    assert Counter(found(manifest).values()) == {"LUAD": 2, "LUSC": 1}


def test_tcga_from_the_gdc_sample_sheet(tmp_path):
    heading = ("File ID", "File Name", "Data Category", "Data Type", "Project ID", "Case ID", "Sample ID")
    rows = [
        (
            f"id{i}",
            f"{row[3].upper() if i else row[3]}.svs",
            "Biospecimen",
            "Slide Image",
            project,
            f"{row[0]}, {row[0]}",
            "x",
        )
        for i, (row, project) in enumerate(zip(TCGA, ("TCGA-LUAD", "TCGA-LUAD", "TCGA-LUSC")))
    ]
    rows.append(("id9", "report.pdf", "Clinical", "Pathology Report", "TCGA-LUAD", "TCGA-83-5908", "x"))
    sheet = table(tmp_path / "sheet.tsv", heading, rows, delimiter="\t")
    for index, row in enumerate(TCGA):
        touch(tmp_path / f"id{index}", f"{row[3]}.svs")
    touch(tmp_path / "copies", f"{TCGA[0][3]}.svs")
    manifest = read_tcga(tmp_path, sheet)
    assert manifest.classes == ("TCGA-LUAD", "TCGA-LUSC")
    assert manifest.slides[0].path.parent.name == "id0"
    assert [slide.patient_id for slide in manifest.slides] == [row[0] for row in TCGA]


def test_every_problem_of_tcga_is_listed(tmp_path):
    rows = [list(row) for row in TCGA]
    rows[0][0] = "TCGA-83-5909"
    rows[1][1] = ""
    rows.append(["", "squamous", "", "slide_7"])
    rows.append(["", "squamous", "", TCGA[2][3]])
    root = touch(tcga(tmp_path, rows), "slide_7.svs", "a/TCGA-AA-0001.svs", "b/TCGA-AA-0001.tif")
    rows = [*rows, ["", "squamous", "", "TCGA-AA-0001"], ["", "squamous", "", "TCGA-AA-0002"]]
    tcga(root, rows)
    assert problems_of(read_tcga, root, root / "labels.csv") == [
        "patient must be the barcode's first 12 characters, TCGA-83-5908, got 'TCGA-83-5909' (labels.csv, row 2)",
        f"label must be given, got none (slide {TCGA[1][3]}, labels.csv, row 3)",
        "slide must be named by its barcode, TCGA-XX-XXXX-..., got 'slide_7' (labels.csv, row 5)",
        f"slide's name must be in one row, got '{TCGA[2][3]}' in labels.csv, row 4 and labels.csv, row 6",
        f"slide must be one file, got {root}/a/TCGA-AA-0001.svs, {root}/b/TCGA-AA-0001.tif "
        "(slide TCGA-AA-0001, labels.csv, row 7)",
        "image must be a file, got none at the folder (slide TCGA-AA-0002, labels.csv, row 8)",
    ]


def test_a_folder_or_file_that_is_not_the_datasets_is_named_once(tmp_path):
    assert problems_of(read_panda, tmp_path / "none") == [
        f"PANDA's folder must hold train_images, got nothing ({tmp_path}/none)"
    ]
    touch(tmp_path, "slides/x.tif")
    assert "must hold training or testing or images, got slides" in problems_of(read_camelyon16, tmp_path)[0]
    assert "folder must hold slides" in problems_of(read_tcga, tmp_path / "none")[0]
    (tmp_path / "train_images").mkdir()
    assert "labels must be a file, got none" in problems_of(read_panda, tmp_path)[0]
    table(tmp_path / "train.csv", ("image_id", "isup_grade"), [("a", "1")])
    assert [problem.split(",")[0] for problem in problems_of(read_panda, tmp_path)] == [
        "labels must have a column data_provider",
        "labels must have a column gleason_score",
    ]
    table(tmp_path / "train.csv", ("image_id", "data_provider", "isup_grade", "gleason_score"), [])
    assert "labels must hold at least one row" in problems_of(read_panda, tmp_path)[0]


def test_an_unknown_target_is_refused(tmp_path):
    with pytest.raises(ValueError, match="target must be one of stage, tumor, got 'grade'"):
        read_camelyon16(camelyon16(tmp_path), target="grade")


def test_a_written_manifest_reads_back_the_same(tmp_path):
    manifest = read_camelyon17(camelyon17(tmp_path / "data"), test_centers=("4",))
    write_manifest(manifest, tmp_path / "out" / "cohort.csv")
    again = read_manifest(tmp_path / "out" / "cohort.csv", classes=manifest.classes)
    assert again.slides == manifest.slides


def names_in(path, column):
    with path.open(newline="") as file:
        return [row[column] for row in csv.DictReader(file)]


def test_the_official_label_files_have_the_known_counts(shared_data, tmp_path, caplog):
    labels = shared_data / "labels"
    reference = labels / "camelyon16_reference.csv"
    touch(tmp_path / "c16/images", *names_in(reference, "image"))
    sixteen = read_camelyon16(tmp_path / "c16", reference)
    assert Counter(found(sixteen).values()) == {"normal": 239, "tumor": 160}
    test = Counter(sixteen.classes[slide.label] for slide in sixteen.in_split("test"))
    assert test == {"normal": 80, "tumor": 49}
    stages = labels / "camelyon17_stage_labels.csv"
    touch(tmp_path / "c17/images", *(name for name in names_in(stages, "patient") if name.endswith(".tif")))
    with caplog.at_level("INFO", "ds_wsi"):
        seventeen = read_camelyon17(tmp_path / "c17", stages)
    assert "100 patient rows skipped, 500 slide rows" in caplog.text
    assert Counter(found(seventeen).values()) == {"negative": 323, "itc": 35, "micro": 57, "macro": 85}
    assert len({slide.patient_id for slide in seventeen.slides}) == 100
    assert set(Counter(slide.center for slide in seventeen.slides).values()) == {100}
    lung = labels / "slideflow_tcga_lung.csv"
    touch(tmp_path / "lung", *(f"{name}.svs" for name in names_in(lung, "slide")))
    tcga = read_tcga(tmp_path / "lung", lung)
    assert Counter(found(tcga).values()) == {"adenocarcinoma": 467, "squamous": 474}
    assert len({slide.patient_id for slide in tcga.slides}) == 941


def command(*arguments):
    return main(["manifest", *(str(argument) for argument in arguments)])


def test_the_command_writes_a_manifest_that_training_reads(tmp_path, capsys):
    camelyon16(tmp_path)
    options = ("camelyon16", "--data_dir", tmp_path, "--output", tmp_path / "c.csv")
    assert command(*options, "--validation-fraction", 0.5) == 0
    counts = {"train": 2, "validation": 2, "test": 2}
    first, *block = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path}/c.csv\t6 slides\t--classes normal,tumor"
    assert [line.split() for line in block] == [
        ["train", "validation", "test", "all"],
        ["slides", "2", "2", "2", "6"],
        ["patients", "2", "2", "2", "6"],
        ["label", "normal", "1", "1", "1", "3"],
        ["label", "tumor", "1", "1", "1", "3"],
    ]
    assert Counter(slide.split for slide in read_manifest(tmp_path / "c.csv").slides) == counts


def test_the_command_writes_one_manifest_a_split(tmp_path, capsys):
    options = ("panda", "--data_dir", panda(tmp_path), "--output", tmp_path / "p.csv")
    assert command(*options, "--folds", 2, "--split_seed", 5) == 0
    assert len({(tmp_path / f"p_{run}.csv").read_text() for run in range(2)}) == 2
    for fold in range(2):
        ids = [row[0] for row in PANDA]
        table(tmp_path / f"clam/splits_{fold}.csv", ("", "train", "val", "test"), [(0, ids[fold], "", ids[2])])
    assert command(*options, "--split_file", tmp_path / "clam", "--keep_listed") == 0
    assert [len(read_manifest(tmp_path / f"p_{fold}.csv", list("012345")).slides) for fold in range(2)] == [2, 2]
    assert "p_1.csv\t2 slides" in capsys.readouterr().out


def test_the_command_refuses_what_does_not_fit(tmp_path, capsys):
    options = ("panda", "--data_dir", panda(tmp_path), "--output", tmp_path / "p.csv")
    assert command(*options, "--target", "stage") == 2
    assert "options of panda must be of labels, drop, missing_ok, got target" in capsys.readouterr().err
    assert command(*options, "--folds", 2, "--monte_carlo_runs", 2) == 2
    assert "at most one of --split_file, --folds and --monte_carlo_runs" in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()
