"""Bags of patients: read in the slides' order wherever rows stand, refused where answers differ, told by patient."""

import csv
import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_runs
import torch

from ds_wsi.bags.augment import augment_bag
from ds_wsi.bags.bag import FailureLog, TileChunk, TileRequest, read_bags
from ds_wsi.bags.cohort import Cohort, load_cohort
from ds_wsi.bags.joined import GridPart, JoinedGrid
from ds_wsi.bags.manifest import Manifest, ManifestError, parse_manifest, read_manifest
from ds_wsi.bags.patients import by_patient, patients_of
from ds_wsi.bags.policy import AugmentPolicy, ReadPolicy
from ds_wsi.bags.sampler import choose_tiles
from ds_wsi.bags.slide_entry import SlideEntry
from ds_wsi.bags.target_columns import TargetColumns
from ds_wsi.bags.tile_budget import TileBudget, share_out
from ds_wsi.cli import main
from ds_wsi.config import DsWsiConfig
from ds_wsi.evaluation import slide_maps
from ds_wsi.evaluation.late import pooled_by_patient
from ds_wsi.evaluation.predict import SlidePrediction
from ds_wsi.models import ModelConfig, build_model
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.stacking.host_tiles import HostStacks
from ds_wsi.training.micro_step import lay_bags, stack_of
from ds_wsi.training.settings import TrainSettings

COLUMNS = ("slide_id", "label", "split", "patient_id")
# Slides s and s + 6 are one patient's: no two of its rows are side by side.
PATIENT_ROWS = [
    (name, ("normal", "tumor")[k % 2], ("train", "train", "train", "train", "test", "test")[k % 6], f"p{k % 6}")
    for k, name in enumerate(tiny_runs.SLIDES)
]


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def tables(tmp_path):
    tiny_runs.write_cohort(tmp_path)
    tiny_runs.write_table(tmp_path / "m.csv", PATIENT_ROWS, COLUMNS)
    return tmp_path


def test_a_run_of_patients_is_told_evaluated_and_compared_by_patient(tables, capfd):
    run, again, options = tables / "run", tables / "again", ("--bag", "patient", "--tiles_per_bag", "9")
    assert tiny_runs.train(tables, run, *options) == 0
    rows = table(run / "predictions.csv")
    assert list(rows[0])[:5] == ["patient_id", "slide_ids", "label", "predicted", "n_tiles"]
    # s04 has 9 rows of features, s10 has 15: evaluation takes all.
    assert [(row["patient_id"], row["slide_ids"], row["n_tiles"]) for row in rows] == [
        ("p4", "s04;s10", "24"),
        ("p5", "s05;s11", "26"),
    ]
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["bag"], metrics["n_slides"], metrics["n_patients"]) == ("patient", 4, 2)
    assert json.loads((run / "config.json").read_text())["bag"] == "patient"
    assert len(table(run / "splits.csv")) == 12
    report = (run / "report.html").read_text()
    assert "Over 2 patients" in report
    assert "of 2 patients are predicted correctly" in report
    assert tiny_runs.train(tables, run, *options, "--resume_from_checkpoint") == 0
    assert "finished already" in capfd.readouterr().err
    assert tiny_runs.evaluate(tables, run, again) == 0
    assert table(again / "predictions.csv") == rows
    assert main(["compare", str(run), str(again), "--output_dir", str(tables / "c")]) == 0
    # Slides of the patients of other splits are not evaluated; another bag is another run.
    assert tiny_runs.train(tables, run, "--tiles_per_bag", "9", "--resume_from_checkpoint") == 2
    assert "--bag must be the checkpoint's, patient" in capfd.readouterr().err


def test_the_order_of_the_rows_decides_nothing_but_the_patients_order(tables):
    shuffled = sorted(PATIENT_ROWS, key=lambda row: (row[3], row[0]), reverse=True)
    tiny_runs.write_table(tables / "n.csv", shuffled, COLUMNS)
    first, second = (patients_of(read_features_table(tables / name)) for name in ("m.csv", "n.csv"))
    members = lambda manifest: {p.slide_id: [s.slide_id for s in p.members] for p in manifest.slides}  # noqa: E731
    assert members(first) == members(second)
    assert members(first)["p1"] == ["s01", "s07"]
    assert [patient.slide_id for patient in first.slides] == ["p0", "p1", "p2", "p3", "p4", "p5"]


def read_features_table(path):
    manifest, problems = parse_manifest(path, need_slides=False)
    assert not problems
    return manifest


