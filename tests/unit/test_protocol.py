"""Random tiles: drawn from features that were encoded once, as if each draw had been encoded."""

import csv
import json
import math
from dataclasses import replace
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from torch import nn

from ds_wsi.bags.bag import FailureLog, read_bags
from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.evaluation.bootstrap import bootstrap_metrics, resample_counts
from ds_wsi.evaluation.metrics import METRIC_NAMES, slide_metrics
from ds_wsi.evaluation.predict import predict_slides
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.evaluation.results import write_results
from ds_wsi.models import SlideModel, build_aggregator
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.stacking.stacked_bags import stack_bags

PROTOCOL = EvaluationProtocol(tiles=9, runs=4, seed=2)


class Encoder(nn.Module):
    """An encoder with BatchNorm, whose running statistics make tiles independent in evaluation; counts its tiles."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        nn.init.uniform_(self.layers[1].running_mean)
        self.encoded = 0

    def forward(self, tiles):
        self.encoded += len(tiles)
        return self.layers(tiles).flatten(1).clone()


@pytest.fixture(scope="module")
def cohort(demo_manifest):
    """Grids of 64 px: a dozen tiles or so; the last is cut to fewer than are drawn."""
    whole = load_cohort(demo_manifest, TilingPolicy(tile_size_px=64), need_splits=False)
    short = replace(whole.grids[-1], coords=whole.grids[-1].coords[:5])
    return replace(whole, grids=(*whole.grids[:-1], short))


def build(aggregator):
    torch.manual_seed(0)
    fewer = {"landmarks": 8} if aggregator == "transmil" else {}  # its pseudo-inverses are what takes long
    model = SlideModel(Encoder(), build_aggregator(aggregator, 6, 2, **fewer)).double()
    return model.train()  # predict_slides sets evaluation mode, and back


def predict(model, cohort, protocol):
    slides, policy = cohort.manifest.slides, ReadPolicy(workers=0, chunk_tiles=5)
    rows = range(len(slides))
    return list(
        predict_slides(model, slides, cohort.grids, rows, policy, FailureLog(slides, cohort.grids, 0), protocol)
    )


@pytest.mark.parametrize("aggregator", ["gated_abmil", "transmil", "dtfd", "max"])
def test_drawing_rows_of_features_equals_encoding_the_drawn_tiles(cohort, aggregator):
    model = build(aggregator)
    predictions = predict(model, cohort, PROTOCOL)
    assert model.training
    assert model.encoder.encoded == sum(cohort.lengths)  # once, whatever the number of runs
    slides = cohort.manifest.slides
    bags = read_bags(
        slides, cohort.grids, range(len(slides)), ReadPolicy(workers=0), FailureLog(slides, cohort.grids, 0)
    )
    model.eval()
    for prediction, bag in zip(predictions, bags, strict=True):
        assert prediction.run_logits.dtype == torch.float64
        for run, logits in enumerate(prediction.run_logits):
            rows = PROTOCOL.draw(len(bag.tiles), run, slides[bag.slide].slide_id)
            with torch.no_grad():
                output = model(stack_bags([bag.tiles[rows]]))
            torch.testing.assert_close(logits, output.logits[0], rtol=1e-11, atol=1e-12)
            if run == 0:
                assert torch.equal(prediction.kept, rows)
                assert prediction.attention is None or len(prediction.attention) == len(rows)
    whole, drawn = predictions[-1], predictions[0]
    assert len(whole.kept) == 5  # fewer than 9: all of them, in each run
    assert (whole.run_logits == whole.run_logits[0]).all()
    assert len({tuple(logits.tolist()) for logits in drawn.run_logits}) > 1


def test_draws_are_of_so_many_tiles_none_twice_and_keyed():
    protocol = EvaluationProtocol(tiles=40, runs=100)
    draws = [protocol.draw(100, run, "slide") for run in range(100)]
    assert all(len(rows.unique()) == 40 and (rows.diff() > 0).all() for rows in draws)
    assert len({tuple(rows.tolist()) for rows in draws}) == 100
    assert torch.equal(draws[7], EvaluationProtocol(tiles=40, runs=8).draw(100, 7, "slide"))  # whatever the other runs
    assert not torch.equal(draws[7], protocol.draw(100, 7, "other"))
    assert not torch.equal(draws[7], replace(protocol, seed=1).draw(100, 7, "slide"))
    # Each tile is drawn in 40 of 100 runs on average: Binomial(100, 0.4), five standard deviations.
    counts = torch.cat(draws).bincount(minlength=100)
    assert ((counts - 40).abs() < 5 * math.sqrt(24)).all()
    assert torch.equal(protocol.draw(40, 3, "slide"), torch.arange(40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0, 1), r"--eval_tiles must be at least 1"),
        ((5, 0), r"--eval_runs must be"),
        ((None, 3), r"--eval_runs must be 1"),
    ],
)
def test_a_protocol_that_tests_nothing_or_the_same_again_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluationProtocol(*options)


def test_of_several_runs_the_bootstrap_is_of_their_mean():
    generator = np.random.default_rng(0)
    labels, patients = np.arange(15) % 2, [f"p{row // 2}" for row in range(15)]
    scores = generator.random((3, 15)) + 0.4 * labels
    runs = np.stack([1.5 - scores, scores], axis=-1) / 1.5
    runs = np.clip(runs, 0, 1) / np.clip(runs, 0, 1).sum(-1, keepdims=True)
    intervals = bootstrap_metrics(labels, runs, n_resamples=20, seed=4, patients=patients)
    samples = {name: [] for name in METRIC_NAMES}
    for counts in np.concatenate(list(resample_counts(8, 20, seed=4))):
        rows = [
            row
            for patient, count in enumerate(counts)
            for _ in range(count)
            for row in range(15)
            if row // 2 == patient
        ]
        each = [slide_metrics(labels[rows], run[rows]) for run in runs]
        for name in METRIC_NAMES:
            samples[name].append(np.mean([metrics[name] for metrics in each]))
    for name, interval in intervals.items():
        assert interval.value == pytest.approx(np.mean([slide_metrics(labels, run)[name] for run in runs]), abs=1e-14)
        defined = np.array(samples[name])[np.isfinite(samples[name])]
        assert interval.n_resamples_used == len(defined)
        np.testing.assert_allclose([interval.low, interval.high], np.quantile(defined, [0.025, 0.975]), atol=1e-12)


def test_results_hold_each_runs_metrics_and_the_mean_probabilities(cohort, tmp_path):
    predictions = predict(build("max"), cohort, PROTOCOL)
    write_results(tmp_path, cohort, predictions, title="t", summary={}, protocol=PROTOCOL)
    labels = np.array([slide.label for slide in cohort.manifest.slides])
    runs = torch.stack([each.run_logits for each in predictions], 1).softmax(-1).numpy()
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["evaluation"] == {"tiles": 9, "runs": 4, "seed": 2}
    assert (written["n_slides"], written["n_patients"]) == (
        8,
        len({slide.patient_id for slide in cohort.manifest.slides}),
    )
    values = [slide_metrics(labels, run)["auc"] for run in runs]
    auc = written["runs"]["auc"]
    assert auc["values"] == pytest.approx(values)
    assert (auc["mean"], auc["std"]) == (pytest.approx(fmean(values)), pytest.approx(stdev(values)))
    assert written["metrics"]["auc"]["value"] == auc["mean"]
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["patient_id"] for row in rows] == [slide.patient_id for slide in cohort.manifest.slides]
    assert [row["n_tiles"] for row in rows][-1] == "5"
    shown = np.array([[float(row[f"probability_{name}"]) for name in cohort.manifest.classes] for row in rows])
    assert np.array_equal(shown, runs.mean(0))  # every digit
    assert "9 random tiles, 4 runs, seed 2" in (tmp_path / "report.html").read_text()


def test_a_metric_that_is_undefined_in_a_run_has_no_mean(cohort, tmp_path):
    normal = [row for row, slide in enumerate(cohort.manifest.slides) if slide.label == 0]
    predictions = [each for each in predict(build("max"), cohort, PROTOCOL) if each.slide in normal]
    write_results(tmp_path, cohort, predictions, title="t", summary={}, protocol=PROTOCOL)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["runs"]["auc"] == {"mean": None, "std": None, "values": [None] * 4}
    assert written["metrics"]["auc"]["value"] is None
    assert written["metrics"]["accuracy"]["value"] == written["runs"]["accuracy"]["mean"]
