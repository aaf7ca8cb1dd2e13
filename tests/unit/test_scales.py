"""Bags of two magnifications: the tiles of both grids, shared out by a ratio, followed by evaluation and heat maps."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from safetensors.torch import load_file, save_file

from ds_wsi.bags.cohort import load_cohort, tile_manifest
from ds_wsi.bags.joined import GridPart, JoinedGrid, scales_of
from ds_wsi.bags.patients import by_patient
from ds_wsi.bags.sampler import choose_tiles
from ds_wsi.bags.scales import tile_scales
from ds_wsi.bags.slide_entry import SlideEntry
from ds_wsi.bags.tile_budget import TileBudget
from ds_wsi.cli import main
from ds_wsi.models import ModelConfig, build_model
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.stacking import stack_bags

TILINGS = tuple(TilingPolicy(tile_size_px=64, mpp=mpp) for mpp in (0.5, 1.0))


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def both(demo_manifest):
    """The demo's slides at each magnification, and at both."""
    cohorts = [load_cohort(demo_manifest, tiling) for tiling in TILINGS]
    tile = lambda manifest, tiling, kept: tile_manifest(manifest, tiling, tiles_dir=kept)  # noqa: E731
    return *cohorts, tile_scales(cohorts[0], TILINGS, None, tile)


def test_a_bag_is_the_tiles_of_both_grids(both):
    fine, coarse, joined = both
    assert joined.lengths == tuple(a + b for a, b in zip(fine.lengths, coarse.lengths, strict=True))
    assert min(coarse.lengths) > 0
    for row, grid in enumerate(joined.grids):
        for of_part, cohort in zip(grid.parts, (fine, coarse), strict=True):
            assert np.array_equal(of_part.grid.coords, cohort.grids[row].coords)
            assert of_part.grid.mpp == cohort.grids[row].mpp
        rows = torch.arange(len(grid))
        assert scales_of(grid, rows).tolist() == [0] * fine.lengths[row] + [1] * coarse.lengths[row]
    assert scales_of(fine.grids[0], torch.arange(3)).tolist() == [0, 0, 0]