def test_missing_patients_and_answers_that_differ_are_listed_at_once(tables, capfd):
    rows = [list(row) for row in PATIENT_ROWS]
    rows[6][1], rows[7][1], rows[9][3] = "tumor", "normal", ""
    tiny_runs.write_table(tables / "m.csv", rows, COLUMNS)
    assert tiny_runs.train(tables, tables / "run", "--bag", "patient") == 2
    told = capfd.readouterr().err
    assert (
        "patient_id must name the patient of a bag, got none (slide s09). HINT: fill the column patient_id in" in told
    )
    assert (
        "label must be the same over a patient's slides in bags of patients, got normal (s00) and tumor (s06)" in told
    )
    assert "got tumor (s01) and normal (s07) (patient p1)" in told
    tiny_runs.write_table(tables / "m.csv", [row[:3] for row in PATIENT_ROWS], COLUMNS[:3])
    assert tiny_runs.train(tables, tables / "run", "--bag", "patient") == 2
    assert "12 times: patient_id must name the patient of a bag" in capfd.readouterr().err
    assert tiny_runs.train(tables, tables / "slides") == 0  # bags of slides need none of it


def test_all_columns_of_a_task_are_compared(tables):
    columns = ("slide_id", "split", "patient_id", "months", "event")
    rows = [(row[0], row[2], row[3], 3 + k % 6, 1) for k, row in enumerate(PATIENT_ROWS)]
    rows[8] = (*rows[8][:4], 0)
    tiny_runs.write_table(tables / "m.csv", rows, columns)
    survival = TargetColumns("survival", (), "months", "event")
    manifest, _ = parse_manifest(tables / "m.csv", need_slides=False, columns=survival)
    with pytest.raises(ManifestError, match=r"months, event must be the same .* got 5;1 \(s02\) and 5;0 \(s08\)"):
        patients_of(manifest)
    assert patients_of(manifest, labels="unused").slides[2].target == ()


@pytest.mark.parametrize("name", ["transmil", "rrtmil"])
def test_aggregators_that_take_order_for_places_are_refused_by_name(tables, capfd, name):
    assert tiny_runs.train(tables, tables / "run", "--bag", "patient", "--aggregator", name) == 2
    told = capfd.readouterr().err
    assert "--aggregator of --bag patient must be one of abmil, gated_abmil, mean, max" in told
    assert f"got {name}, which takes tiles that follow each other in a bag for neighbours" in told
    with pytest.raises(ValueError, match="--aggregator of --bag patient must be one of"):
        build_model(ModelConfig(None, name, ("a", "b"), {}, in_dim=8, bag="patient"))


# ------------------------------------------------------------------------------------------- the tiles of a bag


def joined_of(lengths):
    entries = [SlideEntry(f"s{k}", Path("x"), 0, "p") for k in range(len(lengths))]
    return JoinedGrid(tuple(GridPart(entry, range(n), 10 + k) for k, (entry, n) in enumerate(zip(entries, lengths))))


def test_rows_of_a_joined_grid_are_rows_of_its_parts():
    grid = joined_of((3, 1, 4))
    assert len(grid) == 8
    assert [(grid.place(row).entry.slide_id, grid.place(row).row) for row in (0, 2, 3, 4, 7)] == [
        *(("s0", 0), ("s0", 2), ("s1", 0), ("s2", 0), ("s2", 3))
    ]
    assert grid.counts([0, 2, 4, 5]) == [2, 0, 2]


def test_a_bags_tiles_are_shared_out_by_area_within_each_slides_own_bound():
    lengths, most = (60, 30, 9, 1), (60, 30, 9, 1)
    drawn = [share_out(20, lengths, most, (0, epoch, 5)) for epoch in range(400)]
    assert {sum(counts) for counts in drawn} == {20}
    for index, length in enumerate(lengths):
        share = Fraction(20 * length, 100)
        assert {counts[index] for counts in drawn} <= {share.__floor__(), share.__ceil__()}
        assert abs(np.mean([counts[index] for counts in drawn]) - float(share)) < 0.1
    assert share_out(20, lengths, most, (0, 3, 5)) == drawn[3]
    # The first may have 5 alone: what it leaves goes to the others in proportion.
    bounded = [share_out(24, (60, 30, 9, 1), (5, 30, 9, 1), (0, epoch, 5)) for epoch in range(200)]
    assert {counts[0] for counts in bounded} == {5}
    assert abs(np.mean([counts[1] for counts in bounded]) - 19 * 30 / 40) < 0.1
    assert share_out(45, (60, 30, 9, 1), (5, 30, 9, 1), (0, 0, 0)) == (5, 30, 9, 1)


