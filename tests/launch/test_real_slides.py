"""The whole pipeline on two real slides of different scanners, formats and resolutions; the labels are invented."""

import csv

import pytest

from runs import run, train_arguments

pytestmark = pytest.mark.launch


def test_the_pipeline_trains_and_reports_on_real_slides(shared_data, tmp_path):
    slides = shared_data / "slides"
    manifest = tmp_path / "real.csv"
    manifest.write_text(
        "slide_id,path,label,split,mpp\n"
        f"CMU-1,{slides / 'CMU-1-Small-Region.svs'},benign,train,\n"
        f"TCGA-CR,{slides / 'TCGA-CR-7395-01A-01-TS1.svs'},malignant,test,0.25\n"
    )
    options = ["--tile_size_px", "256", "--num_train_epochs", "1"]
    printed = run(["python", "launch/train.py", *train_arguments(manifest, tmp_path / "run", *options)])
    assert "no validation split" in printed
    with (tmp_path / "run/predictions.csv").open() as file:
        (row,) = csv.DictReader(file)
    # At 0.5 um/px a tile is 512 px of level 0, read from level 1: a quarter of the 142 tiles of level 0, about.
    assert row["slide_id"] == "TCGA-CR"
    assert 25 <= int(row["n_tiles"]) <= 40
    assert (tmp_path / "run/heatmaps/TCGA-CR.png").stat().st_size > 1000
    report = (tmp_path / "run/report.html").read_text()
    assert "TCGA-CR" in report
    assert "http://" not in report.replace("http://www.w3.org", "")


def test_broken_files_are_listed_together_before_training(shared_data, tmp_path):
    manifest = tmp_path / "broken.csv"
    rows = [f"{path.stem},{path},{index % 2}" for index, path in enumerate(sorted((shared_data / "broken").iterdir()))]
    manifest.write_text("slide_id,path,label\n" + "\n".join(rows) + "\n")
    with pytest.raises(AssertionError) as caught:
        run(["ds-wsi", "train", *train_arguments(manifest, tmp_path / "run")])
    printed = str(caught.value)
    assert "exited with 2" in printed
    assert "4 problems" in printed
    for words in (
        "none of them (slide broken",
        "got 352.778",
        "16 x 16 px",
        "Unsupported TIFF compression",
    ):
        assert words in printed, words
    assert "--slide_mpp" in printed
    assert "Traceback" not in printed
