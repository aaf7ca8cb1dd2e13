"""Slide predictions in constant memory: chunks of tiles through the encoder, features kept on the host."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_wsi.bags.bag import FailureLog, ReadPolicy, read_chunks
from ds_wsi.bags.features import FeatureFile
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.models.slide_model import SlideModel
from ds_wsi.slides.tiling import TileGrid
from ds_wsi.stacking.stacked_bags import stack_bags


class SlidePrediction(NamedTuple):
    """One slide's prediction.

    Attributes:
        slide: its row in the cohort.
        logits: float32 [C].
        attention: float32 [N], or None where the aggregator has none.
        kept: int64 [N], the rows of the tiles in the slide's grid.
    """

    slide: int
    logits: Tensor
    attention: Tensor | None
    kept: Tensor


class SlideFeatures(NamedTuple):
    """One slide's features.

    Attributes:
        slide: its row in the cohort.
        features: float32 [N, D], on the host.
        kept: int64 [N], the rows of the tiles in the slide's grid.
    """

    slide: int
    features: Tensor
    kept: Tensor


@torch.no_grad()
def encode_slides(
    model: SlideModel,
    slides: Sequence[SlideEntry],
    grids: Sequence[TileGrid] | Sequence[FeatureFile],
    rows: Sequence[int],
    policy: ReadPolicy,
    failures: FailureLog,
) -> Iterator[SlideFeatures]:
    """Encode the slides of `rows`, each with all its tiles; features on disk pass as they are.

    The device holds one chunk of tiles; the host holds the chunks that are read ahead and the features of one slide.
    Runs no collective. The model's mode is restored at the end.

    Args:
        model: on the device to compute on.
        slides, grids: of the cohort, row by row.
        rows: of the slides to encode.
        policy: how tiles are read; a chunk is the encoder's batch.
        failures: where unreadable tiles are recorded.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    features: list[Tensor] = []
    kept: list[Tensor] = []
    try:
        for chunk in read_chunks(slides, grids, rows, policy):
            failures.add(chunk)
            if chunk.tiles.dim() == 2:  # features on disk
                features.append(chunk.tiles)
            elif len(chunk.tiles):
                features.append(model.encode(chunk.tiles.to(device, non_blocking=True)).cpu())
            kept.append(chunk.kept)
            if chunk.request.last:
                failures.require_tiles(chunk.request.slide, sum(map(len, kept)))
                yield SlideFeatures(chunk.request.slide, torch.cat(features), torch.cat(kept))
                features, kept = [], []
    finally:
        model.train(training)


@torch.no_grad()
def predict_slides(
    model: SlideModel,
    slides: Sequence[SlideEntry],
    grids: Sequence[TileGrid] | Sequence[FeatureFile],
    rows: Sequence[int],
    policy: ReadPolicy,
    failures: FailureLog,
) -> Iterator[SlidePrediction]:
    """Predict the slides of `rows`, each from all its tiles, with any aggregator.

    In the memory of `encode_slides`, and on the device the features [N, D] of a slide when it is complete.

    Args:
        model, slides, grids, rows, policy, failures: as of `encode_slides`.
    """
    device = next(model.parameters()).device
    for slide, features, kept in encode_slides(model, slides, grids, rows, policy, failures):
        yield _aggregate(model, slide, features, kept, device)


def _aggregate(model: SlideModel, slide: int, features: Tensor, kept: Tensor, device: torch.device) -> SlidePrediction:
    output = model(stack_bags([features.to(device)]))
    attention = None if output.attention is None else output.attention.float().cpu()
    if attention is not None and attention.dim() == 2:
        attention = attention.mean(1)  # of several branches: a heat map shows one weight a tile
    return SlidePrediction(slide, output.logits[0].float().cpu(), attention, kept)
