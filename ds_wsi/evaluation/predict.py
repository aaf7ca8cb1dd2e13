"""Slide predictions in constant memory: chunks of tiles through the encoder, features kept on the host."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_wsi.bags.bag import FailureLog, ReadPolicy, read_chunks
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.evaluation.metrics import slide_metrics
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


@torch.no_grad()
def predict_slides(
    model: SlideModel,
    slides: Sequence[SlideEntry],
    grids: Sequence[TileGrid],
    rows: Sequence[int],
    policy: ReadPolicy,
    failures: FailureLog,
) -> Iterator[SlidePrediction]:
    """Predict the slides of `rows`, each from all its tiles, with any aggregator.

    The device holds one chunk of tiles and, when a slide is complete, its features [N, D]; the host holds the chunks
    that are read ahead and the features of one slide. Runs no collective. The model's mode is restored at the end.

    Args:
        model: on the device to compute on.
        slides, grids: of the cohort, row by row.
        rows: of the slides to predict.
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
            if len(chunk.tiles):
                features.append(model.encode(chunk.tiles.to(device, non_blocking=True)).cpu())
                kept.append(chunk.kept)
            if chunk.request.last:
                failures.require_tiles(chunk.request.slide, sum(map(len, kept)))
                yield _aggregate(model, chunk.request.slide, torch.cat(features), torch.cat(kept), device)
                features, kept = [], []
    finally:
        model.train(training)


def prediction_metrics(predictions: Sequence[SlidePrediction], slides: Sequence[SlideEntry]) -> dict[str, float]:
    """The cross-entropy and the metrics of a split's predictions, keys prefixed with `eval_`; in any order.

    Args:
        predictions: of slides with labels.
        slides: of the cohort, row by row.
    """
    predictions = sorted(predictions, key=lambda prediction: prediction.slide)
    labels = torch.tensor([slides[prediction.slide].label for prediction in predictions])
    logits = torch.stack([prediction.logits for prediction in predictions]).double()
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    metrics = slide_metrics(labels.numpy(), logits.softmax(-1).numpy())
    # JSON has no NaN: a metric that is undefined on the split is left out.
    defined = {name: value for name, value in metrics.items() if value == value}
    return {"eval_loss": loss, **{f"eval_{name}": value for name, value in defined.items()}}


def _aggregate(model: SlideModel, slide: int, features: Tensor, kept: Tensor, device: torch.device) -> SlidePrediction:
    output = model(stack_bags([features.to(device)]))
    attention = None if output.attention is None else output.attention.float().cpu()
    if attention is not None and attention.dim() == 2:
        attention = attention.mean(1)  # of several branches: a heat map shows one weight a tile
    return SlidePrediction(slide, output.logits[0].float().cpu(), attention, kept)
