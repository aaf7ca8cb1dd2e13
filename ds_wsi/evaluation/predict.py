"""Slide predictions in constant memory: chunks of tiles through the encoder, features kept on the host."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_wsi.bags.bag import FailureLog, ReadPolicy, read_chunks
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.models.slide_model import SlideModel
from ds_wsi.slides.tiling import TileGrid
from ds_wsi.stacking.stacked_bags import stack_bags

ALL_TILES = EvaluationProtocol()


class SlidePrediction(NamedTuple):
    """One slide's prediction.

    Attributes:
        slide: its row in the cohort.
        run_logits: [R, C] of the protocol's R runs, float32 (float64 of a float64 model).
        attention: float32 [N] of the first run, or None where the aggregator has none.
        kept: int64 [N], the rows of the first run's tiles in the slide's grid.
    """

    slide: int
    run_logits: Tensor
    attention: Tensor | None
    kept: Tensor

    @property
    def logits(self) -> Tensor:
        """[C] of the first run: the only one where all tiles are taken."""
        return self.run_logits[0]


@torch.no_grad()
def predict_slides(
    model: SlideModel,
    slides: Sequence[SlideEntry],
    grids: Sequence[TileGrid],
    rows: Sequence[int],
    policy: ReadPolicy,
    failures: FailureLog,
    protocol: EvaluationProtocol = ALL_TILES,
) -> Iterator[SlidePrediction]:
    """Predict the slides of `rows`, each from the tiles that the protocol takes, with any aggregator.

    Each slide is encoded once, and the runs draw from the rows of its features: an encoder in evaluation mode treats
    tiles independently, so that this is what encoding each draw would give.

    The device holds one chunk of tiles and, when a slide is complete, its features [N, D]; the host holds the chunks
    that are read ahead and the features of one slide. Runs no collective. The model's mode is restored at the end.

    Args:
        model: on the device to compute on.
        slides, grids: of the cohort, row by row.
        rows: of the slides to predict.
        policy: how tiles are read; a chunk is the encoder's batch.
        failures: where unreadable tiles are recorded.
        protocol: which tiles; draws are from those that could be read.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    features: list[Tensor] = []
    kept: list[Tensor] = []
    try:
        for chunk in read_chunks(slides, grids, rows, policy):
            failures.add(chunk)
            if len(chunk.tiles):
                features.append(model.encode(chunk.tiles.to(device, non_blocking=True)).cpu())
                kept.append(chunk.kept)
            if chunk.request.last:
                failures.require_tiles(chunk.request.slide, sum(map(len, kept)))
                slide = chunk.request.slide
                drawn = _draws(protocol, sum(map(len, kept)), slides[slide].slide_id)
                yield _aggregate(model, slide, torch.cat(features), torch.cat(kept), device, drawn)
                features, kept = [], []
    finally:
        model.train(training)


def _draws(protocol: EvaluationProtocol, n_tiles: int, slide_id: str) -> list[Tensor]:
    return [protocol.draw(n_tiles, run, slide_id) for run in range(protocol.runs)]


def _aggregate(
    model: SlideModel, slide: int, features: Tensor, kept: Tensor, device: torch.device, draws: Sequence[Tensor]
) -> SlidePrediction:
    """Predict from each draw of the slide's features."""
    features = features.to(device)
    logits: list[Tensor] = []
    attention = None
    for rows in draws:
        # All rows in their order: the features as they are, without a copy.
        output = model(stack_bags([features if len(rows) == len(features) else features[rows.to(device)]]))
        if not logits and output.attention is not None:
            attention = output.attention.float().cpu()
        logits.append(output.logits[0].to(torch.promote_types(output.logits.dtype, torch.float32)).cpu())
    if attention is not None and attention.dim() == 2:
        attention = attention.mean(1)  # of several branches: a heat map shows one weight a tile
    return SlidePrediction(slide, torch.stack(logits), attention, kept[draws[0]])