def test_magnifications_of_a_patients_slides_lie_slide_by_slide(both):
    *_, joined = both
    for patient in by_patient(joined).grids:
        assert [part.scale for part in patient.parts] == [0, 1] * (len(patient.parts) // 2)
        assert [a.number == b.number for a, b in zip(patient.parts[::2], patient.parts[1::2], strict=True)]


def joined_of(*slides):
    """A bag of slides of these lengths at each magnification."""
    parts = [
        GridPart(SlideEntry(f"s{k}", Path("x"), 0, "p"), range(n), k, scale)
        for k, lengths in enumerate(slides)
        for scale, n in enumerate(lengths)
    ]
    return JoinedGrid(tuple(parts))


def test_a_ratio_shares_out_a_slides_tiles_and_what_is_short_goes_to_the_other():
    grid, budget = joined_of((100, 20)), TileBudget(per_slide=40, ratio=(4, 1))
    rows = budget.choose(grid, 0, 3, 1)
    assert grid.counts(rows) == [32, 8]
    assert budget.taken(grid) == 40
    assert [row for row in rows if row < 100] == list(choose_tiles(100, 32, (3, 1, 0)))
    assert grid.counts(TileBudget(per_slide=60, ratio=(1, 1)).choose(grid, 0, 3, 1)) == [40, 20]
    natural = [grid.counts(TileBudget(per_slide=40).choose(grid, 0, 3, epoch))[1] for epoch in range(60)]
    assert set(natural) == {6, 7}
    several = joined_of((60, 15), (20, 5))
    counts = several.counts(TileBudget(None, 20, (4, 1)).choose(several, 0, 3, 1))
    assert [counts[0] + counts[1], counts[2] + counts[3]] in ([15, 5], [16, 4], [14, 6])
    assert sum(counts) == 20


def test_an_embedding_is_zero_at_first_and_then_tells_magnifications_apart():
    features, scales = torch.randn(6, 8), torch.tensor([0, 0, 0, 1, 1, 1])
    config = ModelConfig(None, "abmil", ("a", "b"), {}, in_dim=8, dropout=0.0, mpps=(0.5, 2.0), scale_embedding=True)
    torch.manual_seed(0)
    model = build_model(config).eval()
    torch.manual_seed(0)
    plain = build_model(ModelConfig(None, "abmil", ("a", "b"), {}, in_dim=8, dropout=0.0)).eval()
    bag = stack_bags([features])
    assert torch.equal(model(bag, scales=scales).logits, plain(bag).logits)
    torch.nn.init.ones_(model.scale_embedding.weight[1:])
    assert not torch.equal(model(bag, scales=scales).logits, plain(bag).logits)
    assert torch.equal(model(bag, scales=scales * 0).logits, plain(bag).logits)
    with pytest.raises(ValueError, match="must be given the magnification of each tile, got none"):
        model(bag)


# ------------------------------------------------------------------------------------------- commands


@pytest.fixture
def tables(tmp_path):
    tiny_runs.write_cohort(tmp_path)
    (tmp_path / "features" / "mpp_2").mkdir()
    for name in tiny_runs.SLIDES:
        fine = load_file(tmp_path / "features" / f"{name}.safetensors")["features"]
        save_file({"features": fine[:2] + 1}, tmp_path / "features" / "mpp_2" / f"{name}.safetensors")
    return tmp_path


def test_features_are_a_file_per_slide_and_magnification(tables, capfd):
    run, again = tables / "run", tables / "again"
    options = ("--mpps", "0.5,2.0", "--scale_embedding", "--tiles_per_slide", "6", "--scale_ratio", "2:1")
    assert tiny_runs.train(tables, run, *options) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["mpps"], config["scale_embedding"], config["bag"]) == ([0.5, 2.0], True, "slide")
    assert load_file(run / "model.safetensors")["scale_embedding.weight"].abs().min() > 0
    rows = table(run / "predictions.csv")
    assert [int(row["n_tiles"]) for row in rows] == [5 + 10 + 2, 5 + 11 + 2]
    assert tiny_runs.evaluate(tables, run, again) == 0
    assert table(again / "predictions.csv") == rows
    assert tiny_runs.train(tables, run, *options, "--resume_from_checkpoint") == 0
    assert "finished already" in capfd.readouterr().err
    (tables / "features" / "mpp_2" / "s03.safetensors").unlink()
    assert tiny_runs.train(tables, tables / "x", *options) == 2
    assert "slide s03 must have one file of features" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mpps", "2.0,0.5"), "--mpps must be two resolutions or more, the finest first, got 2.0,0.5"),
        (("--mpps", "0.5"), "--mpps must be two resolutions or more, the finest first, got 0.5"),
        (("--mpps", "0.5,2", "--scale_ratio", "4:1"), "--scale_ratio must be given with a number of tiles"),
        (
            ("--mpps", "0.5,2", "--scale_ratio", "4:1:1"),
            "--scale_ratio must have a number for each of --mpps, 2, got 3",
        ),
        (("--scale_embedding",), "--scale_embedding must be given with --mpps"),
        (("--mpps", "0.5,2", "--mpp", "0.25"), "--mpp must not be given with --mpps, got 0.25"),
        (("--mpps", "0.5,2", "--aggregator", "transmil"), "--aggregator of --mpps must be one of abmil"),
        (("--mpps", "0.5,2", "--tile_store", "store"), "--tile_store must not be given with --mpps, because a store"),
    ],
)
def test_what_contradicts_is_refused_before_anything_is_read(tables, capfd, options, words):
    assert tiny_runs.train(tables, tables / "run", *options) == 2
    assert words in capfd.readouterr().err


@pytest.mark.slow
def test_slides_are_trained_evaluated_and_drawn_at_both(demo_manifest, tmp_path, capfd):
    run, shown = tmp_path / "run", tmp_path / "maps"
    line = ["train", "--manifest", str(demo_manifest), "--output_dir", str(run), "--mpps", "0.5,1.0", "--scale_ratio"]
    line += ["2:1", "--tiles_per_slide", "6", "--scale_embedding", "--encoder", "resnet10t", "--tile_size_px", "64"]
    assert main([*line, "--num_train_epochs", "1", "--dataloader_num_workers", "0"]) == 0
    assert "at 0.5 and 1.0 um/px" in capfd.readouterr().err
    tested = [row["slide_id"] for row in table(run / "predictions.csv")]
    drawn = sorted(str(path.relative_to(run / "heatmaps")) for path in (run / "heatmaps").rglob("*.png"))
    assert drawn == sorted([f"{name}.png" for name in tested] + [f"mpp_1/{name}.png" for name in tested])
    assert len(list((run / "tiles" / "mpp_1").glob("*.safetensors"))) == 8
    again = ["--manifest", str(demo_manifest), "--model", str(run), "--device", "cpu", "--dataloader_num_workers", "0"]
    again += ["--tiles_dir", str(run / "tiles")]
    assert main(["evaluate", *again, "--output_dir", str(tmp_path / "ev")]) == 0
    for row, other in zip(table(run / "predictions.csv"), table(tmp_path / "ev" / "predictions.csv"), strict=True):
        assert row["n_tiles"] == other["n_tiles"]
        assert float(row["probability_tumor"]) == pytest.approx(float(other["probability_tumor"]), abs=1e-6)
    assert main(["heatmap", *again, "--output_dir", str(shown), "--slide_ids", tested[0]]) == 0
    assert sorted(path.name for path in shown.rglob("*.png")) == [f"{tested[0]}.png"] * 2
