"""`ds-wsi tile` as a user calls it; and that messages name options that their command has."""

import argparse
import ast
import csv
import json
import logging
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from cohort_files import picture
from PIL import Image

import ds_wsi
from ds_wsi.cli import build_parser, main
from ds_wsi.runtime import progress as progress_module
from ds_wsi.runtime.progress import Progress, duration
from ds_wsi.slides.coords import read_grid
from ds_wsi.slides.pyramid import write_pyramid

READ_SLIDES = ("tile", "train", "protocol", "features", "evaluate", "heatmap")


@pytest.fixture
def cohort(tmp_path):
    write_pyramid(tmp_path / "one.tiff", picture(), mpp=0.5)
    write_pyramid(tmp_path / "two.tiff", picture(320), mpp=0.25)
    Image.fromarray(picture()).save(tmp_path / "three.png")
    with (tmp_path / "m.csv").open("w", newline="") as file:
        rows = [("one", "one.tiff", "a"), ("two", "two.tiff", "b"), ("three", "three.png", "a")]
        csv.writer(file).writerows([("slide_id", "path", "label"), *rows])
    return tmp_path


def tile(cohort, *options, output="tiles"):
    shared = ["--manifest", str(cohort / "m.csv"), "--tile_size_px", "32", "--output_dir", str(cohort / output)]
    return main(["tile", *shared, *(str(option) for option in options)])


def test_shares_a_summary_and_places_are_printed(cohort, capsys):
    assert tile(cohort, "--slide_mpp", 0.5, "--export", "clam", "--workers", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "one\t49 tiles\t77% tissue"
    assert re.fullmatch(r"two\t\d+ tiles\t\d+% tissue", lines[1])
    summary = next(line for line in lines if line.startswith(str(cohort / "tiles") + "\t"))
    for words in (
        "3 slides",
        "tiles of 32 px of ",
        "% kept)",
        "of the area is tissue",
        "level 0 (64 px resampled) (1 slides)",
        "0.5 um/px",
        " s",
    ):
        assert words in summary
    assert lines[-1] == f"{cohort / 'tiles/clam/patches'}\tcoordinates of 3 slides as CLAM has them"
    assert len(list((cohort / "tiles/clam/patches").glob("*.h5"))) == 3


def test_masks_go_out_are_corrected_and_come_back(cohort, capsys):
    options = ("--slide_mpp", 0.5)
    assert tile(cohort, *options, "--export_masks", cohort / "masks") == 0
    grid = read_grid(cohort / "tiles/one.safetensors")
    assert tile(cohort, *options, "--tissue_masks", cohort / "masks", output="again") == 0
    np.testing.assert_array_equal(read_grid(cohort / "again/one.safetensors").coords, grid.coords)
    path = cohort / "masks/one.geojson"
    collection = json.loads(path.read_text())
    collection["features"][0]["geometry"]["coordinates"] = [[[0, 0], [96, 0], [96, 32], [0, 32], [0, 0]]]
    path.write_text(json.dumps(collection))
    assert tile(cohort, *options, "--tissue_masks", cohort / "masks") == 0
    assert read_grid(cohort / "tiles/one.safetensors").coords.tolist() == [[0, 0], [32, 0], [64, 0]]
    # What was corrected is never written over.
    corrected = path.read_text()
    assert tile(cohort, *options, "--export_masks", cohort / "masks", output="third") == 0
    assert path.read_text() == corrected
    assert "3 masks were there already and were left as they are (one, two, three)" in capsys.readouterr().err
    same = ("--export_masks", cohort / "masks", "--tissue_masks", cohort / "masks/../masks")
    assert tile(cohort, *options, *same) == 2
    assert "must be another folder than --tissue_masks" in capsys.readouterr().err


def test_bad_slides_are_refused_or_left_out_with_a_list_at_the_end(cohort, capsys):
    assert tile(cohort) == 2  # the PNG tells no resolution
    assert "--slide_mpp" in capsys.readouterr().err
    assert tile(cohort, "--skip_bad_slides") == 0
    printed = capsys.readouterr()
    assert "three" not in printed.out
    assert printed.err.rstrip().splitlines()[-1].startswith("  three: slide must tell its resolution")
    with (cohort / "tiles/skipped_slides.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["slide_id"], row["path"]) == ("three", str(cohort / "three.png"))


@pytest.mark.parametrize(("rule", "count"), [("auto", 49), ("grey", 49), ("otsu", None), ("none", 64)])
def test_the_rule_is_the_one_that_is_named(cohort, rule, count):
    assert tile(cohort, "--slide_mpp", 0.5, "--tissue", rule) == 0
    grid = read_grid(cohort / "tiles/one.safetensors")
    assert (grid.policy.tissue, grid.policy.tissue_version) == (rule, 1)
    assert count is None or len(grid) == count


def test_imported_grids_keep_the_slides_own_resolution(cohort, capsys):
    (cohort / "clam").mkdir()
    for name in ("one", "two", "three"):
        with h5py.File(cohort / "clam" / f"{name}.h5", "w") as file:
            data = file.create_dataset("coords", data=np.array([(64, 64), (96, 64)]))
            data.attrs.update(patch_size=32, patch_level=0)
    assert tile(cohort, "--import_clam", cohort / "clam", "--slide_mpp", 1.0, output="imported") == 0
    told = {name: read_grid(cohort / "imported" / f"{name}.safetensors").slide_mpp for name in ("one", "two", "three")}
    assert told == pytest.approx({"one": 0.5, "two": 0.25, "three": 1.0}, rel=1e-3)
    assert tile(cohort, "--slide_mpp", 1.0) == 0  # the same rule
    mpps = {name: read_grid(cohort / "tiles" / f"{name}.safetensors").slide_mpp for name in told}
    assert mpps == pytest.approx(told)
    capsys.readouterr()
    assert tile(cohort, "--import_clam", cohort / "clam", "--tissue_masks", cohort) == 2
    assert "--tissue_masks must not be given with --import_clam" in capsys.readouterr().err


def test_training_and_evaluation_leave_bad_slides_out_and_say_so(tmp_path, capsys):
    rows = []
    for number in range(4):
        write_pyramid(tmp_path / f"{number}.tiff", picture(96 + 16 * number), mpp=0.5)
        rows.append((f"s{number}", f"{number}.tiff", "ab"[number % 2], ("train", "train", "test", "test")[number]))
    (tmp_path / "torn.tiff").write_bytes((tmp_path / "0.tiff").read_bytes()[:900])
    rows += [("torn", "torn.tiff", "a", "train"), ("lost", "lost.tiff", "b", "test")]
    with (tmp_path / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("slide_id", "path", "label", "split"), *rows])
    shared = ["--manifest", str(tmp_path / "m.csv"), "--dataloader_num_workers", "0", "--skip_bad_slides"]
    options = ["--tile_size_px", "32", "--encoder", "resnet10t", "--num_train_epochs", "1"]
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["train", *shared, *options, "--output_dir", str(run)]) == 0
    assert main(["evaluate", "--model", str(run), *shared, "--output_dir", str(out)]) == 0
    assert capsys.readouterr().err.rstrip().splitlines()[-1].startswith("  lost: slide must be a file")
    # Evaluation opens the slides of its split alone.
    for folder, names in ((run, ["torn", "lost"]), (out, ["lost"])):
        with (folder / "skipped_slides.csv").open(newline="") as file:
            assert [row["slide_id"] for row in csv.DictReader(file)] == names
        assert f"{len(names)} that could not be used ({', '.join(names)})" in (folder / "report.html").read_text()
        with (folder / "predictions.csv").open(newline="") as file:
            assert [row["slide_id"] for row in csv.DictReader(file)] == ["s2", "s3"]


