"""Evaluation of a slide of any size needs one chunk of tiles, and its features: 40,000 tiles, every aggregator."""

from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from ds_wsi.bags.bag import FailureLog, ReadPolicy
from ds_wsi.bags.cohort import load_cohort
from ds_wsi.evaluation.predict import predict_slides
from ds_wsi.models import AGGREGATORS, SlideModel, build_aggregator
from ds_wsi.slides.tiling import TilingPolicy

TILE_PX, WIDTH, CHUNK = 16, 32, 512


class Encoder(nn.Module):
    """A convolution and a mean; notes the largest batch and this process's memory."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.largest_batch = self.peak_bytes = 0

    def forward(self, tiles):
        assert not torch.is_grad_enabled()
        features = self.layer(tiles).mean((2, 3))
        self.largest_batch = max(self.largest_batch, len(tiles))
        self.peak_bytes = max(self.peak_bytes, psutil.Process().memory_info().rss)
        return features


@pytest.fixture(scope="module")
def cohort(demo_manifest):
    return load_cohort(demo_manifest, TilingPolicy(tile_size_px=TILE_PX), need_splits=False)


def evaluate(cohort, aggregator: str, n_tiles: int) -> Encoder:
    rows = np.arange(n_tiles) % len(cohort.grids[0])  # the slide's own tiles, over and over
    grids = [replace(cohort.grids[0], coords=cohort.grids[0].coords[rows])]
    encoder = Encoder()
    model = SlideModel(encoder, build_aggregator(aggregator, WIDTH, 2))
    slides = cohort.manifest.slides[:1]
    policy, failures = ReadPolicy(workers=0, chunk_tiles=CHUNK), FailureLog(slides, grids, 0.0)
    (prediction,) = predict_slides(model, slides, grids, [0], policy, failures)
    assert len(prediction.kept) == n_tiles
    assert prediction.attention is None or prediction.attention.sum().item() == pytest.approx(1, abs=1e-3)
    return encoder


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_memory_grows_by_the_features_only(cohort, aggregator):
    evaluate(cohort, aggregator, 2 * CHUNK)  # buffers of the libraries
    small, large = evaluate(cohort, aggregator, 4 * CHUNK), evaluate(cohort, aggregator, 40_000)
    assert large.largest_batch <= CHUNK
    feature_bytes = 40_000 * WIDTH * 4
    tile_bytes = 40_000 * 3 * TILE_PX**2
    allowed = 2 * feature_bytes + 4 * 2**20
    assert allowed < tile_bytes, "the bound must be tight enough to notice that the tiles are kept"
    assert large.peak_bytes - small.peak_bytes <= allowed


def test_predictions_do_not_depend_on_the_chunks(cohort):
    torch.manual_seed(0)
    model = SlideModel(Encoder(), build_aggregator("gated_abmil", WIDTH, 2))
    slides, grids = cohort.manifest.slides, cohort.grids
    found = []
    for chunk in (7, 1000):
        failures = FailureLog(slides, grids, 0.0)
        found.append(list(predict_slides(model, slides, grids, [1, 0], ReadPolicy(0, chunk), failures)))
    assert [prediction.slide for prediction in found[0]] == [1, 0]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.attention, b.attention, rtol=1e-5, atol=1e-7)