def test_a_bag_draws_what_its_slides_would_draw_alone():
    grid, budget = joined_of((20, 4, 30)), TileBudget(per_slide=6)
    rows = budget.choose(grid, 2, 7, 1)
    assert budget.taken(grid) == len(rows) == 16
    assert [row for row in rows if row < 20] == list(choose_tiles(20, 6, (7, 1, 10)))
    assert [row for row in rows if 20 <= row < 24] == [20, 21, 22, 23]
    assert [row - 24 for row in rows if row >= 24] == list(choose_tiles(30, 6, (7, 1, 12)))
    assert TileBudget().choose(grid, 2, 7, 1) is None
    assert len(TileBudget(6, 9).choose(grid, 2, 7, 1)) == TileBudget(6, 9).taken(grid) == 9
    assert TileBudget(None, 9).choose(range(20), 2, 7, 1) == choose_tiles(20, 9, (7, 1, 2))


# ------------------------------------------------------------------------------------------- on slides


@pytest.fixture(scope="module")
def on_slides(demo_manifest, tmp_path_factory):
    """The demo's slides as pairs: (cohort of slides, cohort of patients)."""
    folder = tmp_path_factory.mktemp("pairs")
    slides = read_manifest(demo_manifest).slides
    pairs = [(f"{slide.label}{slide.split}", slide) for slide in slides]
    rows = [(slide.slide_id, slide.path, f"l{slide.label}", slide.split, patient) for patient, slide in pairs]
    tiny_runs.write_table(folder / "m.csv", rows, ("slide_id", "path", "label", "split", "patient_id"))
    cohort = load_cohort(folder / "m.csv", TilingPolicy(tile_size_px=64))
    return cohort, by_patient(cohort)


def bags_of(cohort, rows):
    failures = FailureLog(cohort.manifest.slides, cohort.grids, 0.0)
    return list(read_bags(cohort.manifest.slides, cohort.grids, rows, ReadPolicy(workers=0, chunk_tiles=5), failures))


@pytest.mark.parametrize("on_host", [False, True])
def test_one_draw_of_augmentation_is_a_slides_and_not_a_patients(on_slides, on_host):
    cohort, patients = on_slides
    policy = AugmentPolicy(colour=0.3)
    row = next(k for k, patient in enumerate(patients.manifest.slides) if len(patient.members) > 1)
    numbers = [part.number for part in patients.grids[row].parts]
    assert numbers == sorted(numbers, key=lambda number: cohort.manifest.slides[number].slide_id)
    alone = bags_of(cohort, numbers)
    expected = [augment_bag(bag.tiles, policy, (3, 2, bag.slide)) for bag in alone]
    (bag,) = bags_of(patients, [row])
    assert torch.equal(bag.tiles, torch.cat([one.tiles for one in alone]))
    settings = replace(TrainSettings(), policies=DsWsiConfig(augment=policy))
    run = SimpleNamespace(settings=settings, cohort=patients, device=torch.device("cpu"), seed=3)
    run.progress, run.mesh = SimpleNamespace(epoch=2), SimpleNamespace(tile_size=1)
    run.stacks, run.reads_host_tiles = HostStacks(run.device), on_host
    stack = stack_of(run, lay_bags(run, [bag], 0))
    values = stack.values.change(stack.values.tiles, 0) if on_host else stack.values
    assert torch.equal(values, torch.cat(expected))
    assert stack.cu_seqlens.tolist() == [0, len(bag.tiles)]
    of_patient = torch.cat([augment_bag(one.tiles, policy, (3, 2, numbers[0])) for one in alone])
    assert not torch.equal(values, of_patient), "one draw for all must be noticed"