def parsers():
    commands = build_parser()._subparsers._group_actions[0].choices
    protocol = commands["protocol"]._subparsers._group_actions[0].choices
    return {name: next(iter(protocol.values())) if name == "protocol" else commands[name] for name in READ_SLIDES}


def options_of(parser):
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("command", READ_SLIDES)
def test_every_command_that_reads_slides_has_the_options_that_messages_of_slides_name(command):
    """A HINT that names an option which the command lacks is no remedy."""
    named = set()
    for path in ("slides", "bags/bag.py", "bags/slide_policy.py"):
        root = Path(ds_wsi.__file__).parent / path
        for source in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            if source.name in ("tile_store.py", "demo.py"):
                continue  # of `ds-wsi tile` by name
            for node in ast.walk(ast.parse(source.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.strip():
                    text = re.sub(r"`[^`]*`", "", node.value)  # whole commands
                    named |= set(re.findall(r"--[a-z][a-z_]+", text))
    assert {"--slide_mpp", "--skip_bad_slides", "--tissue_masks", "--max_failed_fraction"} <= named
    missing = named - options_of(parsers()[command])
    allowed = {"--max_failed_fraction", "--read_timeout"} if command == "tile" else set()  # reads no tiles to compute
    assert missing <= allowed


def test_the_default_rule_is_one_in_all_commands():
    for name, parser in parsers().items():
        actions = [action for action in parser._actions if "--tissue" in action.option_strings]
        assert [tuple(action.choices) for action in actions] == [("auto", "grey", "otsu", "none")], name
        (action,) = actions
        # A model's tiles are what they were in its training.
        expected = "as the model was trained" if name in ("evaluate", "heatmap") else "auto"
        assert f"(default: {expected}" in action.help, name
        assert action.default in ("auto", argparse.SUPPRESS), name


def test_progress_is_told_in_lines_where_there_is_no_terminal(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "ds_wsi")
    now = iter(range(0, 10_000, 1))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: float(next(now)))
    with Progress("tiling", "slide") as progress:
        for _ in range(200):
            progress.step(200)
    lines = [message for message in caplog.messages if message.startswith("tiling: ")]
    assert len(lines) == 10
    assert re.match(r"tiling: 2\d of 200 slides \(1\d%\), .*; left: about ", lines[0])
    assert lines[-1].startswith("tiling: 200 of 200 slides (100%)")


def test_short_work_is_not_told(caplog):
    caplog.set_level(logging.INFO, "ds_wsi")
    with Progress("tiling", "slide") as progress:
        for _ in range(20):
            progress.step(20)
    assert not caplog.messages
    assert progress.done == 20


def test_durations():
    words = [duration(value) for value in (0.4, 59, 61, 3599, 3600, 9000)]
    assert words == ["0 s", "59 s", "1 min", "1 h 00 min", "1 h 00 min", "2 h 30 min"]
