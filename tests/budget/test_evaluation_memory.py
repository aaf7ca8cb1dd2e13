"""Evaluation of a slide of any size needs one chunk of tiles, and its features: 40,000 tiles, every aggregator."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ds_wsi.bags.bag import FailureLog, read_chunks
from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.evaluation.predict import predict_slides
from ds_wsi.models import AGGREGATORS, SlideModel, build_aggregator
from ds_wsi.slides.policy import TilingPolicy

TILE_PX, WIDTH, CHUNK = 16, 32, 512


class Encoder(nn.Module):
    """A convolution and a mean; notes the largest batch, and how many earlier batches are still held by anyone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.largest_batch = self.most_alive = 0
        self.batches = weakref.WeakSet()

    def forward(self, tiles):
        assert not torch.is_grad_enabled()
        self.batches.add(tiles)
        self.largest_batch = max(self.largest_batch, len(tiles))
        self.most_alive = max(self.most_alive, len(self.batches))
        features = self.layer(tiles).mean((2, 3))
        assert features._base is None, "a feature that is a view would keep its batch alive"
        return features


@pytest.fixture(scope="module")
def cohort(demo_manifest):
    return load_cohort(demo_manifest, TilingPolicy(tile_size_px=TILE_PX), need_splits=False)


def evaluate(cohort, aggregator: str, n_tiles: int) -> Encoder:
    rows = np.arange(n_tiles) % len(cohort.grids[0])  # the slide's own tiles, over and over
    grids = [replace(cohort.grids[0], coords=cohort.grids[0].coords[rows])]
    encoder = Encoder()
    # ABMILX takes time as the square of the tiles: as narrow as it can be here.
    options = {"embed_dim": 8, "heads": 1} if aggregator == "abmilx" else {}
    model = SlideModel(encoder, build_aggregator(aggregator, WIDTH, 2, **options))
    slides = cohort.manifest.slides[:1]
    policy, failures = ReadPolicy(workers=0, chunk_tiles=CHUNK), FailureLog(slides, grids, 0.0)
    (prediction,) = predict_slides(model, slides, grids, [0], policy, failures)
    assert len(prediction.kept) == n_tiles
    assert prediction.attention is None or prediction.attention.sum().item() == pytest.approx(1, abs=1e-3)
    return encoder


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("n_tiles", [1_000, 40_000])
def test_one_chunk_of_tiles_is_held_however_many_there_are(cohort, aggregator, n_tiles, monkeypatch):
    chunks = weakref.WeakSet()
    most_chunks = 0

    def counted(*arguments):
        nonlocal most_chunks
        for chunk in read_chunks(*arguments):
            chunks.add(chunk.tiles)
            most_chunks = max(most_chunks, len(chunks))
            yield chunk

    monkeypatch.setattr("ds_wsi.evaluation.predict.read_chunks", counted)
    encoder = evaluate(cohort, aggregator, n_tiles)
    assert encoder.largest_batch <= CHUNK
    assert encoder.most_alive == 1
    assert most_chunks <= 2  # the one that is encoded, and the one that its successor replaces


def test_predictions_do_not_depend_on_the_chunks(cohort):
    torch.manual_seed(0)
    model = SlideModel(Encoder(), build_aggregator("gated_abmil", WIDTH, 2))
    slides, grids = cohort.manifest.slides, cohort.grids
    predictions = []
    for chunk in (7, 1000):
        failures = FailureLog(slides, grids, 0.0)
        predictions.append(list(predict_slides(model, slides, grids, [1, 0], ReadPolicy(0, chunk), failures)))
    assert [prediction.slide for prediction in predictions[0]] == [1, 0]
    for a, b in zip(*predictions, strict=True):
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.attention, b.attention, rtol=1e-5, atol=1e-7)
