"""Features of a cohort's slides written to disk, to train aggregators on them alone."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ds_wsi.bags.bag import FailureLog
from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.features import (
    FORMAT,
    SUFFIXES,
    FeatureFileError,
    read_about,
    read_shape,
    rows_not_finite,
    write_features,
)
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.bags.problems import condensed
from ds_wsi.bags.shards import shard_order
from ds_wsi.evaluation.made_with import about_features, in_todays_words
from ds_wsi.evaluation.predict import encode_slides
from ds_wsi.models import ModelConfig, SlideModel, build_model, resolve_encoder
from ds_wsi.models.hub import says_weights
from ds_wsi.runtime.locks import lock_path, remove_dead_locks, shared_stream
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.shards import ALONE, Shard
from ds_wsi.runtime.temporary import remove_left_behind
from ds_wsi.runtime.words import counted
from ds_wsi.slides.policy import TilingPolicy

RECORDED_SINCE = ("slide", "pixels")  # files of earlier versions do not have them
HEAD_BYTES = 2**16


class ExtractedSlide(NamedTuple):
    """What became of a slide: its file, its rows of features, and whether they were computed now or were there."""

    slide_id: str
    path: Path
    n_rows: int
    written: bool


def build_extractor(
    name: str,
    tiling: TilingPolicy,
    weights: str | None = None,
    *,
    pretrained: bool = False,
    features: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[SlideModel, ModelConfig]:
    """A model whose encoder is the one that training takes for these options, and its description.

    Args:
        name: a timm model's name, `hf-hub:ORG/NAME` or `local-dir:PATH`; the latter two come with weights. Or own code.
        tiling: how the tiles were made.
        weights: a local file; None takes those of the name, or random ones of seed 0, of which it warns.
        pretrained: take the weights that timm has for the name.
        features: one of `FEATURES`; None for what the encoder's authors take.
        options: keyword arguments of own code.

    Raises:
        ValueError: weights that cannot be had or do not fit.
    """
    if pretrained and weights is not None:
        raise ValueError("--pretrained and --encoder_weights must not be given together. HINT: choose one.")
    source = resolve_encoder(name, options)
    named = source.weights_name(pretrained, weights)
    if weights is None and named is None and not says_weights(name):
        logger.warning("--encoder_weights is not given: %s has random weights (seed 0)", name)
    # Of a SlideModel the encoder alone is used.
    config = ModelConfig.of_source(source, "mean", ("none", "none"), asdict(tiling), features=features)
    source.warn_of_other_tiles(tiling.tile_size_px, tiling.mpp)
    torch.manual_seed(0)  # the same features when the command is given again
    return build_model(config, weights, named, allow_code=config.own_code.values()), config


def extract_features(
    model: SlideModel,
    config: ModelConfig,
    cohort: Cohort,
    directory: str | Path,
    policy: ReadPolicy,
    failures: FailureLog,
    shard: Shard = ALONE,
) -> Iterator[ExtractedSlide]:
    """Encode every slide and write `<slide_id>.safetensors`; whole files of the same encoder, tiles and slide are kept.

    The slide is known by its content: see `slide_fingerprint`. Files of an earlier version, which did not record it,
    are kept with one line: they cost hours.

    Each file is written at once, so that a killed call goes on where it was. Memory is that of `encode_slides`. A tile
    that cannot be read has no row. Several calls may write to a folder, on one machine or many: they take different
    slides, and each yields those of the others as kept.

    Args:
        model: the model whose encoder it is, on the device to compute on.
        config: the model's names and sizes.
        cohort: a cohort of slides.
        directory: where to.
        policy: how tiles are read.
        failures: where unreadable tiles are recorded.
        shard: this process, where several write to the folder.

    Raises:
        ValueError: lists every file in the way: of another encoder, weights, tiles, slide or program.
    """
    directory = Path(directory)
    remove_left_behind(directory)
    about = about_features(model, config, cohort, policy)
    kept = _kept(directory, about)
    for entry in cohort.manifest.slides:
        if entry.slide_id in kept:
            yield ExtractedSlide(entry.slide_id, _place(directory, entry.slide_id), kept[entry.slide_id], False)
    rows = [row for row in shard_order(cohort.lengths, shard) if about[row]["slide_id"] not in kept]
    directory.mkdir(parents=True, exist_ok=True)
    grids = cohort.tile_grids

    def found(row: int) -> ExtractedSlide | None:
        name = grids[row].slide_id
        count = _kept(directory, [about[row]]).get(name)
        return None if count is None else ExtractedSlide(name, _place(directory, name), count, False)

    def work(rows_read: Iterator[int]) -> Iterator[tuple[int, ExtractedSlide]]:
        slides = cohort.manifest.slides
        for row, features, tiles in encode_slides(model, slides, grids, rows_read, policy, failures):
            path = _place(directory, grids[row].slide_id)
            _require_finite(features, grids[row].slide_id)
            coords = torch.from_numpy(grids[row].coords)[tiles]
            write_features(path, features.float(), coords, grids[row].tile_size_level0_px, about[row])
            yield row, ExtractedSlide(grids[row].slide_id, path, len(features), True)

    yield from shared_stream(rows, lambda row: lock_path(directory, grids[row].slide_id), found, work)
    remove_dead_locks(directory)


def _require_finite(features: torch.Tensor, slide_id: str) -> None:
    if broken := rows_not_finite(features):
        raise ValueError(
            f"features must be finite, got {broken} rows that are not, of {len(features)} (slide {slide_id}). HINT: "
            "--precision bf16 or no, where fp16 was given; or other weights."
        )


def _place(directory: Path, slide_id: str) -> Path:
    return directory / f"{slide_id}.safetensors"


def _kept(directory: Path, about: Sequence[dict[str, str]]) -> dict[str, int]:
    """The rows of each slide whose file is there and whole; files of another encoder or program are an error."""
    n_rows_of, problems, unrecorded = {}, [], 0
    made_alike = ("encoder", "mean_and_std", "pixels")  # mostly, of all slides
    for expected in about:
        slide_id = expected["slide_id"]
        for suffix in SUFFIXES:
            path = directory / f"{slide_id}{suffix}"
            if not os.path.lexists(path):
                continue
            recorded: dict[str, str] = {}
            if path == _place(directory, slide_id) and path.is_file():
                try:
                    recorded, n_rows = in_todays_words(read_about(path)), read_shape(path)[0]
                except FeatureFileError as error:
                    if not _was_ours(path):
                        problems.append(f"features must be a whole file of `ds-wsi features`, got another: {error}")
                        continue
                    logger.warning("written anew: %s", error)
                    continue
            of_before = {name: value for name, value in expected.items() if name not in RECORDED_SINCE}
            if recorded in (expected, of_before):
                unrecorded += recorded == of_before
                n_rows_of[slide_id] = n_rows
                continue
            other = next(name for name in expected if recorded.get(name) != expected[name])
            if not recorded:
                problems.append(f"features must be a file that `ds-wsi features` wrote, got another ({path})")
                continue
            # What differs from slide to slide stands behind: files of one kind are then told on one line.
            where = f"{path}; of this command: {expected[other]}" if other not in made_alike else str(path)
            rule = f"{other} must be {expected[other]}" if other in made_alike else f"{other} must be this command's"
            problems.append(f"{rule}, got {recorded.get(other, 'none')} ({where})")
    if unrecorded:
        logger.warning(
            "%s: %d of the features files are of an earlier version, which recorded no fingerprint: kept. HINT: "
            "delete those whose slide was replaced since.",
            *(directory, unrecorded),
        )
    if problems:
        lines = "\n".join(f"  {number}. {line}" for number, line in enumerate(condensed(problems), 1))
        raise ValueError(
            f"--output_dir must hold features of this encoder and these slides alone, got "
            f"{counted(len(problems), 'other file')}:\n{lines}\nHINT: give another folder, or delete them."
        )
    return n_rows_of


def _was_ours(path: Path) -> bool:
    """Whether a file that cannot be read has the head of one that `write_features` wrote: then it is torn."""
    with path.open("rb") as file:
        return FORMAT.encode() in file.read(HEAD_BYTES)
