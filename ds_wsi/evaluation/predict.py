"""Slide predictions in constant memory: chunks of tiles through the encoder, features kept on the host."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ds_wsi.bags.bag import FailureLog, read_chunks
from ds_wsi.bags.joined import Grids, scales_of
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.evaluation.metrics import slide_metrics
from ds_wsi.evaluation.populations import HeldTiles, TileEncoder
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.evaluation.tasks.answers import run_outputs
from ds_wsi.evaluation.tasks.several import Answers
from ds_wsi.models.encoder import NoEncoder
from ds_wsi.models.slide_model import SlideModel
from ds_wsi.norms.population import OneValueError
from ds_wsi.runtime.errors import naming
from ds_wsi.runtime.signals import asked
from ds_wsi.runtime.words import counted
from ds_wsi.stacking.stacked_bags import stack_bags

ALL_TILES = EvaluationProtocol()


class SlidePrediction(NamedTuple):
    """One slide's prediction.

    Attributes:
        slide: the slide's row in the cohort.
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


class SlideFeatures(NamedTuple):
    """One slide's features.

    Attributes:
        slide: the slide's row in the cohort.
        features: float32 [N, D], on the host.
        kept: int64 [N], the rows of the tiles in the slide's grid.
    """

    slide: int
    features: Tensor
    kept: Tensor


class NormVariant(NamedTuple):
    """One way to evaluate the norms of the same weights.

    Attributes:
        name: one of a `NormPolicy`'s evaluations, and not "auto".
        statistics: the encoder's running statistics in the place of its own, by their names in its state_dict; None:
            its own.
    """

    name: str
    statistics: Mapping[str, Tensor] | None = None


def own_variant(model: SlideModel) -> NormVariant:
    """The variant that the model itself names."""
    return NormVariant(model.norm_evaluation)


@torch.no_grad()
def encode_slides(
    model: SlideModel,
    slides: Sequence[SlideEntry],
    grids: Grids,
    rows: Iterable[int],
    policy: ReadPolicy,
    failures: FailureLog,
) -> Iterator[SlideFeatures]:
    """Encode the slides of `rows`, each with all its tiles; features on disk pass as they are.

    The device holds one chunk of tiles; the host holds the chunks that are read ahead and the features of one slide.
    Where norms take a slide's own statistics, exactly, over all its tiles, the host holds the slide's tiles too, as
    far as a quarter of its free memory goes, and a larger slide is read again for each norm. Runs no collective. The
    model's mode is restored at the end.

    Args:
        model: the model, on the device to compute on; it knows what its norms average over, and in which precision.
        slides, grids: the cohort's, row by row.
        rows: the slides to encode; asked for as the slides are read ahead.
        policy: how tiles are read; a chunk is the encoder's batch.
        failures: where unreadable tiles are recorded.

    Raises:
        OneValueError: a slide has one value per channel for a norm that takes its own statistics; names the slide.
    """
    for slide, (features,), kept in _encoded(model, slides, grids, rows, policy, failures, [own_variant(model)]):
        if isinstance(features, OneValueError):
            raise features
        yield SlideFeatures(slide, features, kept)


def _encoded(
    model: SlideModel,
    slides: Sequence[SlideEntry],
    grids: Grids,
    rows: Iterable[int],
    policy: ReadPolicy,
    failures: FailureLog,
    variants: Sequence[NormVariant],
) -> Iterator[tuple[int, list[Tensor | OneValueError], Tensor]]:
    """(row, features [N, D] in each variant, kept rows) of each slide, whose tiles are read once for all variants.

    In the place of features that a variant cannot give stands why.
    """
    training, evaluation = model.training, model.norm_evaluation
    model.set_norms(evaluation="running").eval()
    encode = TileEncoder(model)
    parts: list[list[Tensor]] = [[] for _ in variants]
    kept: list[Tensor] = []
    populations = [encode.norms_over_tiles(variant.name) for variant in variants]
    tiles = HeldTiles(slides, grids, policy)
    try:
        for chunk in read_chunks(slides, grids, rows, policy):
            if asked():  # whoever defers signals leaves at the next place where all ranks can
                return
            failures.add(chunk)
            of_features = chunk.tiles.dim() == 2  # features on disk
            if of_features or len(chunk.tiles):
                for variant, encoded, norms in zip(variants, parts, populations, strict=True):
                    if of_features:
                        encoded.append(chunk.tiles)
                    elif not norms:
                        where = slides[chunk.request.slide].words
                        with naming(where), encode.statistics(variant.statistics):
                            encoded.append(encode(chunk.tiles))
            if not of_features and any(populations):
                tiles.add(chunk.tiles)
            kept.append(chunk.kept)
            if chunk.request.last:
                slide = chunk.request.slide
                failures.require_tiles(slide, sum(map(len, kept)))
                answers: list[Tensor | OneValueError] = []
                for variant, encoded, norms in zip(variants, parts, populations, strict=True):
                    if norms and not of_features:
                        answers.append(_over_slide(encode, tiles, slide, slides[slide].slide_id, variant, norms))
                    else:
                        answers.append(torch.cat(encoded))
                model.set_norms(evaluation=evaluation)  # the caller's meanwhile
                yield slide, answers, torch.cat(kept)
                model.set_norms(evaluation="running")
                parts, kept = [[] for _ in variants], []
                tiles.clear()
    finally:
        model.set_norms(evaluation=evaluation).train(training)