def test_a_patients_heat_maps_are_one_per_slide_with_ranks_over_the_bag(on_slides, tmp_path, monkeypatch):
    _, patients = on_slides
    row = next(k for k, patient in enumerate(patients.manifest.slides) if len(patient.members) > 1)
    grid = patients.grids[row]
    kept = torch.tensor([k for k in range(len(grid)) if k != 1])  # one tile could not be read
    attention = torch.arange(len(kept), dtype=torch.float32)
    drawn = {}

    def draw(thumbnail, coords, side, weights, downsample, path, title, made_of, ranks):
        drawn[path.stem] = coords, weights, ranks

    monkeypatch.setattr(slide_maps, "draw_attention", draw)
    prediction = SlidePrediction(row, torch.zeros(1, 2), attention, kept)
    maps = slide_maps.draw_heatmaps(tmp_path, patients, [prediction], shown=False)
    members = [slide.slide_id for slide in patients.manifest.slides[row].members]
    assert [slide_id for slide_id, _ in maps] == list(drawn) == members
    start = 0
    for part, first in zip(grid.parts, grid.bounds, strict=False):
        coords, weights, ranks = drawn[part.entry.slide_id]
        rows = [k - first for k in kept.tolist() if first <= k < first + len(part.grid)]
        assert np.array_equal(coords, part.grid.coords[rows])
        assert weights.tolist() == attention[start : start + len(rows)].tolist()
        assert ranks.tolist() == [(start + k) / (len(kept) - 1) for k in range(len(rows))]
        start += len(rows)


def test_failed_tiles_are_the_slides_own(on_slides):
    _, patients = on_slides
    row = next(k for k, patient in enumerate(patients.manifest.slides) if len(patient.members) > 1)
    grid = patients.grids[row]
    failures = FailureLog(patients.manifest.slides, patients.grids, 1.0)
    last = len(grid) - 1
    failures.add(TileChunk(TileRequest(row, 0, len(grid), True), torch.empty(0), ((last, "torn"),)))
    part = grid.parts[-1]
    x, y = part.grid.coords[-1]
    assert failures.rows() == [{"slide_id": part.entry.slide_id, "x": x, "y": y, "reason": "torn"}]
    assert Counter(p.split for p in patients.manifest.slides) == {"train": 2, "validation": 2, "test": 2}


# ------------------------------------------------------------------------------------------- late


def test_late_pooling_is_the_mean_or_the_largest_of_the_slides_outputs(tables, capfd):
    run = tables / "run"
    assert tiny_runs.train(tables, run, epochs=1) == 0
    late = {how: tables / how for how in ("mean", "max")}
    for how, folder in late.items():
        assert tiny_runs.evaluate(tables, run, folder, "--aggregate", "patient", how) == 0
    of_slides = {row["slide_id"]: row for row in table(run / "predictions.csv")}
    probabilities = ("probability_normal", "probability_tumor")

    def logits(row):  # up to a constant, which a softmax forgets; the largest of each class does not
        return torch.tensor([float(row[name]) for name in probabilities], dtype=torch.float64).log()

    for row in table(late["mean"] / "predictions.csv"):
        slides = row["slide_ids"].split(";")
        expected = sum(logits(of_slides[name]) for name in slides) / len(slides)
        assert logits(row).numpy() == pytest.approx(expected.softmax(0).log().numpy(), abs=1e-6)
    rows = table(late["max"] / "predictions.csv")
    assert [row["patient_id"] for row in rows] == ["p4", "p5"]
    assert rows != table(late["mean"] / "predictions.csv")
    metrics = json.loads((late["max"] / "metrics.json").read_text())
    assert (metrics["bag"], metrics["n_slides"], metrics["n_patients"]) == ("patient", 4, 2)
    assert tiny_runs.evaluate(tables, run, late["max"]) == 2  # another evaluation than the folder's
    assert tiny_runs.evaluate(tables, run, tables / "x", "--aggregate", "median") == 2
    assert "--aggregate must be patient and one of none, mean, max, got 'median'" in capfd.readouterr().err


def test_the_largest_output_is_taken_class_by_class():
    slides = tuple(SlideEntry(f"s{k}", Path("x"), 0, f"p{k % 2}") for k in range(3))
    outputs = ([[1.0, 5.0]], [[0.0, 2.0]], [[3.0, 4.0]])
    grids = [SimpleNamespace(__len__=lambda: 1)] * 3
    cohort = Cohort(Manifest(slides, ("a", "b")), tuple(grids))
    predictions = [SlidePrediction(k, torch.tensor(z), None, torch.arange(k + 1)) for k, z in enumerate(outputs)]
    patients, pooled = pooled_by_patient(cohort, predictions, "max")
    assert [patient.slide_id for patient in patients.manifest.slides] == ["p0", "p1"]
    assert [one.run_logits.tolist() for one in pooled] == [[[3.0, 5.0]], [[0.0, 2.0]]]
    assert [len(one.kept) for one in pooled] == [4, 2]