def _over_slide(
    encode: TileEncoder, tiles: HeldTiles, row: int, name: str, variant: NormVariant, norms: Sequence[nn.Module]
) -> Tensor | OneValueError:
    """Features [N, D] of a slide over all of whose tiles these norms average, or why there are none."""
    try:
        with naming(f"slide {name}"), encode.statistics(variant.statistics):
            return torch.cat(encode.over_all(tiles, [row], norms))
    except OneValueError as error:
        remedy = ', or take norm_evaluation "running"' if variant.name == "bag" else ""
        refusal = OneValueError(
            f"a slide's own statistics must be of more than one value per channel, got {counted(tiles.count, 'tile')} "
            f"of {name} (norm_evaluation {variant.name}). HINT: leave the slide out{remedy}."
        )
        refusal.__cause__ = error
        return refusal


@torch.no_grad()
def predict_slides(
    model: SlideModel,
    slides: Sequence[SlideEntry],
    grids: Grids,
    rows: Iterable[int],
    policy: ReadPolicy,
    failures: FailureLog,
    protocol: EvaluationProtocol = ALL_TILES,
) -> Iterator[SlidePrediction]:
    """Predict the slides of `rows`, each from the tiles that the protocol takes, with any aggregator.

    Each slide is encoded once, and the runs draw from the rows of its features. With running statistics that is what
    encoding each draw would give, because an encoder then treats tiles independently; norms that take a slide's own
    statistics take them over all its tiles.

    In the memory of `encode_slides`, and on the device the features [N, D] of a slide when it is complete.

    Args:
        model, slides, grids, rows, policy, failures: see `encode_slides`.
        protocol: the tiles that are taken; draws are from those that could be read.

    Raises:
        OneValueError: as `encode_slides` does.
    """
    variants = [own_variant(model)]
    for (prediction,) in predict_variants(model, slides, grids, rows, policy, failures, variants, protocol):
        if isinstance(prediction, OneValueError):
            raise prediction
        yield prediction


@torch.no_grad()
def predict_variants(
    model: SlideModel,
    slides: Sequence[SlideEntry],
    grids: Grids,
    rows: Iterable[int],
    policy: ReadPolicy,
    failures: FailureLog,
    variants: Sequence[NormVariant],
    protocol: EvaluationProtocol = ALL_TILES,
) -> Iterator[tuple[SlidePrediction | OneValueError, ...]]:
    """Predict as `predict_slides` does, each slide in each variant; its tiles are read once.

    In the place of a prediction that a variant cannot give stands the error that names the slide: others are given.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for slide, features, kept in _encoded(model, slides, grids, rows, policy, failures, variants):
            draws = [protocol.draw(len(kept), run, slides[slide].slide_id) for run in range(protocol.runs)]
            with naming(slides[slide].words):
                predictions = tuple(
                    of_variant
                    if isinstance(of_variant, OneValueError)
                    else _aggregate(model, slide, of_variant, kept, device, draws, scales_of(grids[slide], kept))
                    for of_variant in features
                )
            yield predictions
    finally:
        model.train(training)


def prediction_metrics(
    predictions: Sequence[SlidePrediction], slides: Sequence[SlideEntry], answers: Answers | None = None
) -> dict[str, float]:
    """The loss and the metrics of a split's predictions, keys prefixed with `eval_`; in any order.

    Args:
        predictions: predictions of slides with labels.
        slides: the cohort's, row by row.
        answers: how outputs are answers to another task than classification; None: to that, by its cross-entropy.
    """
    predictions = sorted(predictions, key=lambda prediction: prediction.slide)
    if answers is not None:
        (outputs,) = run_outputs([prediction.run_logits[:1] for prediction in predictions])
        return answers.epoch_metrics(outputs, [slides[prediction.slide] for prediction in predictions])
    labels = torch.tensor([slides[prediction.slide].class_index for prediction in predictions])
    logits = torch.stack([prediction.logits for prediction in predictions]).double()
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    metrics = slide_metrics(labels.numpy(), logits.softmax(-1).numpy())
    # JSON has no NaN: a metric that is undefined on the split is left out.
    defined = {name: value for name, value in metrics.items() if value == value}
    return {"eval_loss": loss, **{f"eval_{name}": value for name, value in defined.items()}}


def _aggregate(
    model: SlideModel,
    slide: int,
    features: Tensor,
    kept: Tensor,
    device: torch.device,
    draws: Sequence[Tensor],
    scales: Tensor,
) -> SlidePrediction:
    """Predict from each draw of the slide's features."""
    features = features.to(device)
    predict = model if isinstance(model.encoder, NoEncoder) else model.aggregate
    logits: list[Tensor] = []
    attention = None
    for rows in draws:
        # All rows in their order: the features as they are, without a copy.
        bag = stack_bags([features if len(rows) == len(features) else features[rows.to(device)]])
        output = predict(bag) if model.scale_embedding is None else predict(bag, scales=scales[rows].to(device))
        if not logits and output.attention is not None:
            attention = output.attention.float().cpu()
        logits.append(output.logits[0].to(torch.promote_types(output.logits.dtype, torch.float32)).cpu())
    if attention is not None and attention.dim() == 2:
        attention = attention.mean(1)  # of several branches: a heat map shows one weight per tile
    return SlidePrediction(slide, torch.stack(logits), attention, kept[draws[0]])
